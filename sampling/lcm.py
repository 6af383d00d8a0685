"""Multistep consistency sampling of latent consistency models (LCM, arXiv 2310.04378), for a base with an LCM-LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from sampling.sampler import BeginStep, Denoiser, Sampler, State, Step, as_is, randn
from sampling.schedule import Schedule

DISTILLED, SIGMA_DATA, SCALING = 50, 0.5, 10.0  # a model is distilled on 50 timesteps, every 20th


def lcm_times(schedule: Schedule, steps: int) -> list[Step]:
    """Choose the steps as diffusers' `LCMScheduler` does: evenly among the timesteps that a model was distilled on.

    Raises ValueError unless 1 <= steps <= DISTILLED, or if the scheduler file has settings that are not supported.
    """
    if schedule.unsupported_by_lcm:
        raise ValueError(f"LCM does not support {', '.join(schedule.unsupported_by_lcm)}: remove this from the scheduler file")
    if not 1 <= steps <= DISTILLED:
        raise ValueError(f"LCM takes 1 to {DISTILLED} steps, and 4 are usual, not {steps}")
    every, alphas = schedule.timesteps // DISTILLED, schedule.alphas.double()
    times = [(DISTILLED - DISTILLED * i // steps) * every - 1 for i in range(steps)]
    levels = [*alphas[times].tolist(), 1.0]
    return [Step(t, a, a_prev) for t, a, a_prev in zip(times, levels, levels[1:], strict=False)]


def lcm(
    model: Denoiser,
    x: Tensor,
    schedule: Schedule,
    times: Sequence[Step],
    generators: Sequence[torch.Generator] = (),
    start: int = 0,
    begin_step: BeginStep = as_is,
) -> Iterator[State]:
    """Predict the picture in each step, and add new noise for the next one (Algorithm 3):

    f = c_skip x_t + c_out x_0,  x_{t-1} = sqrt(a_prev) f + sqrt(1 - a_prev) z,
    c_skip = s^2 / (u^2 + s^2),  c_out = u / sqrt(u^2 + s^2),  u = 10 t,  s = 0.5.

    x_0 is what the network predicts from x_t; c_skip and c_out give f(x_0, 0) = x_0. The last step adds no noise, because a_prev is 1.
    The arguments are as in `ddim`, with a generator for each picture. Matches diffusers' `LCMScheduler` without clipping.
    """
    for index, (t, a, a_prev) in islice(enumerate(times), start, None):
        x = begin_step(index, a, x)
        _, x0 = schedule.split(x, model(x, t), a)
        u = SCALING * t
        x = SIGMA_DATA**2 / (u**2 + SIGMA_DATA**2) * x + u / (u**2 + SIGMA_DATA**2) ** 0.5 * x0
        if a_prev < 1:
            x = a_prev**0.5 * x + (1 - a_prev) ** 0.5 * randn(x.shape[1:], generators, x)
        yield State(index, t, x, x0)


LCM = Sampler("lcm", lcm_times, lcm, "LCMScheduler", takes=("generators",))
