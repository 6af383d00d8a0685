"""Stage 4: the adapter, by the paper's recipe.  `python -m train adapter`

Minimise Eq. 6 with a frozen base and AdamW (weight decay 0.01). Drop the text, the picture or both in 5 % of the samples each; a
dropped picture becomes a zero embedding. W'_k and W'_v start as copies of W_k and W_v. Only the projection and W'_k, W'_v are trained.

Not in the paper, for any base: gradients are clipped, AdamW's second beta is 0.99, and the average of the weights is what is written.

The mini world differs in four more points. The learning rate is larger, with a warm-up and a decay. The captions leave out more, as
captions on the web do. Min-SNR weights reduce gradient noise at timesteps where a picture carries no information. And the image prompt
shows the drawing at another size and place (`move_randomly`): an adapter trained on the same picture copies size and place too, against
the text.
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
from sampling.request import WEIGHTS
from train import checkpoint, preview, processes
from train.buckets import BucketPairs
from train.card import WORLD_LICENCE, card, check_free
from train.display import Display
from train.file_pairs import FilePairs
from train.gains import check_gates, held_out_losses, verdict
from train.loop import run
from train.loss import diffusion_loss, sample_inputs
from train.pairs import Batch
from train.plan import Plan, autocast
from train.randomness import seeded
from train.setting import SAYS, Setting, TrainingSource, data_identity, encode, prepare
from train.sharding import shard
from train.world import Says


@dataclass(frozen=True)
class Recipe(Plan):
    """A Plan that also sets what captions name (mini world only). Its batches grow at most twofold: adapters need many steps."""

    says: Says = SAYS

    def scale_batch(self, factor: int) -> Plan:
        return super().scale_batch(min(factor, 2))


PLAN = Recipe("ip_adapter", 8_000, 32, 2e-3, 500, 0.7, ema=0.999, bf16=True, validate_every=4_000)
PHASES = (PLAN,)
PAPER = replace(PLAN, lr=1e-4, warmup=0, decay=0.0)  # the paper's constant learning rate
NAMES = {"IP-Adapter": "ip_adapter", "IP-Adapter Plus": "ip_adapter_plus", "IP-Adapter Full": "ip_adapter_full"}


def phases_for(source: TrainingSource, world: tuple[Recipe, ...] = PHASES, mini: Recipe = PLAN) -> tuple[Recipe, ...]:
    """Return the mini world's phases, or one for a user's pictures: at the paper's learning rate, unless the base is the mini one."""
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
    display: Display | None = None,
) -> tuple[IPAdapter, list[dict[str, Any]]]:
    """Train an adapter. Return the adapter to keep (the EMA, if there is one) and the log.

    `watch` is called with the current adapter at every validation. With `until`, stop after that many steps of the plan.
    """
    unet, schedule, held_out = setting.pipeline.unet, setting.pipeline.schedule, setting.held_out

    def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        x = sample_inputs(batch, g, dropping=True, offset=setting.noise_offset)
        context = adapter(x.context(unet.config, fuse), x.image)
        return {"loss": diffusion_loss(unet, schedule, x.x0, context, x.t, x.eps, setting.gamma).mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, IPAdapter)
        watch(module)
        if held_out is None:
            return {}
        with autocast(plan):
            return held_out_losses(unet, module, schedule, held_out, fuse, plan.device, share_of(plan))

    form = f"{adapter.own_projections=}, fuse={fuse.__name__}, gamma={setting.gamma}"
    data, made_from = setting.pairs.batches(plan.batch, plan.seed), {**setting.made_from, "adapter": form}
    result, log = run(plan, adapter, data, loss, validate, folder, 0, until, made_from, display, setting.sharded)
    assert isinstance(result, IPAdapter)
    return result, log


def initial_adapter(setting: Setting, source: TrainingSource, seed: int) -> IPAdapter:
    """Load the adapter in `source.start`, or initialise one from `seed`. Raises ValueError if it is for another base or encoder."""
    pipeline = setting.pipeline
    if source.start is None:
        with seeded(seed):
            return setting.adapter()
    assert pipeline.image is not None
    adapter = load_adapter(source.start, pipeline.unet, pipeline.image.config)
    return adapter.train().requires_grad_(True).to(next(pipeline.unet.parameters()).device)


def begin(setting: Setting, source: TrainingSource, plan: Plan, seed: int) -> IPAdapter:
    """Return the adapter to train, checked on the base, which is now in its precision. Raises `GateError` when `check_gates` does."""
    pipeline, adapter = setting.pipeline, initial_adapter(setting, source, seed)
    pipeline.unet.to(source.base_dtype)
    with autocast(plan):
        check_gates(pipeline.unet, adapter, pipeline.schedule, setting.pairs, device=plan.device, most=min(4, share_of(plan)))
    return adapter


def share_of(plan: Plan) -> int:
    """Return the pictures that one process computes in a step."""
    return max(1, plan.batch // processes.team().size)


def provenance(setting: Setting, source: TrainingSource) -> dict[str, Any]:
    """Describe the data and the base for the card."""
    count = f"{len(setting.pairs)} pictures to train on, {len(setting.held_out or ())} held out"
    data = f"{source.data.resolve().name if source.data else 'the mini world'}: {count}"
    start = {} if source.start is None else {"from": source.start.name}
    return {"data": data, "base": source.base.resolve().name, **start, "made_from": setting.made_from}


@dataclass(frozen=True)
class Outcome:
    """The adapter file, and a sentence on whether the adapter learned."""

    file: Path
    verdict: str

    def __str__(self) -> str:
        return f"{self.file}: {self.verdict}"


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Recipe, ...] = PHASES,
    source: TrainingSource | None = None,
    command: str = "python -m train adapter",
    initialise: Callable[[Setting, IPAdapter], tuple[Plan, ...]] = lambda *_: (),
) -> Outcome:
    """Train all phases in order; write the adapter and its card to the folder `weights`.

    `initialise` prepares the adapter before training and returns the plans that it ran. Raises ValueError or OSError before any
    computation if the pictures, the base or the state in `folder` are unsuitable, or if the result cannot be written.
    """
    source = source or TrainingSource(base=weights)
    file = weights / f"{NAMES[source.kind]}.safetensors"
    check_output(file)

    def check(made_from: dict[str, Any]) -> None:
        state = folder / f"{phases[0].name}.pt"
        checkpoint.refuse_other(state, {**asdict(phases[0]), **made_from}, complete=False)
        if source.data is not None:
            check_free(file, made_from, phases, state)

    setting = prepare(source, folder, phases[0].device, phases[0].says, check)
    pipeline, plan = setting.pipeline, phases[-1]
    adapter = begin(setting, source, plan, phases[0].seed)
    initial_plans = initialise(setting, adapter)
    log = run_phases(setting, source, adapter, phases, folder)
    if first := processes.team().rank == 0:
        check(setting.made_from)
        licence = WORLD_LICENCE if source.data is None and source.start is None else None
        adapter_card = card((*initial_plans, *phases), log, command, provenance(setting, source), licence)
        save_adapter(adapter, pipeline.unet, file, adapter_card)
    if not first and not source.shard:
        return Outcome(file, "the first process writes it")
    if setting.held_out is None:
        return Outcome(file, "no pictures were held out, so the program cannot tell whether it learned")
    with autocast(plan):
        return Outcome(file, verdict(pipeline.unet, adapter, pipeline.schedule, setting.held_out, plan.device, share_of(plan)))


def run_phases(
    setting: Setting, source: TrainingSource, adapter: IPAdapter, phases: tuple[Recipe, ...], folder: Path
) -> list[dict[str, Any]]:
    """Train `adapter` in place, phase by phase. Return the log of the last phase."""
    pipeline, says, log = setting.pipeline, phases[0].says, list[dict[str, Any]]()
    if source.shard:
        shard(pipeline.unet)
        setting = replace(setting, sharded=True)

    def draw_preview(module: IPAdapter) -> None:
        if source.data is None:
            preview.draw_image_prompts(replace(pipeline, adapters=(module,)), folder / f"{phases[0].name}.png")

    data = setting.held_out or setting.pairs
    own = data.files if isinstance(data, FilePairs | BucketPairs) else None
    draw = preview.own_pictures(pipeline, own, lambda: autocast(phases[0])) if own else None
    display = Display(draw, source.preview_every, source.tensorboard)
    for phase in phases:
        if phase.says != says and source.data is None:
            says, sets = phase.says, source.picture_sets(None, 0, phase.says)
            pairs, held_out = encode(pipeline, sets, folder, source.reads)
            setting = replace(setting, pairs=pairs, held_out=held_out, made_from={**setting.made_from, **data_identity(sets)})
        result, log = fit(setting, adapter, phase, folder, watch=draw_preview, display=display)
        adapter.load_state_dict(result.state_dict())
    return log
