"""Euler's method on the probability flow ODE, the default sampler of Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from sampling.ddim import ddim
from sampling.sampler import BeginStep, Denoiser, Sampler, State, Step, as_is
from sampling.schedule import Schedule, karras_sigmas


def euler_times(schedule: Schedule, steps: int) -> list[Step]:
    """Choose the steps as diffusers' `EulerDiscreteScheduler` does; its default spacing is linspace. The last one ends at a = 1.

    Timesteps may lie between two whole numbers: with linspace spacing, and with the noise levels of Karras et al. Here
    sigma = sqrt((1 - a) / a), linear between the timesteps. Raises ValueError unless 1 <= steps <= T, or if the scheduler file has
    settings that are not supported.
    """
    if schedule.unsupported_by_euler:
        raise ValueError(
            f"the scheduler file sets {', '.join(schedule.unsupported_by_euler)}, which this Euler sampler does not support: "
            "draw with --sampler ddim, or remove these settings from the file"
        )
    times = np.array(schedule.visits(steps), dtype=float)
    if schedule.spacing in (None, "linspace"):
        times = np.linspace(0, schedule.timesteps - 1, steps)[::-1]
    else:
        schedule.warn_of_late_start(steps, int(times[0]))
    alphas, timesteps = schedule.alphas.double().numpy(), np.arange(schedule.timesteps)
    table = np.sqrt((1 - alphas) / alphas)
    sigmas = np.interp(times, timesteps, table)
    if schedule.karras:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
        times = np.interp(np.log(sigmas), np.log(table), timesteps)
    levels = [*(1 / (1 + sigmas**2)).tolist(), 1.0]
    return [Step(t, a, a_prev) for t, a, a_prev in zip(times.tolist(), levels, levels[1:], strict=False)]


def euler(
    model: Denoiser, x: Tensor, schedule: Schedule, times: Sequence[Step], start: int = 0, begin_step: BeginStep = as_is
) -> Iterator[State]:
    """Run Euler's method, y_{t-1} = y_t + (sigma_{t-1} - sigma_t) eps, with y_t = x_t / sqrt(a_t) and sigma_t = sqrt((1 - a_t) / a_t).

    Multiplied by sqrt(a_prev), this is the step of DDIM without noise. The two samplers differ in the steps that they choose. As in
    diffusers' `EulerDiscreteScheduler`, pure noise is multiplied by sqrt(1 - a) unless the spacing is leading. The arguments are as in
    `ddim`, without noise.
    """
    if start == 0 and schedule.spacing != "leading":
        x = (1 - times[0].a) ** 0.5 * x
    yield from ddim(model, x, schedule, times, start=start, begin_step=begin_step)


EULER = Sampler("euler", euler_times, euler, "EulerDiscreteScheduler")
