"""Make scenes and pictures of the mini world, in parallel on all cores, and cache them in memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from train.data import OnTheFly, stream
from train.world import SAYS, Says, Scene, Split, Style, World, pictures, render

T = TypeVar("T")
PART = 100  # number of scenes that a worker makes at once
ALONE = 1000  # fewer scenes than this are made without workers


def in_parts(make: Callable[[range], T], count: int, first: int, name: str) -> list[T]:
    """Call make(range) in parallel, for ranges of `PART` indices that cover first .. first + count - 1. Return the results in order."""
    parts = [range(i, min(i + PART, first + count)) for i in range(first, first + count, PART)]
    workers = 0 if count < ALONE else os.cpu_count() or 0
    results = stream(OnTheFly(lambda i: make(parts[i])), range(len(parts)), workers)
    return list(tqdm(results, desc=name, total=len(parts), disable=not workers))


@functools.lru_cache(maxsize=16)
def scenes_of(split: Split, count: int, first: int, says: Says = SAYS) -> list[Scene]:
    """Return the scenes first .. first + count - 1 of a split."""
    world = World(split, says)
    parts = in_parts(lambda indices: [world[i] for i in indices], count, first, f"{count} scenes of {split}")
    return [scene for part in parts for scene in part]


@functools.lru_cache(maxsize=16)
def pixels_of(split: Split, count: int, first: int, style: Style = render) -> Tensor:
    """Render the scenes first .. first + count - 1 of a split, `n 3 64 64`, bytes, channels last in memory."""
    world = World(split)
    parts = in_parts(
        lambda indices: torch.from_numpy(pictures([world[i] for i in indices], style)), count, first, f"{count} pictures of {split}"
    )
    return torch.cat(parts).permute(0, 3, 1, 2)


def to_unit(pixels: Tensor) -> Tensor:
    """Convert bytes to [-1, 1]."""
    return pixels.float() / 127.5 - 1


@dataclass(frozen=True)
class Pictures:
    """A pool of pictures `n 3 h w`, stored as bytes. Batches are in [-1, 1], channels last in memory."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, rows: Tensor) -> Tensor:
        return to_unit(self.pixels[rows.to(self.pixels.device)]).contiguous(memory_format=torch.channels_last)
