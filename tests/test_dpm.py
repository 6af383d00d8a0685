"""DPM-Solver++(2M): whole trajectories against diffusers' DPMSolverMultistepScheduler, and against a known solution."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep
from solvers import denoiser, error, generators
from torch import Tensor

from model.words import Prediction
from sampling.ddim import DDIM
from sampling.dpm import DPM, dpm, dpm_times
from sampling.sampler import Sampler, randn
from sampling.schedule import Schedule, Spacing

SHAPE = (4, 5, 3)
EXACT = 1e-10  # where both compute in float64
SPACINGS = ["leading", "trailing", "linspace"]


def visits(schedule: Schedule, steps: int) -> list[int]:
    return [step.t for step in dpm_times(schedule, steps)]


def peer(schedule: Schedule, steps: int) -> Any:
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        steps_offset=schedule.offset,
        timestep_spacing=schedule.spacing,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[schedule.prediction],
    )
    scheduler.set_timesteps(steps)
    return scheduler


class Double:
    """torch, but its float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def peer_trajectory(x: Tensor, schedule: Schedule, steps: int, start: int = 0, exact: bool = False) -> list[Tensor]:
    """Return diffusers' latents after every step from `start`. With `exact`, its float32 sigmas and casts become float64."""
    scheduler, states = peer(schedule, steps), []
    scheduler.set_begin_index(start)
    with pytest.MonkeyPatch.context() as m:
        if exact:
            a = scheduler.alphas_cumprod.double()[scheduler.timesteps]
            scheduler.sigmas = torch.cat([((1 - a) / a).sqrt(), torch.zeros(1)])
            m.setattr(scheduling_dpmsolver_multistep, "torch", Double())
        for t in scheduler.timesteps[start:].tolist():
            x = scheduler.step(denoiser(x, t), t, x).prev_sample
            states.append(x)
    return states


@pytest.mark.parity("diffusers DPMSolverMultistepScheduler with float64 sigmas", EXACT)
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 20, 30])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_trajectories_are_those_of_diffusers(spacing: Spacing, prediction: Prediction, steps: int) -> None:
    schedule, x = Schedule(spacing=spacing, prediction=prediction), randn(SHAPE, generators(1, 2)).double()
    ours = [state.x for state in dpm(denoiser, x, schedule, dpm_times(schedule, steps))]
    assert error(ours, peer_trajectory(x, schedule, steps, exact=True)) < EXACT
    assert error(ours, peer_trajectory(x, schedule, steps)) < 2e-4  # in float32


@pytest.mark.parity("diffusers DPMSolverMultistepScheduler with float64 sigmas", EXACT)
@pytest.mark.parametrize("start", [1, 6, 18, 19])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_part_of_the_schedule_is_that_of_diffusers(spacing: Spacing, start: int) -> None:
    """The first step that runs is of first order."""
    schedule, x = Schedule(spacing=spacing, offset=0), randn(SHAPE, generators(1, 2, 3)).double()
    ours = [state.x for state in dpm(denoiser, x, schedule, dpm_times(schedule, 20), start)]
    assert error(ours, peer_trajectory(x, schedule, 20, start, exact=True)) < EXACT


@pytest.mark.parity("diffusers DPMSolverMultistepScheduler", 0)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing: Spacing) -> None:
    for steps in (*range(1, 60), 333, 499, 500, 998):
        for offset in (0, 1):
            schedule = Schedule(spacing=spacing, offset=offset)
            theirs = peer(schedule, steps).timesteps.tolist()
            if len(theirs) == steps:  # diffusers' trailing rounds to one more for a few numbers of steps
                assert visits(schedule, steps) == theirs


@pytest.mark.parametrize("spacing", ["leading", "linspace", "ldm"])
@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_steps_that_do_not_fit_are_refused(spacing: Spacing, steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        dpm_times(Schedule(spacing=spacing), steps)


def test_a_timestep_is_never_visited_twice() -> None:
    """999 leading steps would start at timestep 1000, which is clipped to 999."""
    with pytest.raises(ValueError, match="999 steps are too many"):
        visits(Schedule(spacing="leading"), 999)
    assert len(visits(Schedule(spacing="trailing"), 1000)) == 1000


def test_eta_is_refused() -> None:
    with pytest.raises(ValueError, match="eta works only with DDIM"):
        DPM.noise(0.5, generators(1))
    assert DPM.noise(0.0, generators(1)) == {}


def test_states_hold_their_index_and_timestep() -> None:
    states = list(dpm(denoiser, randn(SHAPE, generators(1)), Schedule(), dpm_times(Schedule(), 7), start=2))
    assert [state.index for state in states] == list(range(2, 7))
    assert [state.t for state in states] == visits(Schedule(), 7)[2:]
    assert torch.equal(states[-1].x, states[-1].x0)  # the last step, to a = 1, is x_0 itself


@pytest.mark.parametrize("sampler", [DDIM, DPM], ids=["ddim", "dpm++"])
def test_the_network_sees_the_latents_that_begin_step_returns(sampler: Sampler) -> None:
    seen: list[Tensor] = []

    def watching(x: Tensor, t: int) -> Tensor:
        seen.append(x)
        return denoiser(x, t)

    entered: list[tuple[int, float]] = []

    def begin_step(index: int, a: float, x: Tensor) -> Tensor:
        entered.append((index, a))
        return x + index

    x, times = randn(SHAPE, generators(1)), sampler.times(Schedule(), 6)
    states = list(sampler.draw(watching, x, Schedule(), times, start=3, begin_step=begin_step))
    a = Schedule().alphas.double().tolist()
    assert entered == [(state.index, a[state.t]) for state in states] and [i for i, _ in entered] == [3, 4, 5]
    starts = [x, *(state.x for state in states)]
    assert all(torch.equal(a, b + i) for a, b, i in zip(seen, starts, (3, 4, 5), strict=False))


def gaussian_error(steps: int, end: int = 199, mean: float = 2.0, std: float = 0.5) -> float:
    """At timestep `end`, against the ODE's own map of Gaussian data: (x_t - sqrt(a_t) mean) / sqrt(a_t std^2 + 1 - a_t) is constant."""
    schedule = Schedule(spacing="trailing")
    a = schedule.alphas.double().tolist()

    def deviation(t: int) -> float:
        return (a[t] * std**2 + 1 - a[t]) ** 0.5

    def model(x: Tensor, t: int) -> Tensor:
        return (1 - a[t]) ** 0.5 * (x - a[t] ** 0.5 * mean) / deviation(t) ** 2

    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    exact = a[end] ** 0.5 * mean + deviation(end) * (x - a[999] ** 0.5 * mean) / deviation(999)
    times = dpm_times(schedule, steps)
    actual = next(state.x for state in dpm(model, x, schedule, times) if times[state.index + 1].t == end)
    return float((actual - exact).abs().max())


def test_the_order_is_two() -> None:
    """With twice the steps, the error is a quarter."""
    errors = [gaussian_error(steps) for steps in (25, 50, 100, 200)]
    ratios = [a / b for a, b in pairwise(errors)]
    assert errors[0] < 0.01 and all(3.5 < ratio < 4.5 for ratio in ratios), (errors, ratios)
