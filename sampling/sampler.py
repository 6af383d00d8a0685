"""What the samplers share: the denoiser, the steps that they take, the state after each step, and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampling.schedule import Schedule

Denoiser = Callable[[Tensor, int], Tensor]
Enter = Callable[[int, float, Tensor], Tensor]  # (index, a_t, x): the latents with which that step begins


class Step(NamedTuple):
    """One step: the timestep t that the network reads, a_t, and `after`, the value of a at which the step ends."""

    t: int
    a: float
    after: float


@dataclass(frozen=True)
class State:
    """After a step: its index and timestep, the latents x_{t-1}, and the x_0 that the network saw in x_t."""

    index: int
    t: int
    x: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Sampler:
    """A sampler: which steps it takes of a schedule, and how it takes them. `noisy`: it also takes `eta` and `generators`."""

    name: str
    times: Callable[[Schedule, int], list[Step]]
    draw: Callable[..., Iterator[State]]
    noisy: bool = False

    def noise(self, eta: float, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """The arguments of `draw` that ask for noise. Raises ValueError for an eta that the sampler does not take."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 (DDIM) and 1 (DDPM), not {eta}")
        if eta and not self.noisy:
            raise ValueError(f"eta is DDIM's: {self.name} adds no noise, so leave it at 0, not {eta}")
        return {"eta": eta, "generators": generators} if self.noisy else {}


def randn(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
    """Normal noise `b ...`, picture i from its own CPU generator, so it does not depend on device or batch size."""
    noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
    return noise if like is None else noise.to(like)


def as_is(index: int, a: float, x: Tensor) -> Tensor:
    """Every step begins with what the one before it left."""
    return x
