"""DPM-Solver++(2M) (arXiv 2211.01095): a second-order sampler with one call of the network per step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from torch import Tensor

from sampling.sampler import BeginStep, Denoiser, Sampler, State, Step, as_is
from sampling.schedule import Schedule, karras_sigmas


def dpm_times(schedule: Schedule, steps: int) -> list[Step]:
    """Choose the steps as diffusers' `DPMSolverMultistepScheduler` does. The last step ends at a = 1, beyond the timesteps.

    Raises ValueError if there are too many steps to visit different timesteps, or if the scheduler file has settings that are
    not supported.
    """
    if schedule.unsupported_by_dpm:
        raise ValueError(
            f"the scheduler file sets {', '.join(schedule.unsupported_by_dpm)}, which this DPM-Solver++ does not support: "
            "draw with --sampler ddim, or remove these settings from the file"
        )
    visits = _karras(schedule, steps) if schedule.karras else _visits(schedule, steps)
    a_prev = [a for _, a in visits[1:]] + [1.0]
    return [Step(t, a, end) for (t, a), end in zip(visits, a_prev, strict=True)]


def _visits(schedule: Schedule, steps: int) -> list[tuple[int, float]]:
    """Return (t, a_t) for each step. Leading and linspace spacing place one step more and drop the last."""
    if schedule.spacing is None:
        schedule = replace(schedule, spacing="linspace")
    visits = schedule.visits(steps)
    if schedule.spacing in ("leading", "linspace"):
        visits = schedule.visits(min(steps + 1, schedule.timesteps))[:-1]
    if len(set(visits)) < max(steps, len(visits)):
        raise ValueError(f"{steps} steps are too many for DPM-Solver++: it would visit a timestep twice; use fewer steps")
    schedule.warn_of_late_start(steps, visits[0])
    alphas = schedule.alphas.double()
    return [(t, float(alphas[t])) for t in visits]


def _karras(schedule: Schedule, steps: int) -> list[tuple[int, float]]:
    """Return (t, a) for each step, by `karras_sigmas` from the largest noise level of the schedule to the smallest.

    Here sigma = sqrt((1 - a) / a). t is linearly interpolated in log sigma, then rounded.
    """
    alphas = schedule.alphas.double().numpy()
    table = np.sqrt((1 - alphas) / alphas)
    sigmas = karras_sigmas(table[-1], table[0], steps)
    times = np.interp(np.log(sigmas), np.log(table), np.arange(len(table))).round()
    return [(int(t), float(1 / (1 + sigma**2))) for t, sigma in zip(times, sigmas, strict=True)]


def dpm(
    model: Denoiser, x: Tensor, schedule: Schedule, times: Sequence[Step], start: int = 0, begin_step: BeginStep = as_is
) -> Iterator[State]:
    """Run Algorithm 2. A step from timestep s to t, with alpha = sqrt(a), sigma = sqrt(1 - a), lambda = log(alpha / sigma), is

    x_t = (sigma_t / sigma_s) x_s - alpha_t (e^-h - 1) D,    h = lambda_t - lambda_s,
    D = x_0 + (x_0 - x_0') / 2r,    r = h' / h,

    where x_0' and h' belong to the previous step. In the first step, which has no previous one, and in the last, which ends at
    sigma = 0, D = x_0. The arguments are as in `ddim`, without noise. Matches diffusers' `DPMSolverMultistepScheduler` of
    order 2 with "midpoint" and final sigmas "zero", with or without Karras sigmas.
    """
    lam = [0.5 * math.log(step.a / (1 - step.a)) for step in times]
    before = x
    for i, (t, a, a_prev) in islice(enumerate(times), start, None):
        x = begin_step(i, a, x)
        _, x0 = schedule.split(x, model(x, t), a)
        d = x0
        if start < i < len(times) - 1:
            d = x0 + (x0 - before) * (lam[i + 1] - lam[i]) / (2 * (lam[i] - lam[i - 1]))
        ratio = ((1 - a_prev) / (1 - a)) ** 0.5  # alpha_t e^-h = alpha_s * ratio; 0 in the last step
        x = ratio * x + (a_prev**0.5 - ratio * a**0.5) * d
        before = x0
        yield State(i, t, x, x0)


DPM = Sampler("dpm++", dpm_times, dpm, "DPMSolverMultistepScheduler")
