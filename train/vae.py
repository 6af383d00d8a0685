"""Stage 1: the autoencoder.  `python -m train vae`

Loss: |x - x'|^2 + 0.5 |x - x'| + A |avg4(x - x')|^2 + beta KL(q(z|x) || N(0, 1)), beta = 2e-4 a latent value. Outlines dominate the
first two terms, so after a first phase (A = 0) the squared error of 4 x 4 averages comes in, which is where the palette is; a
third trains the decoder alone, so that the latents stay as they are. The scale is set to 1 / std of the latents, as in latent
diffusion (arXiv 2112.10752, appendix G).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights_convert
from model.vae import MINI_VAE, VAE, VAEConfig
from train.loop import Plan, card, run
from train.world import Split, World, pictures

PHASES = (
    Plan("vae", 1800, 16, 3e-3, warmup=200, decay=0.6, bf16=True, weight_decay=0.0, betas=(0.9, 0.98)),
    Plan("vae_colour", 1000, 16, 2e-3, decay=0.9, bf16=True, weight_decay=0.0, betas=(0.9, 0.98)),
    Plan("vae_decoder", 1000, 16, 2e-3, decay=0.9, bf16=True, weight_decay=0.0, betas=(0.9, 0.98), seed=1),
)
BETA, AVERAGES = 2e-4, (0.0, 5.0, 2.0)


def to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    """`b h w 3` bytes to `b 3 h w` in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_of(split: Split, batch: int, step: int, first: int = 0) -> Tensor:
    world = World(split)
    return to_tensor(pictures([world[first + i] for i in range(step * batch, (step + 1) * batch)]))


def vae_loss(vae: VAE, averages: float, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    mean, logvar = vae.moments(x)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
    error = vae.decode(z * vae.config.scale).float() - x
    mse, coarse = error.square().mean(), F.avg_pool2d(error, 4).square().mean()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    loss = mse + 0.5 * error.abs().mean() + averages * coarse + BETA * kl
    return {"loss": loss, "mse": mse, "coarse": coarse, "kl": kl}


@torch.no_grad()
def psnr(vae: VAE, x: Tensor) -> float:
    """Mean over pictures of 10 log10(1 / mse) for values in [0, 1], through the mean of q(z|x)."""
    y = torch.cat([vae.decode(vae.encode(part)) for part in x.split(64)]).clamp(-1, 1)
    return float((10 * torch.log10(4 / (x - y).square().mean(dim=(1, 2, 3)))).mean())


def train(folder: Path, weights: Path, phases: tuple[Plan, ...] = PHASES, config: VAEConfig = MINI_VAE) -> None:
    torch.manual_seed(phases[0].seed)
    vae, held_out, log = VAE(config), batch_of("val", 256, 0), list[dict[str, Any]]()

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, VAE)
        return {"psnr": psnr(module, held_out)}

    for plan, averages in zip(phases, AVERAGES, strict=True):
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(plan is not phases[-1])
        batches = functools.partial(batch_of, "train", plan.batch, first=plan.seed * 1_000_000)
        log += run(plan, vae, batches, functools.partial(vae_loss, vae, averages), validate, folder)[1]
    with torch.no_grad():
        std = torch.cat([vae.encode(batch_of("train", 64, i)) for i in range(16)]).std()
    vae.config = replace(config, scale=config.scale / float(std))
    weights_convert.save(vae, weights / "vae.safetensors", card(phases, log, "python -m train vae"))
