"""Random numbers that depend only on a seed, a step, and the position in its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Share(NamedTuple):
    """Part number `part` of a batch that is split into `of` equal parts, in order."""

    part: int = 0
    of: int = 1

    def rows(self, n: int) -> slice:
        """Return the rows of this part in a batch of n. Raises ValueError if n rows cannot be split equally."""
        if n % self.of:
            raise ValueError(f"a batch of {n} cannot be split into {self.of} equal parts")
        return slice(self.part * n // self.of, (self.part + 1) * n // self.of)


WHOLE = Share()


class ShareGenerator(torch.Generator):
    """The generator of a whole batch, in a process that computes a share of it. `draw` reads `share`."""

    share = WHOLE


def hash_step(seed: int, step: int) -> int:
    """Hash seed and step to 32 bits, since torch's CPU generator reads no more."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def generator(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """Return the generator of one step. Its numbers depend on the kind of device too."""
    return torch.Generator(device).manual_seed(hash_step(seed, step))


def share_generator(seed: int, share: Share, device: torch.device) -> ShareGenerator:
    """Return the generator with this seed for a share of a batch."""
    g = ShareGenerator(device)
    g.manual_seed(seed)
    g.share = share
    return g


def draw(make: Callable[[int], Tensor], n: int, g: torch.Generator) -> Tensor:
    """Draw random numbers `n ...` for n pictures. `make(n)` draws from `g`.

    If the pictures are a share of a batch, draw for the whole batch and return their rows. So the numbers of a picture depend on its
    position in the batch, and not on how many processes share the batch.
    """
    share = g.share if isinstance(g, ShareGenerator) else WHOLE
    return make(n * share.of)[share.rows(n * share.of)]


def draw_normal(like: Tensor, g: torch.Generator) -> Tensor:
    """Draw N(0, I) in the shape of `like`, `n ...`, on the generator's device, as `draw` does."""
    return draw(lambda n: torch.randn(n, *like.shape[1:], generator=g, device=g.device), len(like), g)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and restore it afterwards.

    Build a module inside the block: its initial weights then depend only on `seed`. Seeding earlier is not enough, since loading
    files and starting a DataLoader also draw from the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
