"""The work of an ablation: train, draw and read, in parallel single-threaded processes that may share a GPU.

Each unit of work is stored as soon as it is done (`Memo`). The most valuable units come first: the primary comparison, seed by seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.ablation.forms import BASELINE, FORMS, PRIMARY
from eval.ablation.grid import bisected, spaced
from eval.ablation.memo import Arrays, Memo, Unit
from eval.ablation.rows import SCALES, follows
from eval.ablation.study import RATE_SEED, Study, Workspace, made_on
from eval.ablation.training import plan_of, train, trained, try_rate
from eval.bench import Bench, through_the_vae
from model.adapter import IPAdapter
from model.attention import decoupled
from sampling.lambdas import Lambda


def encoded(read: dict[str, Tensor]) -> Arrays:
    """Round what was read to int16, one row per drawing (`SCALES`)."""
    flat = {key: values.reshape(len(values), -1).double() * SCALES[key] for key, values in read.items()}
    return {key: values.round().clamp(-(2**15), 2**15 - 1).to(torch.int16) for key, values in flat.items()}


def joined(parts: Sequence[Arrays]) -> Arrays:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@dataclass(frozen=True)
class Draw:
    """Drawings of a task by one adapter, at several lambdas. `rate`: that of a training that tests a learning rate."""

    form: str
    seed: int
    step: int
    task: str
    split: str = "test"
    layers: str = "all"
    rate: float | None = None

    @property
    def run(self) -> str:
        """The training that it needs."""
        return f"train-{self.form}-{self.seed}" if self.rate is None else f"rate-{self.form}-{self.rate:g}"

    @property
    def name(self) -> str:
        run = self.run.removeprefix("train-")
        return f"drawn-{run}-{self.step}-{self.task}-{self.split}-{self.layers}"


def draw(workspace: Workspace, study: Study, what: Draw) -> Unit:
    """Draw with an adapter at each lambda of its form's grid, or at a few of them unless its training is complete."""

    def make() -> Unit:
        grid = find_grid(workspace, study, what.form).value["lambdas"]
        lambdas = [lam for lam in grid if lam] if what.step == study.steps else spaced(grid, study.few)
        return drawn(workspace, study, what, lambdas)

    return Memo(workspace.work)(what.name, make)


def drawn(workspace: Workspace, study: Study, what: Draw, lambdas: list[float]) -> Unit:
    """Draw at these lambdas. Nothing is drawn by an adapter whose training diverged."""
    value = {**asdict(what), "lambdas": lambdas}
    if what.rate is None:
        plan = plan_of(workspace, study, what.form, what.seed)
    elif try_rate(workspace, study, what.form, what.rate).value is None:
        return Unit(value, made_on(study.device))
    else:
        plan = study.plan(what.form, RATE_SEED, what.rate)
    adapter, bench = trained(workspace, study, what.form, plan, what.step), workspace.bench(study, what.split)
    return Unit(value, made_on(study.device), joined([_read(bench, adapter, what, lam) for lam in lambdas]))


def _read(bench: Bench, adapter: IPAdapter, what: Draw, lam: float) -> Arrays:
    strength = lam if what.layers == "all" else Lambda(lam, what.layers)
    drawn = bench.draw(what.task, adapter, FORMS[what.form].fuse, bench.embedding(adapter), strength)
    return encoded(bench.read(what.task, drawn))


def alone(workspace: Workspace, study: Study, task: str, split: str) -> Unit:
    """Draw a task at lambda 0: the text alone, which is the same for all forms."""

    def make() -> Unit:
        bench = workspace.bench(study, split)
        arrays = encoded(bench.read(task, bench.draw(task, None, decoupled, None, 0.0)))
        return Unit({"task": task, "split": split, "lambdas": [0.0]}, made_on(study.device), arrays)

    return Memo(workspace.work)(f"alone-{task}-{split}", make)


def references(workspace: Workspace, study: Study) -> Unit:
    """Read the image prompts themselves, and the image prompts through the VAE: the ceilings."""

    def make() -> Unit:
        bench = workspace.bench(study)
        pixels = bench.prompts.pixels
        parts = [encoded(bench.read("picture", x)) for x in (pixels, through_the_vae(bench.pipeline.vae, pixels))]
        return Unit({"task": "picture", "split": "test", "references": ["truth", "vae"]}, made_on(study.device), joined(parts))

    return Memo(workspace.work)("references", make)


def find_grid(workspace: Workspace, study: Study, form: str) -> Unit:
    """Find the lambdas of a form by bisection, with seed 0 on the validation prompts of the first task."""

    def make() -> Unit:
        bench = workspace.bench(study, "validation")
        adapter = trained(workspace, study, form, plan_of(workspace, study, form, 0), study.steps)
        what = Draw(form, 0, study.steps, bench.prompts.tasks[0], "validation")
        truth, parts = bench.prompts.to_json().get("truth"), dict[float, Arrays]()

        def follow(lam: float) -> float:
            none = bench.draw(what.task, None, decoupled, None, 0.0) if lam == 0 else None
            parts[lam] = _read(bench, adapter, what, lam) if none is None else encoded(bench.read(what.task, none))
            return float(follows(what.task, parts[lam], truth, parts[0.0]).mean())

        found = bisected(follow, FORMS[form].scale)
        value = {**asdict(what), "lambdas": list(found), "following": list(found.values())}
        return Unit(value, made_on(study.device), joined([parts[lam] for lam in found]))

    return Memo(workspace.work)(f"grid-{form}", make)


def train_run(workspace: Workspace, study: Study, form: str, seed: int) -> Unit:
    """Train a counted adapter; return its size and its held-out losses."""
    plan = plan_of(workspace, study, form, seed)
    train(workspace, study, form, plan, study.checkpoints)

    def make() -> Unit:
        card = workspace.card(study, plan, study.steps)
        value = {key: card[key] for key in ("parameters", "losses")} | {"form": form, "seed": seed, "rate": plan.lr}
        return Unit(value, {key: card[key] for key in made_on(study.device)})

    return Memo(workspace.work)(f"train-{form}-{seed}", make)


@dataclass(frozen=True)
class Job:
    """A picklable call that stores a unit of this name, and the names of the jobs that it needs."""

    name: str
    call: Callable[[], Any]
    after: tuple[str, ...] = ()


def jobs_of(workspace: Workspace, study: Study, tasks: Sequence[str]) -> list[Job]:
    """List all jobs, the most valuable first. `tasks`: the first one is the primary one."""

    def drawing(what: Draw) -> Job:
        return Job(what.name, partial(draw, workspace, study, what), (what.run, f"grid-{what.form}"))

    def without_adapter(task: str, split: str) -> Job:
        return Job(f"alone-{task}-{split}", partial(alone, workspace, study, task, split))

    pair = [form for form in (BASELINE, PRIMARY) if form in study.forms]
    others, first, last = [form for form in study.forms if form not in pair], tasks[0], study.steps
    jobs = [Job("references", partial(references, workspace, study)), *(without_adapter(task, "test") for task in tasks)]
    for forms in (pair, others):
        rates = {form: {f"rate-{form}-{rate:g}": partial(try_rate, workspace, study, form, rate) for rate in study.rates} for form in forms}
        jobs += [Job(name, call) for each in rates.values() for name, call in each.items()]
        for form, seed in study.runs(*forms):
            jobs.append(Job(f"train-{form}-{seed}", partial(train_run, workspace, study, form, seed), tuple(rates[form])))
            if seed == 0:
                jobs.append(Job(f"grid-{form}", partial(find_grid, workspace, study, form), (f"train-{form}-0",)))
            jobs.append(drawing(Draw(form, seed, last, first)))
        if forms is pair and workspace.source.data is None:
            jobs += [without_adapter(first, "confirm"), *(drawing(Draw(*run, last, first, "confirm")) for run in study.runs(*pair))]
    for form, seed in study.runs(*study.forms):
        jobs += [drawing(Draw(form, seed, last, task)) for task in tasks[1:]]
        jobs += [drawing(Draw(form, seed, step, first)) for step in study.checkpoints[:-1]]
        jobs.append(drawing(Draw(form, seed, last, first, layers="finest")))
    tried = itertools.product(study.forms, study.rates)
    return jobs + [drawing(Draw(form, RATE_SEED, study.rate_steps, first, rate=rate)) for form, rate in tried]


def missing(workspace: Workspace, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose units are not stored, and the trainings of adapters that those draw with."""
    memo = Memo(workspace.work)
    undone = {job.name for job in jobs if not memo.path(job.name).exists()}
    trainings = {name for job in jobs if job.name in undone for name in job.after if name.startswith("train-")}
    return [job for job in jobs if job.name in undone | trainings]


def run(jobs: Sequence[Job], workers: int) -> None:
    """Run jobs in order, at most `workers` at a time, each after those it needs. Jobs that are not listed count as done."""
    if workers == 1:
        for job in tqdm(jobs, desc="ablation", position=0):
            job.call()
        return
    waiting, running, listed = list(jobs), dict[Future[Any], str](), {job.name for job in jobs}
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            with tqdm(total=len(jobs), desc="ablation", position=0) as bar:
                while waiting or running:
                    ready = [job for job in waiting if not listed & set(job.after)][: workers - len(running)]
                    for job in ready:
                        waiting.remove(job)
                        running[pool.submit(job.call)] = job.name
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        listed.discard(running.pop(future))
                        future.result()
                        bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def evaluate(workspace: Workspace, study: Study, jobs: int) -> tuple[dict[str, Any], dict[str, Unit]]:
    """Compute what is missing; return the content of the results file except the summary, and all units."""
    splits = {split: workspace.bench(study, split).prompts for split in ("validation", "test", "confirm")}
    listed = jobs_of(workspace, study, splits["test"].tasks)
    if todo := missing(workspace, listed):
        if workspace.source.data is None:
            print(f"{len(todo)} units of work are missing; all take about {study.hours():.1f} hours of one core of a CPU")
        workspace.setting(study)  # encode the pictures once, before parallel processes need them
        run(todo, jobs)
    memo = Memo(workspace.work)
    units = {job.name: memo.read(job.name) for job in listed}
    if workspace.source.data is not None:
        splits = {"test": splits["test"]}
    data = {"made_from": workspace.made_from, "study": asdict(study), "tasks": list(splits["test"].tasks)}
    return data | {"prompts": {split: prompts.to_json() for split, prompts in splits.items()}}, units
