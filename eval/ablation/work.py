"""The work of an ablation: train, draw and score, in parallel single-threaded processes.

Each process has one thread, so results do not depend on the number of cores. All results are cached in a `Memo` and stored in
results/ablation.json, so that another machine can continue.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from checkpoints.adapters import load_adapter
from checkpoints.files import read_json
from eval.ablation.forms import BASELINE, FORMS, PRIMARY, SHARES
from eval.ablation.mass import image_mass
from eval.ablation.memo import Memo
from eval.ablation.study import Study, Workspace, untrained_adapter
from eval.ablation.training import best_rate, settings_of, train, try_rate
from eval.bench import Bench, Row
from eval.prompts import TASKS
from model.adapter import IPAdapter
from model.attention import concatenated

T = TypeVar("T")
MASS_PROMPTS = 32


def _key(study: Study, form: str, seed: int, rate: float) -> dict[str, Any]:
    """Return all settings that the rows of an adapter depend on, except `made_from`."""
    lambdas = (FORMS[form].lambdas, FORMS[form].few)
    return {"plan": asdict(study.plan(form, seed, rate)), **_drawing(study), "lambdas": lambdas}


def _drawing(study: Study) -> dict[str, Any]:
    """Return the settings that all drawings share."""
    return {key: getattr(study, key) for key in ("prompts", "draw_steps", "guidance")}


def _load_trained(workspace: Workspace, study: Study, bench: Bench, form: str, seed: int, share: float) -> IPAdapter:
    """Load an adapter as it was after a share of its training."""
    return load_adapter(workspace.adapter(form, seed, share), bench.pipeline.unet).to(study.device)


def rows(workspace: Workspace, study: Study, form: str, seed: int, rate: float) -> list[Row]:
    """Train an adapter and draw all tasks with it. Draw `conflict` after parts of the training too."""

    def make() -> list[Row]:
        train(workspace, study, form, seed, rate)
        bench, fuse, drawn = workspace.bench(study), FORMS[form].fuse, list[Row]()
        for share in SHARES:
            where = {"form": form, "seed": seed, "share": share}
            adapter = _load_trained(workspace, study, bench, form, seed, share)
            for task in TASKS if share == 1 else ("conflict",):
                lambdas = FORMS[form].few if share < 1 else FORMS[form].lambdas_of(task)
                drawn += bench.cell(task, adapter, fuse, lambdas, **where)
        return drawn + bench.controls(adapter, fuse, **where)

    memo, name = Memo(workspace.work), f"rows-{form}-{seed}"
    if workspace.card(form, seed).get("settings") != settings_of(workspace, study, form, seed, rate):
        memo.path(name).unlink(missing_ok=True)  # drop cached rows if their adapter is gone, because they could not be checked
    return memo(name, _key(study, form, seed, rate), make)


def masses(workspace: Workspace, study: Study, form: str, rate: float) -> list[Row]:
    """Measure the image mass of a joint softmax, seed 0, before training and after each share of it."""

    def make() -> list[Row]:
        train(workspace, study, form, 0, rate)
        bench = workspace.bench(study).first(MASS_PROMPTS)
        adapters = {0.0: untrained_adapter(workspace.setting(study), FORMS[form], 0).to(study.device)}
        adapters |= {share: _load_trained(workspace, study, bench, form, 0, share) for share in SHARES}
        measured = ((share, image_mass(bench, adapter)) for share, adapter in adapters.items())
        return [{"form": form, "share": share, **row} for share, each in measured for row in each]

    return Memo(workspace.work)(f"mass-{form}", _key(study, form, 0, rate) | {"first": MASS_PROMPTS}, make)


def anchors(workspace: Workspace, study: Study) -> list[Row]:
    """Score the reference rows (`Bench.anchors`)."""
    return Memo(workspace.work)("anchors", _drawing(study), lambda: workspace.bench(study).anchors())


def more_steps(workspace: Workspace, study: Study, form: str, rate: float) -> list[Row]:
    """Draw a form at the first lambda of `few`, seed 0, with `check_steps` steps, to check that few steps are enough."""

    def make() -> list[Row]:
        bench = replace(workspace.bench(study), steps=study.check_steps)
        where = {"form": form, "seed": 0, "share": 1.0, "steps": study.check_steps}
        adapter = _load_trained(workspace, study, bench, form, 0, 1.0)
        return bench.cell("conflict", adapter, FORMS[form].fuse, FORMS[form].few[:1], **where)

    key = _key(study, form, 0, rate) | {"steps": study.check_steps}
    return Memo(workspace.work)(f"steps-{form}", key, make)


def _run(pool: ProcessPoolExecutor, work: Mapping[str, Callable[[], T]], what: str) -> dict[str, T]:
    """Run picklable calls in the pool; return their results by name, in order. An exception cancels the waiting calls."""
    futures = {name: pool.submit(call) for name, call in work.items()}
    try:
        for done in tqdm(as_completed(futures.values()), total=len(futures), desc=what, position=0):
            done.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return {name: future.result() for name, future in futures.items()}


def evaluate(workspace: Workspace, study: Study, bench: Bench, jobs: int) -> dict[str, Any]:
    """Compute all missing results; return the content of the results file, except the summary."""
    joint = [form for form in study.forms if FORMS[form].fuse is concatenated]
    pairs = list(itertools.product(range(study.seeds), study.forms))  # all forms of a seed first
    tried = {
        study.rate_plan(form, rate).name: partial(try_rate, workspace, study, form, rate)
        for form, rate in itertools.product(study.forms, study.rates)
    }
    names = [*tried, "anchors", *(f"rows-{form}-{seed}" for seed, form in pairs), *(f"mass-{form}" for form in joint)]
    names += [f"steps-{form}" for form in (BASELINE, PRIMARY)]
    memo = Memo(workspace.work)
    if not all(memo.path(name).exists() for name in names):
        workspace.setting(study)  # encode the pictures once, before parallel processes need them
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        tried_gains = iter(_run(pool, tried, "rates").values())
        gains = {form: {rate: next(tried_gains) for rate in study.rates} for form in study.forms}
        rates = {form: best_rate(gains[form], form) for form in study.forms}
        work: dict[str, Callable[[], list[Row]]] = {"anchors": partial(anchors, workspace, study)}
        work |= {f"rows-{form}-{seed}": partial(rows, workspace, study, form, seed, rates[form]) for seed, form in pairs}
        _run(pool, work, "adapters")
        work = {f"mass-{form}": partial(masses, workspace, study, form, rates[form]) for form in joint}
        work |= {f"steps-{form}": partial(more_steps, workspace, study, form, rates[form]) for form in (BASELINE, PRIMARY)}
        _run(pool, work, "image mass, more steps")
    return {
        "made_from": workspace.made_from,
        "study": asdict(study),
        "scorer": bench.scorer.name,
        **bench.prompts.to_json(),
        **_training(workspace, study, gains, rates),
        "units": {name: read_json(memo.path(name)) for name in names},
    }


def _training(workspace: Workspace, study: Study, gains: dict[str, dict[float, float | None]], rates: dict[str, float]) -> dict[str, Any]:
    """Collect the learning rates, numbers of parameters and gains of all forms."""
    cards = {form: [workspace.card(form, seed) for seed in range(study.seeds)] for form in study.forms}
    return {
        "shipped_pictures": workspace.shipped_pictures(),
        "rates": {
            form: {"chosen": rates[form], "gains": {f"{rate:g}": gain for rate, gain in gains[form].items()}}
            for form in study.forms
        },
        "parameters": {form: each[0]["parameters"] for form, each in cards.items()},
        "gains": {form: [card["gains"] for card in each] for form, each in cards.items()},
    }
