"""The work of an ablation, in parallel single-threaded processes that may share a GPU.

Each unit of work is stored as soon as it is done. The most valuable units come first: the primary comparison, seed by seed.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any

import torch
from tqdm import tqdm

from eval.ablation.draws import alone, draw, find_grid, references, train_run
from eval.ablation.forms import IP_ADAPTER, SIMPLE
from eval.ablation.memo import Memo, Unit
from eval.ablation.names import Draw, alone_name, grid_name, rate_name, training_name
from eval.ablation.study import RATE_SEED, Workspace
from eval.ablation.training import try_rate

TRAININGS = "train-", "rate-"  # how the names of jobs that train begin


@dataclass(frozen=True)
class Job:
    """A picklable call that stores a unit of this name, and the names of the jobs that it needs."""

    name: str
    call: Callable[[], Any]
    after: tuple[str, ...] = ()


def jobs_of(workspace: Workspace, tasks: Sequence[str]) -> list[Job]:
    """List all jobs, the most valuable first. `tasks`: the first one is the primary one."""

    study = workspace.study

    def drawing(what: Draw) -> Job:
        return Job(what.name, partial(draw, workspace, what), (what.run, what.grid))

    def without_adapter(task: str, split: str) -> Job:
        return Job(alone_name(task, split), partial(alone, workspace, task, split))

    pair = [form for form in (IP_ADAPTER, SIMPLE) if form in study.forms]
    others, first, last = [form for form in study.forms if form not in pair], tasks[0], study.steps
    jobs = [Job("references", partial(references, workspace)), *(without_adapter(task, "test") for task in tasks)]
    for forms in (pair, others):
        rates = {form: {rate_name(form, rate): partial(try_rate, workspace, form, rate) for rate in study.rates} for form in forms}
        jobs += [Job(name, call) for each in rates.values() for name, call in each.items()]
        for form, seed in study.runs(*forms):
            jobs.append(Job(training_name(form, seed), partial(train_run, workspace, form, seed), tuple(rates[form])))
            if seed == 0:
                jobs.append(Job(grid_name(form), partial(find_grid, workspace, form), (training_name(form, 0),)))
            jobs.append(drawing(Draw(form, seed, last, first)))
        if forms is pair and workspace.source.data is None:
            jobs += [without_adapter(first, "confirm"), *(drawing(Draw(*run, last, first, "confirm")) for run in study.runs(*pair))]
    for form, seed in study.runs(*study.forms):
        jobs += [drawing(Draw(form, seed, last, task)) for task in tasks[1:]]
        jobs += [drawing(Draw(form, seed, step, first)) for step in study.checkpoints[:-1]]
        jobs.append(drawing(Draw(form, seed, last, first, layers="finest")))
    pairs = itertools.product(study.forms, study.rates)
    jobs += [drawing(Draw(form, RATE_SEED, study.rate_steps, first, rate=rate)) for form, rate in pairs]
    return jobs


def missing(workspace: Workspace, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose units are not stored, and the trainings of adapters that those draw with."""
    memo = Memo(workspace.work)
    undone = {job.name for job in jobs if not memo.path(job.name).exists()}
    trainings = {name for job in jobs if job.name in undone for name in job.after if name.startswith(TRAININGS[0])}
    return [job for job in jobs if job.name in undone | trainings]


def prepare_worker() -> None:
    """Use one thread, and stop as by SIGTERM when the process that started this one has ended, however it ended."""
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        while True:  # the first signal lets a training save its state and stop, and the next one ends the process
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    threading.Thread(target=follow, daemon=True).start()


def run(jobs: Sequence[Job], workers: int) -> None:
    """Run jobs in order, at most `workers` at a time, each after those it needs. Jobs that are not listed count as done."""
    if workers == 1:
        for job in tqdm(jobs, desc="ablation", position=0):
            job.call()
        return
    waiting, running, unfinished = list(jobs), dict[Future[Any], str](), {job.name for job in jobs}
    with ProcessPoolExecutor(workers, get_context("spawn"), prepare_worker) as pool:
        try:
            with tqdm(total=len(jobs), desc="ablation", position=0) as bar:
                while waiting or running:
                    ready = [job for job in waiting if not unfinished & set(job.after)][: workers - len(running)]
                    for job in ready:
                        waiting.remove(job)
                        running[pool.submit(job.call)] = job.name
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        unfinished.discard(running.pop(future))
                        future.result()
                        bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


Jobs = Callable[[Workspace, Sequence[str]], list[Job]]


def evaluate(workspace: Workspace, jobs: int, list_jobs: Jobs) -> tuple[dict[str, Any], dict[str, Unit]]:
    """Compute what is missing; return the content of the results file except the summary, and all units."""
    splits = {split: workspace.bench(split).prompts for split in ("validation", "test", "confirm")}
    all_jobs, memo = list_jobs(workspace, splits["test"].tasks), Memo(workspace.work)
    if todo := missing(workspace, all_jobs):
        if workspace.source.data is None:
            print(f"{len(todo)} units of work are missing; all take about {workspace.study.hours():.1f} hours of one core of a CPU")
        if any(job.name.startswith(TRAININGS) and not memo.path(job.name).exists() for job in todo):
            workspace.setting()  # encode the pictures once, before parallel processes need them
        run(todo, jobs)
    units = {job.name: memo.read(job.name) for job in all_jobs}
    if workspace.source.data is not None:
        splits = {"test": splits["test"]}
    data = {"made_from": workspace.made_from, "study": asdict(workspace.study), "tasks": list(splits["test"].tasks)}
    return data | {"prompts": {split: prompts.to_json() for split, prompts in splits.items()}}, units
