"""Stage 4: the adapter, by the paper's recipe.  `python -m train adapter`

Eq. 6 on a frozen base: AdamW, weight decay 0.01, text / image / both dropped in 5 % of the pictures each (exclusive), a dropped
picture being a zero embedding, W'_k and W'_v started from W_k and W_v. Only the projection and W'_k, W'_v train.

The log answers "does it learn?": `gain_zero` is the held-out loss with a zero image minus that with the picture, `gain_shuffled`
with another picture's embedding minus that with its own. Before step 1 the gates of `check_gates` must hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.adapter import IPAdapter
from model.attention import Context, Fuse, decoupled
from model.image_projection import ImageProjection
from model.unet import UNet
from sampling.pipeline import Pipeline, load
from sampling.schedule import Schedule
from train import preview
from train.data import Pairs, captioned_files, file_pairs, world_pairs
from train.loop import Plan, card, generator, run
from train.loss import diffusion_loss, noise_for
from train.unet import HELD_OUT, PICTURES, rows_of
from weights_convert import save_adapter

PLAN = Plan("ip_adapter", steps=2000, batch=32, lr=2e-3, ema=0.99, bf16=True, validate_every=500)
TOKENS, DROP = 4, 0.05


def drops(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(drop the text, drop the image) for n pictures: image only, text only, both, 5 % each, by one uniform number."""
    r = torch.rand(n, generator=generator)
    image = (r < DROP) | ((r >= 2 * DROP) & (r < 3 * DROP))
    text = (r >= DROP) & (r < 3 * DROP)
    return text, image


@dataclass(frozen=True)
class Batch:
    """Latents x_0, timesteps, noise, text tokens c_t, image embeddings."""

    x0: Tensor
    t: Tensor
    eps: Tensor
    text: Tensor
    image: Tensor


def batch_of(pairs: Pairs, rows: Tensor, g: torch.Generator, device: str, dropping: bool = False) -> Batch:
    """These rows at a random timestep and noise; with `dropping` some lose their text, picture, or both."""
    x0 = pairs.latents(rows, g)
    t, eps = noise_for(x0, g)
    drop_text, drop_image = drops(len(rows), g) if dropping else (torch.zeros(len(rows), dtype=torch.bool),) * 2
    text = pairs.texts[torch.where(drop_text, 0, pairs.caption[rows])].float()
    assert pairs.images is not None
    image = pairs.images[rows].float() * ~drop_image[:, None]
    return Batch(*(tensor.to(device) for tensor in (x0, t, eps, text, image)))


def held_out_losses(
    unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: Pairs, fuse: Fuse = decoupled, device: str = "cpu"
) -> dict[str, float]:
    """Unweighted losses at noise and timesteps that never change: with the picture, and what a zero or another adds."""
    sums = {"own": 0.0, "zero": 0.0, "shuffled": 0.0}
    with torch.no_grad():
        for i, rows in enumerate(torch.arange(len(pairs)).split(64)):
            batch = batch_of(pairs, rows, generator(1, i), device)
            others = {
                "own": batch.image,
                "zero": torch.zeros_like(batch.image),
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
    """What to train on: the mini world, or with `data` a user's pictures; at which size and precision the base runs."""

    base: Path = Path("weights")
    image_encoder: Path | None = None
    data: Path | None = None
    side: int | None = None
    base_dtype: torch.dtype = torch.float32
    checkpointing: bool = False


def load_pairs(pipeline: Pipeline, source: Source, folder: Path) -> tuple[Pairs, Pairs]:
    """Pictures to train on, and held-out ones. Of a user's pictures every 50th is held out."""
    if pipeline.image is None:
        raise ValueError(f"{source.base} has no image encoder: name one with --image-encoder")
    parts = pipeline.vae, pipeline.text, pipeline.image
    if source.data is None:
        return world_pairs(*parts, "train", PICTURES, folder), world_pairs(*parts, "val", HELD_OUT, folder)
    files, side = captioned_files(source.data), source.side or pipeline.native_size[0]
    kept = [f for i, f in enumerate(files) if i % 50] or files
    return file_pairs(*parts, kept, side, folder), file_pairs(*parts, files[::50], side, folder)


def train(
    folder: Path,
    weights: Path,
    plan: Plan = PLAN,
    source: Source | None = None,
    own_projections: bool = True,
    fuse: Fuse = decoupled,
) -> None:
    torch.manual_seed(plan.seed)
    source = source or Source(base=weights)
    pipeline = load(source.base, (), source.image_encoder, device=plan.device)
    unet, schedule = pipeline.unet, pipeline.schedule
    pairs, held_out = load_pairs(pipeline, source, folder)
    assert pairs.images is not None
    image_dim = pairs.images.shape[1]
    adapter = IPAdapter(unet, ImageProjection(image_dim, unet.config.context_dim, TOKENS), own_projections).to(
        plan.device
    )
    check_gates(unet, adapter, schedule, held_out, fuse, plan.device)
    unet.to(source.base_dtype).checkpointing = source.checkpointing

    def loss(step: int, g: torch.Generator) -> dict[str, Tensor]:
        batch = batch_of(pairs, rows_of(pairs, plan, step), g, plan.device, dropping=True)
        context = adapter(Context(batch.text, fuse=fuse), batch.image)
        return {"loss": diffusion_loss(unet, schedule, batch.x0, context, batch.t, batch.eps).mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, IPAdapter)
        if source.data is None:
            preview.prompts(replace(pipeline, adapters=(module,)), folder / f"{plan.name}.png")
        with torch.autocast(plan.device.split(":")[0], torch.bfloat16, enabled=plan.bf16):
            return held_out_losses(unet, module, schedule, held_out, fuse, plan.device)

    kept, log = run(plan, adapter, lambda step: step, loss, validate, folder, workers=0)
    assert isinstance(kept, IPAdapter)
    save_adapter(kept, unet, weights / "ip_adapter.safetensors", card((plan,), log, "python -m train adapter"))
