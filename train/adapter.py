"""Stage 4: the adapter, by the paper's recipe.  `python -m train adapter`

Eq. 6 on a frozen base: AdamW, weight decay 0.01, text / image / both dropped in 5 % of the pictures each (exclusive), a dropped
picture being a zero embedding, W'_k and W'_v started from W_k and W_v. Only the projection and W'_k, W'_v train. A user's pictures
are trained on just so. The mini world has hours where the paper had days, so there the captions say less, as those of the web do,
and min-SNR weights take the gradient's noise from timesteps where a picture can tell nothing. There Plus (`--fine`) begins as the
trained adapter, see `begin_as`.

The log answers "does it learn?": `gain_zero` is the held-out loss with a zero image minus that with the picture, `gain_shuffled`
with another picture's embedding minus that with its own. Before step 1 the gates of `check_gates` must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from checkpoints.adapters import load_adapter, save_adapter
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.context import Context
from model.image_projection import HEAD, ImageProjection, Projection, Resampler
from model.unet import UNet
from sampling.pipeline import Pipeline, load
from sampling.schedule import Schedule
from train import preview
from train.data import Pairs, captioned_files, file_pairs, world_pairs
from train.loop import Plan, autocast, card, generator, run
from train.loss import diffusion_loss, noise_for
from train.unet import HELD_OUT, PICTURES, rows_of


@dataclass(frozen=True)
class Recipe(Plan):
    """A Plan, and in the mini world the shares of captions that name the concept, and the background."""

    says: tuple[float, float] = 0.5, 0.5


PLAN = Recipe("ip_adapter", steps=5000, batch=32, lr=3e-3, ema=0.99, bf16=True, validate_every=1000)
LONGER = replace(PLAN, name="ip_adapter_longer", steps=2200, lr=2e-3, decay=0.7, seed=1, validate_every=1100)
# The text is to be believed where it speaks of the background, and the picture not to contradict it.
LAST = replace(LONGER, name="ip_adapter_last", steps=4000, seed=2, validate_every=1000, says=(0.5, 0.9))
PHASES = (PLAN, LONGER, LAST)
BEGIN = Plan("ip_adapter_plus_begin", steps=3000, batch=128, lr=2e-3, decay=0.7, validate_every=1000)
FINE = replace(LAST, name="ip_adapter_plus", steps=12000, lr=3e-4, seed=3)  # at 1e-3 a Resampler forgets what it knows
TOKENS, DROP = 4, 0.05
FINE_TOKENS, DEPTH = 16, 4  # of Plus; diffusers reads no other depth
MINI_DEPTH, GAMMA = 2, 1.0  # of Plus, and of min-SNR weights, in the mini world


def drops(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(drop the text, drop the image) for n pictures: image only, text only, both, 5 % each, by one uniform number."""
    r = torch.rand(n, generator=generator)
    image = (r < DROP) | ((r >= 2 * DROP) & (r < 3 * DROP))
    text = (r >= DROP) & (r < 3 * DROP)
    return text, image


@dataclass(frozen=True)
class Batch:
    """Latents x_0, timesteps, noise, text tokens c_t, and what the adapter reads of the pictures."""

    x0: Tensor
    t: Tensor
    eps: Tensor
    text: Tensor
    image: Tensor


def images_of(pairs: Pairs, rows: Tensor, drop: Tensor) -> Tensor:
    """What the adapter reads of these rows' pictures, and of no picture where `drop` is true."""
    assert pairs.images is not None and pairs.null is not None
    dropped = drop.view(-1, *[1] * pairs.null.ndim)
    return torch.where(dropped, pairs.null.float(), pairs.images[rows].float())


def batch_of(pairs: Pairs, rows: Tensor, g: torch.Generator, device: str, dropping: bool = False) -> Batch:
    """These rows at a random timestep and noise; with `dropping` some lose their text, picture, or both."""
    x0 = pairs.latents(rows, g)
    t, eps = noise_for(x0, g)
    drop_text, drop_image = drops(len(rows), g) if dropping else (torch.zeros(len(rows), dtype=torch.bool),) * 2
    text = pairs.texts[torch.where(drop_text, 0, pairs.caption[rows])].float()
    image = images_of(pairs, rows, drop_image)
    return Batch(*(tensor.to(device) for tensor in (x0, t, eps, text, image)))


def held_out_losses(
    unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: Pairs, fuse: Fuse = decoupled, device: str = "cpu"
) -> dict[str, float]:
    """Unweighted losses at noise and timesteps that never change: with the picture, and what none or another adds."""
    assert pairs.null is not None
    sums = {"own": 0.0, "zero": 0.0, "shuffled": 0.0}
    with torch.no_grad():
        for i, rows in enumerate(torch.arange(len(pairs)).split(64)):
            batch = batch_of(pairs, rows, generator(1, i), device)
            others = {
                "own": batch.image,
                "zero": pairs.null.to(batch.image).expand_as(batch.image),
                "shuffled": batch.image.roll(1, dims=0),
            }
            for name, image in others.items():
                context = adapter(Context(batch.text, fuse=fuse), image)
                sums[name] += float(diffusion_loss(unet, schedule, batch.x0, context, batch.t, batch.eps).sum())
    own, zero, shuffled = (sums[name] / len(pairs) for name in ("own", "zero", "shuffled"))
    return {"held_out": own, "gain_zero": zero - own, "gain_shuffled": shuffled - own}


def check_gates(
    unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: Pairs, fuse: Fuse = decoupled, device: str = "cpu"
) -> None:
    """Raises RuntimeError unless scale 0 is the base bit for bit, every trainable tensor gets a gradient, no frozen one."""
    batch = batch_of(pairs, torch.arange(min(4, len(pairs))), generator(0, 0), device)
    text = Context(batch.text, fuse=fuse)
    with torch.no_grad():
        if not torch.equal(unet(batch.x0, batch.t, text), unet(batch.x0, batch.t, adapter(text, batch.image, 0.0))):
            raise RuntimeError("at scale 0 the adapter changes the base model")
    diffusion_loss(unet, schedule, batch.x0, adapter(text, batch.image), batch.t, batch.eps).mean().backward()
    silent = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    moved = [name for name, p in unet.named_parameters() if p.grad is not None]
    adapter.zero_grad(set_to_none=True)
    if silent:
        raise RuntimeError(f"no gradient reaches these tensors of the adapter: {', '.join(silent)}")
    if moved:
        raise RuntimeError(f"gradients reach the frozen base: {', '.join(moved)}")


@dataclass(frozen=True)
class Source:
    """What to train on: the mini world, or with `data` a user's pictures; at which size and precision the base runs.

    With `fine` the adapter is Plus (Figure 11), which reads the encoder's fine features.
    """

    base: Path = Path("weights")
    image_encoder: Path | None = None
    fine: bool = False
    pictures: int = PICTURES  # of the mini world
    data: Path | None = None
    side: int | None = None
    base_dtype: torch.dtype = torch.float32
    checkpointing: bool = False


def load_pairs(pipeline: Pipeline, source: Source, folder: Path, says: tuple[float, float]) -> tuple[Pairs, Pairs]:
    """Pictures to train on, and held-out ones; `says` as in `Recipe`. Of a user's pictures every 50th is held out."""
    if pipeline.image is None:
        raise ValueError(f"{source.base} has no image encoder: name one with --image-encoder")
    parts = pipeline.vae, pipeline.text, pipeline.image
    if source.data is None:
        held_out = min(HELD_OUT, source.pictures)
        return (
            world_pairs(*parts, "train", source.pictures, folder, says, source.fine),
            world_pairs(*parts, "val", held_out, folder, says, source.fine),
        )
    files, side = captioned_files(source.data), source.side or pipeline.native_size[0]
    kept = [f for i, f in enumerate(files) if i % 50] or files
    return (
        file_pairs(*parts, kept, side, folder, source.fine),
        file_pairs(*parts, files[::50], side, folder, source.fine),
    )


@dataclass(frozen=True)
class Setting:
    """What adapters of one experiment share: the frozen base, its pictures, and the held-out ones."""

    pipeline: Pipeline
    pairs: Pairs
    held_out: Pairs
    gamma: float | None = None  # of min-SNR weights; the paper has none
    depth: int = DEPTH  # of Plus

    def adapter(self, own_projections: bool = True, tokens: int | None = None) -> IPAdapter:
        """An untrained adapter for this base and encoder, on the base's device. For fine features it is Plus, with 16 tokens."""
        assert self.pairs.images is not None
        unet, seen = self.pipeline.unet, self.pairs.images.shape[-1]
        width = unet.config.context_dim
        if self.pairs.images.ndim == 3:
            heads = max(1, width // HEAD)
            projection: Projection = Resampler(seen, width, tokens or FINE_TOKENS, width, self.depth, heads)
        else:
            projection = ImageProjection(seen, width, tokens or TOKENS)
        return IPAdapter(unet, projection, own_projections).to(next(unet.parameters()).device)


def prepare(source: Source, folder: Path, device: str = "cpu", says: tuple[float, float] = PLAN.says) -> Setting:
    """Loads the base and computes, or finds in `folder`, what the adapter reads."""
    pipeline = load(source.base, (), source.image_encoder, device=device)
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ValueError(
            f"{source.base} is a model for inpainting: train on the ordinary one, whose adapters it can use"
        )
    setting = Setting(pipeline, *load_pairs(pipeline, source, folder, says))
    if source.data is None:
        setting = replace(setting, gamma=GAMMA, depth=MINI_DEPTH)
    pipeline.unet.checkpointing = source.checkpointing
    return setting


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
    unet, schedule, pairs = setting.pipeline.unet, setting.pipeline.schedule, setting.pairs

    def loss(step: int, g: torch.Generator) -> dict[str, Tensor]:
        batch = batch_of(pairs, rows_of(pairs, plan, step), g, plan.device, dropping=True)
        context = adapter(Context(batch.text, fuse=fuse), batch.image)
        each = diffusion_loss(unet, schedule, batch.x0, context, batch.t, batch.eps, setting.gamma)
        return {"loss": each.mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, IPAdapter)
        watch(module)
        with autocast(plan):
            return held_out_losses(unet, module, schedule, setting.held_out, fuse, plan.device)

    kept, log = run(plan, adapter, lambda step: step, loss, validate, folder, 0, until)
    assert isinstance(kept, IPAdapter)
    return kept, log


def begin_as(
    known: IPAdapter,
    adapter: IPAdapter,
    plan: Plan,
    embeddings: tuple[Pairs, Pairs],
    features: tuple[Pairs, Pairs],
    folder: Path,
) -> None:
    """Plus begins as a trained adapter of the base form: W'_k and W'_v are copied, its tokens fitted by least squares.

    Token j of N learns to be `known`'s token j mod n. A softmax over n keys, and one over N / n copies of each, give the same Z:
    Plus then draws what `known` draws, and Eq. 6 goes on from there. (A fresh Resampler learns slowly from Eq. 6, whose
    gradient is mostly noise.) `embeddings` and `features`: of the same pictures, to learn from and held out. The log has
    `explained`, the share of the held-out tokens' variance that is fitted.
    """
    adapter.to_k.load_state_dict(known.to_k.state_dict())
    adapter.to_v.load_state_dict(known.to_v.state_dict())
    copies = adapter.image_projection.tokens // known.image_projection.tokens

    def tokens(split: int, rows: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            goal = known.tokens(images_of(embeddings[split], rows, drop).to(plan.device))
        own = adapter.tokens(images_of(features[split], rows, drop).to(plan.device))
        return own, repeat(goal, "b n c -> b (r n) c", r=copies)

    def loss(step: int, g: torch.Generator) -> dict[str, Tensor]:
        rows = rows_of(features[0], plan, step)
        return {"loss": F.mse_loss(*tokens(0, rows, drops(len(rows), g)[1]))}

    def validate(_: nn.Module) -> dict[str, float]:
        rows = torch.arange(len(features[1]))
        with torch.no_grad():
            own, goal = tokens(1, rows, torch.zeros(len(rows), dtype=torch.bool))
        return {"explained": 1 - float(F.mse_loss(own, goal) / goal.var(dim=0, correction=0).mean())}

    run(plan, adapter.image_projection, lambda step: step, loss, validate, folder, 0)


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Recipe, ...] = PHASES,
    source: Source | None = None,
    begin: Plan | None = None,
) -> None:
    """All phases, one after the other. With `begin`, Plus begins as the base folder's trained adapter (`begin_as`).

    Raises FileNotFoundError, naming the command that makes it, when that is missing.
    """
    plan, source = phases[0], source or Source(base=weights)
    start = source.base / "ip_adapter.safetensors"
    if begin and not start.exists():
        raise FileNotFoundError(f"{start} is not there, which Plus begins as; `python -m train adapter` trains it")
    torch.manual_seed(plan.seed)
    says, setting = plan.says, prepare(source, folder, plan.device, plan.says)
    pipeline, adapter = setting.pipeline, setting.adapter()
    check_gates(pipeline.unet, adapter, pipeline.schedule, setting.held_out, device=plan.device)
    if begin:
        known = load_adapter(start, pipeline.unet).to(plan.device)
        embeddings = load_pairs(pipeline, replace(source, fine=False), folder, says)
        begin_as(known, adapter, begin, embeddings, (setting.pairs, setting.held_out), folder)
    pipeline.unet.to(source.base_dtype)

    def sheet(module: IPAdapter) -> None:
        if source.data is None:
            preview.prompts(replace(pipeline, adapters=(module,)), folder / f"{plan.name}.png")

    for phase in phases:
        if phase.says != says:
            says, (pairs, held_out) = phase.says, load_pairs(pipeline, source, folder, phase.says)
            setting = replace(setting, pairs=pairs, held_out=held_out)
        kept, log = fit(setting, adapter, phase, folder, watch=sheet)
        adapter.load_state_dict(kept.state_dict())
    file, command = weights / "ip_adapter.safetensors", "python -m train adapter"
    if source.fine:
        file, command = weights / "ip_adapter_plus.safetensors", command + " --fine"
    settings = (begin, *phases) if begin else phases
    save_adapter(adapter, pipeline.unet, file, card(settings, log, command))
