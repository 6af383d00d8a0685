"""DDIM (arXiv 2010.02502): a generator over a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from sampling.schedule import Schedule

Denoiser = Callable[[Tensor, int], Tensor]
Enter = Callable[[int, float, Tensor], Tensor]  # (index, a_t, x): the latents with which that step begins
Sampler = Callable[..., Iterator["State"]]  # `ddim`, or another function of its shape


@dataclass(frozen=True)
class State:
    """After a step: its index and timestep, the latents x_{t-1}, and the x_0 that the network saw in x_t."""

    index: int
    t: int
    x: Tensor
    x0: Tensor


def randn(shape: Sequence[int], generators: Sequence[torch.Generator], like: Tensor | None = None) -> Tensor:
    """Normal noise `b ...`, picture i from its own CPU generator, so it does not depend on device or batch size."""
    noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
    return noise if like is None else noise.to(like)


def as_is(index: int, a: float, x: Tensor) -> Tensor:
    """Every step begins with what the one before it left."""
    return x


def ddim(
    model: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] = (),
    start: int = 0,
    enter: Enter = as_is,
) -> Iterator[State]:
    """Eq. 12: x_{t-1} = sqrt(a_prev) x_0 + sqrt(1 - a_prev - s^2) eps + s z,  with s of Eq. 16:
    s = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev).  eta = 0 is deterministic, eta = 1 is DDPM.

    `model(x, t)` is the prediction that `schedule.prediction` names; `x` starts as N(0, 1) noise. Matches diffusers'
    `DDIMScheduler` without clipping. With eta > 0, `generators` holds one for each picture. The first `start` steps are
    left out; `enter` may change x before each step.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (DDIM) and 1 (DDPM), not {eta}")
    for index, (t, a, a_prev) in islice(enumerate(schedule.pairs(steps)), start, None):
        x = enter(index, a, x)
        eps, x0 = schedule.split(x, model(x, t), a)
        s = eta * ((1 - a_prev) / (1 - a)) ** 0.5 * (1 - a / a_prev) ** 0.5
        x = a_prev**0.5 * x0 + (1 - a_prev - s**2) ** 0.5 * eps
        if s > 0:
            x = x + s * randn(x.shape[1:], generators, x)
        yield State(index, t, x, x0)
