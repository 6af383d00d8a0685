"""LCM's sampler: timesteps and whole trajectories against diffusers' LCMScheduler, with the same noise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import LCMScheduler
from solvers import SD15, denoiser, error, generators
from torch import Tensor

from sampling.lcm import DISTILLED, LCM, lcm, lcm_times
from sampling.request import Request
from sampling.sampler import randn
from sampling.schedule import Schedule
from sampling.scheduler_file import other_scheduler, schedule_of

EXACT = 1e-9
SHAPE = (4, 5, 3)
CONFIGS: dict[str, dict[str, Any]] = {"SD 1.5": SD15, "v": SD15 | {"prediction_type": "v_prediction"}}


def theirs(config: dict[str, Any], steps: int, x: Tensor, seeds: tuple[int, ...], start: int = 0) -> list[Tensor]:
    """Return diffusers' latents after every step. Its noise is ours, in the same order."""
    scheduler, own = LCMScheduler.from_config(config), generators(*seeds)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start)
    states = []
    with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: randn(SHAPE, own, x)):
        for t in scheduler.timesteps[start:].tolist():
            x = scheduler.step(denoiser(x, t), t, x).prev_sample
            states.append(x)
    return states


@pytest.mark.parity("diffusers LCMScheduler", 0)
def test_timesteps_are_those_of_diffusers() -> None:
    scheduler = LCMScheduler.from_config(SD15)
    for steps in range(1, DISTILLED + 1):
        scheduler.set_timesteps(steps)
        assert [step.t for step in lcm_times(Schedule(), steps)] == scheduler.timesteps.tolist()


@pytest.mark.parity("diffusers LCMScheduler with float64 alphas", EXACT)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_trajectories_are_those_of_diffusers(name: str, steps: int) -> None:
    config, x, schedule = CONFIGS[name], randn(SHAPE, generators(1, 2)).double(), schedule_of(CONFIGS[name])
    ours = [state.x for state in lcm(denoiser, x, schedule, lcm_times(schedule, steps), generators(3, 4))]
    assert error(ours, theirs(config, steps, x, (3, 4))) < EXACT


@pytest.mark.parity("diffusers LCMScheduler with float64 alphas", EXACT)
def test_a_part_of_the_schedule_is_that_of_diffusers() -> None:
    x, schedule = randn(SHAPE, generators(3)).double(), schedule_of(SD15)
    ours = [state.x for state in lcm(denoiser, x, schedule, lcm_times(schedule, 8), generators(4), start=3)]
    assert error(ours, theirs(SD15, 8, x, (4,), start=3)) < EXACT


def test_a_perfect_network_is_right_in_every_step() -> None:
    """If the network knows x_0, each step predicts it, and the last one returns it up to c_skip."""
    x0, schedule = torch.linspace(-1, 1, 60).double().view(1, *SHAPE), Schedule()
    alphas = schedule.alphas.double()

    def net(x: Tensor, t: float) -> Tensor:
        a = float(alphas[int(t)])
        return (x - a**0.5 * x0) / (1 - a) ** 0.5

    states = list(lcm(net, randn(SHAPE, generators(1)).double(), schedule, lcm_times(schedule, 4), generators(2)))
    assert all(torch.allclose(state.x0, x0) for state in states)
    assert torch.allclose(states[-1].x, x0, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    for steps in (0, 51):
        with pytest.raises(ValueError, match="LCM takes 1 to 50 steps"):
            lcm_times(Schedule(), steps)
    for entry in ({"original_inference_steps": 100}, {"timestep_scaling": 5.0}):
        with pytest.raises(ValueError, match=f"LCM does not support {next(iter(entry))}"):
            lcm_times(schedule_of(SD15 | entry), 4)
    with pytest.raises(ValueError, match="eta works only with DDIM: with lcm it must be 0"):
        LCM.noise(0.5, generators(1))
    with pytest.raises(ValueError, match="eta works only with DDIM: with lcm it must be 0"):
        Request(sampler="lcm", eta=0.5)
    assert other_scheduler(SD15 | {"_class_name": "LCMScheduler"}, LCM) is None
