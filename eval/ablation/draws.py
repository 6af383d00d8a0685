"""Train, draw and read: each function makes one unit of work, or returns the stored one (`Memo`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from eval.ablation.forms import FORMS
from eval.ablation.fuses import MixedAdapter, WithoutPadding
from eval.ablation.grid import bisect_lambdas, spaced_lambdas
from eval.ablation.memo import Arrays, Memo, Unit
from eval.ablation.names import Draw, alone_name, grid_name, training_name
from eval.ablation.rows import SCALES, follows
from eval.ablation.study import RATE_SEED, Workspace
from eval.ablation.training import plan_of, train, trained_adapter, try_rate
from eval.bench import Bench, through_the_vae
from model.adapter import IPAdapter
from model.text_encoder import TextEncoder
from sampling.embeddings import AdapterLambda
from sampling.lambdas import Lambda


def quantise(readings: dict[str, Tensor]) -> Arrays:
    """Round what was read to int16, one row per drawing (`SCALES`)."""
    flat = {key: values.reshape(len(values), -1).double() * SCALES[key] for key, values in readings.items()}
    return {key: values.round().clamp(-(2**15), 2**15 - 1).to(torch.int16) for key, values in flat.items()}


def concatenate(parts: Sequence[Arrays]) -> Arrays:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def draw(workspace: Workspace, what: Draw) -> Unit:
    """Draw with an adapter at each lambda of its form's grid, or at a few of them unless its training is complete."""

    def make() -> Unit:
        grid = find_grid(workspace, what.form, what.sampled).value["lambdas"]
        whole = what.step == workspace.study.steps and what.rate is None
        lambdas = [lam for lam in grid if lam] if whole else spaced_lambdas(grid, workspace.study.few)
        return draw_unit(workspace, what, lambdas)

    return Memo(workspace.work)(what.name, make)


def bench_of(workspace: Workspace, what: Draw) -> Bench:
    """Return the bench that draws with a form; its texts have no padding if the form reads none."""
    bench = workspace.bench(what.split)
    if FORMS[what.form].padding:
        return bench
    assert isinstance(bench.pipeline.text, TextEncoder)
    return replace(bench, pipeline=replace(bench.pipeline, text=WithoutPadding.of(bench.pipeline.text)))


def draw_unit(workspace: Workspace, what: Draw, lambdas: list[float]) -> Unit:
    """Draw at these lambdas. Nothing is drawn by an adapter whose training diverged."""
    value = {**asdict(what), "lambdas": lambdas}
    if what.rate is None:
        plan = plan_of(workspace, what.form, what.seed)
    elif try_rate(workspace, what.form, what.rate).value is None:
        return Unit(value, workspace.made)
    else:
        plan = workspace.study.plan(what.form, RATE_SEED, what.rate)
    adapter, bench = trained_adapter(workspace, what.form, plan, what.step), bench_of(workspace, what)
    return Unit(value, workspace.made, concatenate([_read(bench, adapter, what, lam) for lam in lambdas]))


def _read(bench: Bench, adapter: IPAdapter, what: Draw, lam: float) -> Arrays:
    scale: AdapterLambda = lam if what.layers == "all" else Lambda(lam, what.layers)
    scale = adapter.mu if isinstance(adapter, MixedAdapter) else scale
    drawings = bench.draw(what.task, adapter, what.fuse, scale)
    return quantise(bench.read(what.task, drawings))


def alone(workspace: Workspace, task: str, split: str) -> Unit:
    """Draw a task at lambda 0: the text alone, which is the same for all forms."""

    def make() -> Unit:
        bench = workspace.bench(split)
        arrays = quantise(bench.read(task, bench.draw(task)))
        return Unit({"task": task, "split": split, "lambdas": [0.0]}, workspace.made, arrays)

    return Memo(workspace.work)(alone_name(task, split), make)


def references(workspace: Workspace) -> Unit:
    """Read the image prompts themselves, and the image prompts through the VAE: the ceilings."""

    def make() -> Unit:
        bench = workspace.bench()
        pixels = bench.prompts.pixels
        parts = [quantise(bench.read("picture", x)) for x in (pixels, through_the_vae(bench.pipeline.vae, pixels))]
        return Unit({"task": "picture", "split": "test", "references": ["truth", "vae"]}, workspace.made, concatenate(parts))

    return Memo(workspace.work)("references", make)


def find_grid(workspace: Workspace, form: str, sampled: str = "") -> Unit:
    """Find the lambdas of a form by bisection, with seed 0 on the validation prompts of the first task. `sampled`: as in `Draw`."""

    def make() -> Unit:
        bench, steps = workspace.bench("validation"), workspace.study.steps
        adapter = trained_adapter(workspace, form, plan_of(workspace, form, 0), steps)
        what = Draw(form, 0, steps, bench.prompts.tasks[0], "validation", sampled=sampled)
        truth, parts = bench.prompts.to_json().get("truth"), dict[float, Arrays]()

        def follow(lam: float) -> float:
            if lam == 0:
                parts[lam] = quantise(bench.read(what.task, bench.draw(what.task)))
            else:
                parts[lam] = _read(bench_of(workspace, what), adapter, what, lam)
            return float(follows(what.task, parts[lam], truth, parts[0.0]).mean())

        grid = bisect_lambdas(follow, FORMS[sampled or form].scale)
        value = {**asdict(what), "lambdas": list(grid), "following": list(grid.values())}
        return Unit(value, workspace.made, concatenate([parts[lam] for lam in grid]))

    return Memo(workspace.work)(grid_name(form, sampled), make)


def train_run(workspace: Workspace, form: str, seed: int) -> Unit:
    """Train a counted adapter; return its size and its held-out losses."""
    plan = plan_of(workspace, form, seed)
    train(workspace, form, plan, workspace.study.checkpoints)

    def make() -> Unit:
        card = workspace.card(plan, workspace.study.steps)
        value = {key: card[key] for key in ("parameters", "losses")} | {"form": form, "seed": seed, "rate": plan.lr}
        return Unit(value, {key: card[key] for key in workspace.made})

    return Memo(workspace.work)(training_name(form, seed), make)
