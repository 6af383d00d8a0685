"""Random numbers that depend only on a seed and a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def hashed(seed: int, step: int) -> int:
    """Hash seed and step to 32 bits, since torch's CPU generator reads no more."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def generator(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """Return the generator of one step. Its numbers depend on the kind of device too."""
    return torch.Generator(device).manual_seed(hashed(seed, step))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and restore it afterwards.

    Build a module inside the block: its initial weights then depend only on `seed`. Seeding earlier is not enough, since loading
    files and starting a DataLoader also draw from the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
