"""DDIM (arXiv 2010.02502), as a generator that yields the state after each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from sampling.sampler import BeginStep, Denoiser, Sampler, State, Step, as_is, randn
from sampling.schedule import Schedule


def ddim_times(schedule: Schedule, steps: int) -> list[Step]:
    """Choose the steps as diffusers' `DDIMScheduler` does. Raises ValueError unless 1 <= steps <= T."""
    return [Step(*pair) for pair in schedule.pairs(steps)]


def ddim(
    model: Denoiser,
    x: Tensor,
    schedule: Schedule,
    times: Sequence[Step],
    eta: float = 0.0,
    generators: Sequence[torch.Generator] = (),
    start: int = 0,
    begin_step: BeginStep = as_is,
) -> Iterator[State]:
    """Run DDIM and yield the state after each step (Eq. 12, with s from Eq. 16):

    x_{t-1} = sqrt(a_prev) x_0 + sqrt(1 - a_prev - s^2) eps + s z,
    s = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev).  eta = 0 is deterministic, eta = 1 is DDPM.

    `model(x, t)`: the network; it predicts what `schedule.prediction` names. `x`: N(0, 1) noise. `times`: the steps.
    `generators`: one per picture; only needed if eta > 0. `start`: the number of first steps to skip. `begin_step`: called before
    each step; it may replace x. Matches diffusers' `DDIMScheduler` without clipping.
    """
    for index, (t, a, a_prev) in islice(enumerate(times), start, None):
        x = begin_step(index, a, x)
        eps, x0 = schedule.split(x, model(x, t), a)
        s = eta * ((1 - a_prev) / (1 - a)) ** 0.5 * (1 - a / a_prev) ** 0.5
        x = a_prev**0.5 * x0 + (1 - a_prev - s**2) ** 0.5 * eps
        if s > 0:
            x = x + s * randn(x.shape[1:], generators, x)
        yield State(index, t, x, x0)


DDIM = Sampler("ddim", ddim_times, ddim, "DDIMScheduler", takes=("eta", "generators"))
