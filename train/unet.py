"""Stage 3: the text-to-image base model.  `python -m train unet`

Eq. 1 with min-SNR weights (they only balance the timesteps; the paper's base model was given). One caption in ten is empty,
for classifier-free guidance. The EMA is what is kept.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.stable_diffusion import load_text_encoder, load_vae
from model.context import Context
from model.layers import ResBlock, SpatialTransformer
from model.unet import MINI, UNet
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule
from train import preview
from train.data import Pairs, world_pairs
from train.loop import Plan, card, generator, run
from train.loss import diffusion_loss, noise_for

PHASES = (
    Plan("unet", steps=2900, batch=32, lr=1e-3, ema=0.998, decay=0.45, validate_every=850),
    Plan("unet_longer", steps=5000, batch=32, lr=1e-3, ema=0.998, decay=0.35, bf16=True, validate_every=500, seed=10),
)
PICTURES, HELD_OUT, GAMMA, DROP = 24_000, 512, 5.0, 0.1


def initialise(unet: UNet) -> None:
    """Zeroes the last layer of every residual branch, and the output: each block starts as the identity (LDM's rule)."""
    for module in unet.modules():
        last = {ResBlock: "conv2", SpatialTransformer: "proj_out", UNet: "conv_out"}.get(type(module))
        if last:
            nn.init.zeros_(getattr(module, last).weight)
            nn.init.zeros_(getattr(module, last).bias)


def rows_of(pairs: Pairs, plan: Plan, step: int) -> Tensor:
    """Which pictures step `step` sees: every epoch is another permutation."""
    per_epoch = len(pairs) // plan.batch
    order = torch.randperm(len(pairs), generator=generator(plan.seed + 1, step // per_epoch))
    return order[step % per_epoch * plan.batch :][: plan.batch]


@torch.no_grad()
def held_out_loss(unet: UNet, schedule: Schedule, pairs: Pairs, seed: int = 1) -> float:
    """The unweighted loss on held-out pictures, at noise and timesteps that never change."""
    losses = []
    for i, rows in enumerate(torch.arange(len(pairs)).split(64)):
        g = generator(seed, i)
        x0 = pairs.latents(rows, g)
        t, eps = noise_for(x0, g)
        losses.append(diffusion_loss(unet, schedule, x0, Context(pairs.texts[pairs.caption[rows]].float()), t, eps))
    return float(torch.cat(losses).mean())


def train(folder: Path, weights: Path, phases: tuple[Plan, ...] = PHASES) -> None:
    torch.manual_seed(phases[0].seed)
    vae = load_vae(weights / "vae.safetensors")
    text = load_text_encoder(weights / "text_encoder.safetensors")
    pairs = world_pairs(vae, text, None, "train", PICTURES, folder)
    held_out = world_pairs(vae, text, None, "val", HELD_OUT, folder)
    unet, schedule = UNet(MINI), Schedule(prediction=MINI.prediction)
    initialise(unet)

    def loss(plan: Plan, step: int, g: torch.Generator) -> dict[str, Tensor]:
        rows = rows_of(pairs, plan, step)
        x0 = pairs.latents(rows, g)
        t, eps = noise_for(x0, g)
        caption = torch.where(torch.rand(len(rows), generator=g) < DROP, 0, pairs.caption[rows])
        each = diffusion_loss(unet, schedule, x0, Context(pairs.texts[caption].float()), t, eps, GAMMA)
        return {"loss": each.mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, UNet)
        preview.texts(Pipeline(module, vae, text, schedule), folder / "unet.png")
        return {"held_out": held_out_loss(module, schedule, held_out)}

    log: list[dict[str, Any]] = []
    for plan in phases:
        kept, rows = run(plan, unet, int, functools.partial(loss, plan), validate, folder, workers=0)
        unet.load_state_dict(kept.state_dict())
        log += rows
    cards.save(unet, weights / "unet.safetensors", card(phases, log, "python -m train unet"))
