"""Stage 1: the autoencoder.  `python -m train vae`

Loss: mean (x - x')^2 + 0.5 |x - x'| + beta KL(q(z|x) || N(0, 1)), beta = 2e-4 a latent value. After training the scale is set
to 1 / std of the latents, as in latent diffusion (arXiv 2112.10752, appendix G).
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

PLAN = Plan("vae", steps=2400, batch=16, lr=3e-3, warmup=200, decay=0.6, bf16=True, weight_decay=0.0, betas=(0.9, 0.98))
BETA = 2e-4


def to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    """`b h w 3` bytes to `b 3 h w` in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_of(split: Split, batch: int, step: int) -> Tensor:
    world = World(split)
    return to_tensor(pictures([world[i] for i in range(step * batch, (step + 1) * batch)]))


def vae_loss(vae: VAE, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    mean, logvar = vae.moments(x)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
    y = vae.decode(z * vae.config.scale).float()
    mse, kl = F.mse_loss(y, x), 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    return {"loss": mse + 0.5 * F.l1_loss(y, x) + BETA * kl, "mse": mse.detach(), "kl": kl.detach()}


@torch.no_grad()
def psnr(vae: VAE, x: Tensor) -> float:
    """Mean over pictures of 10 log10(1 / mse) for values in [0, 1], through the mean of q(z|x)."""
    y = torch.cat([vae.decode(vae.encode(part)) for part in x.split(64)]).clamp(-1, 1)
    return float((10 * torch.log10(4 / (x - y).square().mean(dim=(1, 2, 3)))).mean())


def train(folder: Path, weights: Path, plan: Plan = PLAN, config: VAEConfig = MINI_VAE) -> None:
    torch.manual_seed(plan.seed)
    vae, held_out = VAE(config), batch_of("val", 256, 0)

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, VAE)
        return {"psnr": psnr(module, held_out)}

    _, log = run(
        plan, vae, functools.partial(batch_of, "train", plan.batch), functools.partial(vae_loss, vae), validate, folder
    )
    with torch.no_grad():
        std = torch.cat([vae.encode(batch_of("train", 64, i)) for i in range(16)]).std()
    vae.config = replace(config, scale=config.scale / float(std))
    weights_convert.save(vae, weights / "vae.safetensors", card(plan, log, "python -m train vae"))
