"""What `python -m eval parity` compares: networks of ours and public ones, read from the same random weights at full size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.image_encoder import VIT_H

Network = Callable[..., Tensor]
Load = Callable[[Path, torch.dtype], Network]


@dataclass(frozen=True)
class Part:
    """A part of a base model.

    `peer(folder, dtype)` and `ours(folder, dtype)` load the public network and ours, as functions of the same inputs.
    `inputs(side, g)` draws these for latents of this side. Floating-point inputs are converted to the dtype of the networks.
    """

    peer: Load
    ours: Load
    inputs: Callable[[int, torch.Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Suite:
    """All parts of a base model. `write(folder)` writes their random weights, unless they exist already."""

    write: Callable[[Path], None]
    parts: dict[str, Part]


def pixels(_: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """Draw two pictures for an image encoder."""
    return (torch.randn(2, 3, VIT_H.image_size, VIT_H.image_size, generator=g),)
