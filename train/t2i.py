"""Structure control: a T2I-Adapter that reads the outlines of a drawing.  `python -m train t2i`

Structure is decided in the early steps, so timesteps near T are drawn more often (arXiv 2302.08453, section 3.4).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.context import Context
from model.t2i import T2IAdapter, T2IConfig, residuals
from model.unet import Residuals, UNet, UNetConfig
from train import structure
from train.plan import Plan
from train.structure import PICTURES

PHASES = (Plan("t2i", 2_000, 32, 1e-3, 100, 0.5, ema=0.998, bf16=True, validate_every=500),)


def build(unet: UNet, factor: int) -> T2IAdapter:
    """Build an untrained T2I-Adapter of the full form, for grey hints `factor` times as large as the latents."""
    return T2IAdapter(T2IConfig(unet.config.channels, hint_channels=1, unshuffle=factor))


def steer(control: T2IAdapter, unet: UNetConfig, x: Tensor, t: Tensor, context: Context, hint: Tensor) -> Residuals:
    """Compute the residuals, which depend only on the hint."""
    return residuals(control(hint), unet)


def early_noise(x0: Tensor, generator: torch.Generator, timesteps: int = 1000) -> tuple[Tensor, Tensor]:
    """Draw (t, eps): t = (1 - u^3) T with u uniform in [0, 1), rounded down and below T; eps ~ N(0, I)."""
    device = generator.device
    u = torch.rand(len(x0), generator=generator, device=device)
    t = ((1 - u**3) * timesteps).long().clamp(max=timesteps - 1)
    return t, torch.randn(x0.shape, generator=generator, device=device)


def all_tensors(control: T2IAdapter) -> list[torch.nn.Parameter]:
    """Return all parameters: each of them has a gradient in the first step."""
    return list(control.parameters())


KIND = structure.Kind("t2i.safetensors", build, steer, early_noise, all_tensors, neutral=False)


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train t2i",
    pictures: int = PICTURES,
) -> None:
    """Train with the base in the folder `weights`; write t2i.safetensors there."""
    structure.train(KIND, folder, weights, phases, command, pictures)
