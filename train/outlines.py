"""Outlines of the mini world's drawings, white on black: the hints for structure control."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.colour import to_bytes
from train.drawings import layers
from train.pairs import Batch, Pairs
from train.pool import in_parts
from train.world import CONCEPT_NAMES, CONCEPTS, SIZE, Scene, Split, World, paste


def outline(scene: Scene) -> NDArray[np.uint8]:
    """Compute the share of black lines in each pixel of a scene, `64 64`: the part that neither fills nor background cover."""
    fills, _, transparency = layers(CONCEPTS[CONCEPT_NAMES[scene.concept]][scene.drawing], scene.size)
    lines = paste(scene, 1 - transparency - fills.sum(axis=0), np.zeros((SIZE, SIZE, 1)))
    return to_bytes(lines[..., 0])


@functools.lru_cache(maxsize=4)
def outlines_of(split: Split, count: int) -> Tensor:
    """Compute the outlines of the first `count` scenes of a split, `n 1 64 64`, bytes."""
    world = World(split)

    def make(indices: range) -> Tensor:
        return torch.from_numpy(np.stack([outline(world[i]) for i in indices]))

    return torch.cat(in_parts(make, count, 0, f"{count} outlines of {split}"))[:, None]


@dataclass(frozen=True)
class HintedBatch:
    """Encoded pairs and their hints, `b 1 H W` in [0, 1]."""

    pairs: Batch
    hint: Tensor


@dataclass(frozen=True)
class HintedPairs:
    """A pool of encoded pairs and their hints, `n 1 H W`, bytes, on the same device."""

    pairs: Pairs
    hints: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def at(self, rows: Tensor) -> HintedBatch:
        """Return the pairs and hints at `rows`."""
        return HintedBatch(self.pairs.at(rows), self.hints[rows.to(self.hints.device)].float() / 255)

    def parts(self, size: int = 64) -> Iterator[HintedBatch]:
        """Yield all pairs and hints in order, in parts of nearly equal length, at most `size`."""
        for rows in torch.arange(len(self)).tensor_split(-(-len(self) // size)):
            yield self.at(rows)
