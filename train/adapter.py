"""Stage 4: the adapter, by the paper's recipe.  `python -m train adapter`

Eq. 6 on a frozen base: AdamW, weight decay 0.01, text / image / both dropped in 5 % of the pictures each (exclusive), a dropped
picture being a zero embedding, W'_k and W'_v started from W_k and W_v. Only the projection and W'_k, W'_v train. A user's
pictures are trained on in the same way. The mini world has hours where the paper had days, so there the captions say less, as
those of the web do, and min-SNR weights reduce the noise of the gradient at timesteps where a picture can tell nothing.

The log answers "does it learn?": `gain_zero` is the held-out loss with a zero image minus that with the picture, `gain_shuffled`
with another picture's embedding minus that with its own. Before step 1 the gates of `check_gates` must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.files import check_output
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.context import Context
from sampling.request import WEIGHTS
from train import checkpoint, preview
from train.card import WORLD_LICENCE, card, check_free
from train.data import Batch, Cached
from train.gains import check_gates, held_out_losses, verdict
from train.loop import Plan, autocast, run
from train.loss import diffusion_loss, noised
from train.randomness import seeded
from train.setting import SAYS, Setting, Source, encode, prepare, seen


@dataclass(frozen=True)
class Recipe(Plan):
    """A Plan, and in the mini world the shares of captions that name the concept, and the background."""

    says: tuple[float, float] = SAYS


PLAN = Recipe("ip_adapter", steps=5000, batch=32, lr=3e-3, ema=0.99, bf16=True, validate_every=1000)
LONGER = replace(PLAN, name="ip_adapter_longer", steps=2200, lr=2e-3, decay=0.7, seed=1, validate_every=1100)
# The last phase names the background more often, so that the adapter leaves it to the text.
LAST = replace(LONGER, name="ip_adapter_last", steps=4000, seed=2, validate_every=1000, says=(0.5, 0.9))
PHASES = (PLAN, LONGER, LAST)
PAPER = replace(PLAN, lr=1e-4, warmup=0, decay=0.0)  # the paper's rate, constant
NAMES = {"IP-Adapter": "ip_adapter", "IP-Adapter Plus": "ip_adapter_plus", "IP-Adapter Full": "ip_adapter_full"}


def phases_for(source: Source, world: tuple[Recipe, ...] = PHASES, mini: Recipe = PLAN) -> tuple[Recipe, ...]:
    """The mini world's phases; or one for a user's pictures, at the mini world's rate on the mini base, else at the paper's."""
    if source.data is None:
        return world
    own = source.base.resolve() == WEIGHTS.resolve()
    return (mini if own else replace(mini, lr=PAPER.lr, warmup=PAPER.warmup, decay=PAPER.decay),)


def fit(
    setting: Setting,
    adapter: IPAdapter,
    plan: Plan,
    folder: Path,
    fuse: Fuse = decoupled,
    watch: Callable[[IPAdapter], None] = lambda _: None,
    until: int | None = None,
) -> tuple[IPAdapter, list[dict[str, Any]]]:
    """Trains an adapter; returns what to keep and the log. `watch` sees what would be kept at every validation.

    With `until` it stops early, after that many of the plan's steps, and the next call goes on from there.
    """
    unet, schedule, held_out = setting.pipeline.unet, setting.pipeline.schedule, setting.held_out

    def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        x = noised(batch, g, plan.device, dropping=True)
        context = adapter(Context(x.text, fuse=fuse), x.image)
        return {"loss": diffusion_loss(unet, schedule, x.x0, context, x.t, x.eps, setting.gamma).mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, IPAdapter)
        watch(module)
        if held_out is None:
            return {}
        with autocast(plan):
            return held_out_losses(unet, module, schedule, held_out, fuse, plan.device)

    form = f"{adapter.own_projections=}, fuse={fuse.__name__}, gamma={setting.gamma}"
    data, made_from = Cached(setting.pairs, plan.batch, plan.seed), {**setting.made_from, "adapter": form}
    kept, log = run(plan, adapter, data, loss, validate, folder, 0, until, made_from)
    assert isinstance(kept, IPAdapter)
    return kept, log


def first(setting: Setting, source: Source, seed: int) -> IPAdapter:
    """What training starts from: the adapter in `source.start`, or an untrained one of this seed.

    Raises ValueError when that file is an adapter for another base or encoder.
    """
    pipeline = setting.pipeline
    if source.start is None:
        with seeded(seed):
            return setting.adapter()
    assert pipeline.image is not None
    widths = pipeline.image.config.output_dim, pipeline.image.config.fine_dim
    adapter = load_adapter(source.start, pipeline.unet, widths[0], fine_dim=widths[1])
    return adapter.train().requires_grad_(True).to(next(pipeline.unet.parameters()).device)


def about(setting: Setting, source: Source) -> dict[str, Any]:
    """What the card says of data and base."""
    held_out = len(setting.held_out) if setting.held_out else 0
    counted = f"{len(setting.pairs)} pictures to train on, {held_out} held out"
    data = f"{source.data.resolve().name if source.data else 'the mini world'}: {counted}"
    started = {} if source.start is None else {"from": source.start.name}
    return {"data": data, "base": source.base.resolve().name, **started, "made_from": setting.made_from}


@dataclass(frozen=True)
class Outcome:
    """What a training made: the file, and whether it learned, in a sentence."""

    file: Path
    learned: str

    def __str__(self) -> str:
        return f"{self.file}: {self.learned}"


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Recipe, ...] = PHASES,
    source: Source | None = None,
    command: str = "python -m train adapter",
    begin: Callable[[Setting, IPAdapter], tuple[Plan, ...]] = lambda *_: (),
) -> Outcome:
    """All phases, one after the other; writes the adapter and its card to the folder `weights`.

    `begin` prepares the untrained adapter, and returns the plans that it followed. Raises ValueError or OSError, before
    anything is computed, when the pictures, the base, the state in `folder` or the place of the result are not as they must be.
    """
    source = source or Source(base=weights)
    file = weights / f"{NAMES[source.kind]}.safetensors"
    check_output(file)

    def check(made_from: dict[str, Any]) -> None:
        state = folder / f"{phases[0].name}.pt"
        checkpoint.refuse_other(state, {**asdict(phases[0]), **made_from})
        if source.data is not None:
            check_free(file, made_from, phases, state)

    setting = prepare(source, folder, phases[0].device, phases[0].says, check)
    adapter = first(setting, source, phases[0].seed)
    pipeline, plan = setting.pipeline, phases[-1]
    check_gates(pipeline.unet, adapter, pipeline.schedule, setting.pairs, device=plan.device)
    begun = begin(setting, adapter)
    pipeline.unet.to(source.base_dtype)
    log = run_phases(setting, source, adapter, phases, folder)
    check(setting.made_from)
    licence = WORLD_LICENCE if source.data is None and source.start is None else None
    written = card((*begun, *phases), log, command, about(setting, source), licence)
    save_adapter(adapter, pipeline.unet, file, written)
    if setting.held_out is None:
        return Outcome(file, "no pictures were held out, so whether it learned was not measured")
    with autocast(plan):
        return Outcome(file, verdict(pipeline.unet, adapter, pipeline.schedule, setting.held_out, plan.device))


def run_phases(
    setting: Setting, source: Source, adapter: IPAdapter, phases: tuple[Recipe, ...], folder: Path
) -> list[dict[str, Any]]:
    """Trains `adapter` in place, phase by phase; returns the log of the last."""
    pipeline, says, log = setting.pipeline, phases[0].says, list[dict[str, Any]]()

    def sheet(module: IPAdapter) -> None:
        if source.data is None:
            preview.prompts(replace(pipeline, adapters=(module,)), folder / f"{phases[0].name}.png")

    for phase in phases:
        if phase.says != says and source.data is None:
            says, listed = phase.says, source.listed(None, 0, phase.says)
            pairs, held_out = encode(pipeline, listed, folder, source.fine)
            setting = replace(setting, pairs=pairs, held_out=held_out, made_from={**setting.made_from, **seen(listed)})
        kept, log = fit(setting, adapter, phase, folder, watch=sheet)
        adapter.load_state_dict(kept.state_dict())
    return log
