"""Types and functions that all samplers share: the denoiser, the steps, the state after each step, and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampling.fields import check_eta
from sampling.schedule import Schedule

Denoiser = Callable[[Tensor, float], Tensor]
BeginStep = Callable[[int, float, Tensor], Tensor]  # (index, a_t, x) -> the latents at which this step starts


class Step(NamedTuple):
    """One step: the timestep t that the network reads, a_t, and `a_prev`, the value of a at the end of the step."""

    t: float
    a: float
    a_prev: float


@dataclass(frozen=True)
class State:
    """The state after a step: its index and timestep, the latents x_{t-1}, and the x_0 that the network predicted from x_t."""

    index: int
    t: float
    x: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Sampler:
    """A sampler: `times` chooses the steps on a schedule, and `draw` runs them.

    `peer`: the class of diffusers that it equals. `takes`: which of `eta` and `generators` `draw` takes.
    """

    name: str
    times: Callable[[Schedule, int], list[Step]]
    draw: Callable[..., Iterator[State]]
    peer: str
    takes: tuple[str, ...] = ()

    def noise(self, eta: float, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """Return the arguments of `draw` that control its noise. Raises ValueError if the sampler does not support this eta."""
        check_eta(eta, self.name, "eta" in self.takes)
        return {name: value for name, value in {"eta": eta, "generators": generators}.items() if name in self.takes}


def randn(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
    """Draw N(0, 1) noise `b ...`. Each picture has its own CPU generator, so its noise depends on neither device nor batch size.

    The result has the dtype and device of `like`, if it is given.
    """
    noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
    return noise if like is None else noise.to(like)


def as_is(index: int, a: float, x: Tensor) -> Tensor:
    """Return the latents unchanged."""
    return x
