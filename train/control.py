"""Structure control: a ControlNet that reads the outlines of a drawing.  `python -m train control`

It starts as a copy of the base's encoder half, and changes nothing until its zero convolutions have learned.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from model.context import Context
from model.controlnet import HINT, ControlNet
from model.unet import Residuals, UNet, UNetConfig
from train import structure
from train.loss import noise_for
from train.plan import Plan
from train.structure import PICTURES

PHASES = (Plan("controlnet", 3_000, 32, 1e-3, 100, 0.5, ema=0.998, bf16=True, validate_every=500),)


def build(unet: UNet, factor: int) -> ControlNet:
    """Build an untrained ControlNet for hints `factor` times as large as the latents; `factor` is a power of 2, at most 8."""
    return ControlNet.of(unet, HINT[: factor.bit_length()])


def steer(control: ControlNet, unet: UNetConfig, x: Tensor, t: Tensor, context: Context, hint: Tensor) -> Residuals:
    """Compute the residuals. The grey hint is repeated in three channels."""
    return control(x, t, context, hint.expand(-1, control.config.hint_channels, -1, -1))


KIND = structure.Kind("controlnet.safetensors", build, steer, noise_for, ControlNet.zero_convolutions, neutral=True)


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train control",
    pictures: int = PICTURES,
) -> None:
    """Train with the base in the folder `weights`; write controlnet.safetensors there."""
    structure.train(KIND, folder, weights, phases, command, pictures)
