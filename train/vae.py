"""Stage 1: the autoencoder.  `python -m train vae`

Loss: |x - x'|^2 + 0.5 |x - x'| + 2 |avg4(x - x')|^2 + beta KL(q(z|x) || N(0, 1)), means over pixels and latent values, beta = 2e-4.
Outlines dominate the first two terms, so the third, the error of 4 x 4 averages, is added for the colours. Every residual branch starts
at zero, and q(z|x) with a small standard deviation, so that colours pass through from the first steps. The scale is set to 1 / std of
the latents, as in latent diffusion (arXiv 2112.10752, appendix G).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.files import check_output
from model.attention import SelfAttention
from model.layers import ResBlock
from model.vae import MINI_VAE, VAE, VAEConfig
from train.card import WORLD_LICENCE, card
from train.data import ShuffledBatches
from train.encode import renderer
from train.fingerprint import significant
from train.loop import run
from train.plan import Plan
from train.pool import Pictures, pixels_of, to_unit
from train.randomness import seeded

PHASES = (
    Plan("vae", 60_000, 8, 2e-3, 1000, 0.8, weight_decay=0.0, betas=(0.9, 0.98), bf16=True, validate_every=6_000),
)
PICTURES, HELD_OUT = 60_000, 256
BETA, ABSOLUTE, AVERAGES = 2e-4, 0.5, 2.0
LOGVAR = -4.0  # initial log-variance of q(z|x): a standard deviation of 0.14


def initialise(vae: VAE) -> None:
    """Zero the last layer of every residual branch, and give q(z|x) a small standard deviation."""
    for module in vae.modules():
        last = module.conv2 if isinstance(module, ResBlock) else module.to_out if isinstance(module, SelfAttention) else None
        if last is not None:
            for tensor in last.parameters():
                nn.init.zeros_(tensor)
    with torch.no_grad():
        weight, bias = (tensor.chunk(2)[1] for tensor in vae.quant_conv.parameters())
        weight.zero_()
        bias.fill_(LOGVAR)


def bytes_to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    """Convert bytes `b h w 3` to `b 3 h w` in [-1, 1], channels last in memory."""
    return to_unit(torch.from_numpy(images).permute(0, 3, 1, 2))


def vae_loss(vae: VAE, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    mean, logvar = vae.moments(x)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator, device=mean.device)
    error = vae.decode(z * vae.config.scale).float() - x
    mse, coarse = error.square().mean(), F.avg_pool2d(error, 4).square().mean()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    loss = mse + ABSOLUTE * error.abs().mean() + AVERAGES * coarse + BETA * kl
    return {"loss": loss, "mse": mse, "coarse": coarse, "kl": kl}


@torch.no_grad()
def psnr(vae: VAE, x: Tensor) -> float:
    """Return 10 log10(1 / mse) for values in [0, 1], averaged over pictures; pictures are decoded from the mean of q(z|x)."""
    y = torch.cat([vae.decode(vae.encode(part)) for part in x.split(64)]).clamp(-1, 1)
    return float((10 * torch.log10(4 / (x - y).square().mean(dim=(1, 2, 3)))).mean())


@torch.no_grad()
def unit_scale(vae: VAE, batches: Iterable[Tensor]) -> float:
    """Return the factor, to four digits, that gives the latents of these pictures a standard deviation of 1."""
    std = torch.cat([vae.encode(x) for x in batches]).std()
    return significant(vae.config.scale / float(std))


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train vae",
    config: VAEConfig = MINI_VAE,
    pictures: int = PICTURES,
) -> None:
    """Train the VAE on the first `pictures` pictures of the mini world; write vae.safetensors to the folder `weights`."""
    check_output(weights / "vae.safetensors")
    device = phases[0].device
    with seeded(phases[0].seed):
        vae = VAE(config)
    initialise(vae.to(memory_format=torch.channels_last))
    vae.to(device)
    pool, held_out = Pictures(pixels_of("train", pictures, 0).to(device)), to_unit(pixels_of("val", HELD_OUT, 0)).to(device)
    log, made_from = list[dict[str, Any]](), {"pictures": f"{pictures}, {renderer()}"}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, VAE)
        return {"psnr": psnr(module, held_out)}

    for plan in phases:
        data, loss = ShuffledBatches(pool, plan.batch, plan.seed), functools.partial(vae_loss, vae)
        log += run(plan, vae, data, loss, validate, folder, 0, made_from=made_from)[1]
    some = torch.arange(min(1024, pictures)).split(64)
    vae.config = replace(config, scale=unit_scale(vae, map(pool.at, some)))
    cards.save(vae, weights / "vae.safetensors", card(phases, log, command, {"data": "the mini world"}, WORLD_LICENCE))
