"""Stage 4: the adapter, by the paper's recipe.  `python -m train adapter`

Eq. 6 on a frozen base: AdamW, weight decay 0.01, text / image / both dropped in 5 % of the pictures each (exclusive), a dropped
picture being a zero embedding, W'_k and W'_v started from W_k and W_v. Only the projection and W'_k, W'_v train.

The log answers "does it learn?": `gain_zero` is the held-out loss with a zero image minus that with the picture, `gain_shuffled`
with another picture's embedding minus that with its own. Before step 1 the gates of `check_gates` must hold.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import weights_convert
from model.adapter import IPAdapter
from model.attention import Context, Fuse, decoupled
from model.image_projection import ImageProjection
from model.unet import UNet
from sampling.schedule import Schedule
from train.data import Pairs, world_pairs
from train.loop import Plan, card, generator, run
from train.loss import diffusion_loss, noise_for
from train.unet import HELD_OUT, PICTURES, rows_of

PLAN = Plan("ip_adapter", steps=1500, batch=32, lr=2e-3, ema=0.99, validate_every=250)
TOKENS, DROP = 4, 0.05


def drops(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(drop the text, drop the image) for n pictures: image only, text only, both, 5 % each, by one uniform number."""
    r = torch.rand(n, generator=generator)
    image = (r < DROP) | ((r >= 2 * DROP) & (r < 3 * DROP))
    text = (r >= DROP) & (r < 3 * DROP)
    return text, image


def held_out_losses(
    unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: Pairs, fuse: Fuse = decoupled, seed: int = 1
) -> dict[str, float]:
    """Unweighted losses at noise and timesteps that never change: with the picture, and what a zero or another one adds."""
    assert pairs.images is not None
    sums = {"held_out": 0.0, "zero": 0.0, "shuffled": 0.0}
    with torch.no_grad():
        for i, rows in enumerate(torch.arange(len(pairs)).split(64)):
            g = generator(seed, i)
            x0 = pairs.latents(rows, g)
            t, eps = noise_for(x0, g)
            context = Context(pairs.texts[pairs.caption[rows]].float(), fuse=fuse)
            own = pairs.images[rows].float()
            for name, embedding in (
                ("held_out", own),
                ("zero", torch.zeros_like(own)),
                ("shuffled", own.roll(1, dims=0)),
            ):
                sums[name] += float(diffusion_loss(unet, schedule, x0, adapter(context, embedding), t, eps).sum())
    mean = {name: total / len(pairs) for name, total in sums.items()}
    return {
        "held_out": mean["held_out"],
        "gain_zero": mean["zero"] - mean["held_out"],
        "gain_shuffled": mean["shuffled"] - mean["held_out"],
    }


def check_gates(unet: UNet, adapter: IPAdapter, pairs: Pairs, fuse: Fuse = decoupled) -> None:
    """Raises RuntimeError unless scale 0 is the base bit for bit, every trainable tensor gets a gradient and no frozen one does."""
    assert pairs.images is not None
    rows, g = torch.arange(4), generator(0, 0)
    x0 = pairs.latents(rows, g)
    t, eps = noise_for(x0, g)
    context = Context(pairs.texts[pairs.caption[rows]].float(), fuse=fuse)
    with torch.no_grad():
        if not torch.equal(unet(x0, t, context), unet(x0, t, adapter(context, pairs.images[rows].float(), 0.0))):
            raise RuntimeError("at scale 0 the adapter changes the base model")
    diffusion_loss(unet, Schedule(), x0, adapter(context, pairs.images[rows].float()), t, eps).mean().backward()
    silent = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    moved = [name for name, p in unet.named_parameters() if p.grad is not None]
    adapter.zero_grad(set_to_none=True)
    if silent or moved:
        raise RuntimeError(
            f"no gradient reaches {silent} of the adapter" if silent else f"gradients reach the frozen {moved}"
        )


def train(folder: Path, weights: Path, plan: Plan = PLAN, own_projections: bool = True, fuse: Fuse = decoupled) -> None:
    torch.manual_seed(plan.seed)
    vae = weights_convert.load_vae(weights / "vae.safetensors")
    text = weights_convert.load_text_encoder(weights / "text_encoder.safetensors")
    image = weights_convert.load_image_encoder(weights / "image_encoder.safetensors")
    unet = weights_convert.load_unet(weights / "unet.safetensors")
    pairs = world_pairs(vae, text, image, "train", PICTURES, folder / "train.safetensors")
    held_out = world_pairs(vae, text, image, "val", HELD_OUT, folder / "val.safetensors")
    assert pairs.images is not None
    embeddings, schedule = pairs.images, Schedule(prediction=unet.config.prediction)
    adapter = IPAdapter(
        unet, ImageProjection(image.config.output_dim, unet.config.context_dim, TOKENS), own_projections
    )
    check_gates(unet, adapter, held_out, fuse)

    def loss(step: int, g: torch.Generator) -> dict[str, Tensor]:
        rows = rows_of(pairs, plan, step)
        x0 = pairs.latents(rows, g)
        t, eps = noise_for(x0, g)
        drop_text, drop_image = drops(len(rows), g)
        context = Context(pairs.texts[torch.where(drop_text, 0, pairs.caption[rows])].float(), fuse=fuse)
        embedding = embeddings[rows].float() * ~drop_image[:, None]
        return {"loss": diffusion_loss(unet, schedule, x0, adapter(context, embedding), t, eps).mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, IPAdapter)
        return held_out_losses(unet, module, schedule, held_out, fuse)

    kept, log = run(plan, adapter, lambda step: step, loss, validate, folder, workers=0)
    weights_convert.save(kept, weights / "ip_adapter.safetensors", card(plan, log, "python -m train adapter"))
