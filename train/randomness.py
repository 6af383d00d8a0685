"""Random numbers that depend on a seed and a step, and on nothing that ran before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step. (torch's CPU generator reads 32 bits of a seed, so the two are hashed into them.)"""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generator, which initialises modules, and puts it back afterwards.

    Build a module inside: its first weights then depend on `seed` alone. Loading files and starting a DataLoader draw from
    the global generator, so a seed that is set earlier depends on what was cached.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
