"""Euler's method: whole trajectories against diffusers' EulerDiscreteScheduler, and against DDIM that ends at a = 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from solvers import FILES, SD15, denoiser, error, generators
from torch import Tensor

from sampling.ddim import DDIM, ddim
from sampling.dpm import DPM, dpm_times
from sampling.euler import EULER, euler, euler_times
from sampling.request import Request
from sampling.sampler import randn
from sampling.schedule import Schedule
from sampling.scheduler_file import other_scheduler, schedule_of

FLOAT32 = 2e-4  # diffusers' sigmas are float32
SHAPE = (4, 5, 3)
SDXL = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "interpolation_type": "linear", **SD15}
CONFIGS: dict[str, dict[str, Any]] = {
    **FILES,
    "SDXL": SDXL,
    "leading, Karras": SDXL | {"use_karras_sigmas": True},
    "trailing, Karras": SDXL | {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
    "v": SDXL | {"prediction_type": "v_prediction"},
}


def theirs(config: dict[str, Any], steps: int, noise: Tensor, start: int = 0) -> list[Tensor]:
    """Return diffusers' latents after every step, divided by sqrt(sigma^2 + 1), which are ours."""
    scheduler = EulerDiscreteScheduler.from_config(config | {"steps_offset": 1})
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start)
    states, x = [], noise * scheduler.init_noise_sigma if start == 0 else noise * (scheduler.sigmas[start] ** 2 + 1) ** 0.5
    for i, t in enumerate(scheduler.timesteps[start:], start):
        output = denoiser(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x).prev_sample
        states.append(x / (scheduler.sigmas[i + 1].double() ** 2 + 1) ** 0.5)
    return states


@pytest.mark.parity("diffusers EulerDiscreteScheduler, float32", FLOAT32)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_trajectories_are_those_of_diffusers(name: str, steps: int) -> None:
    config, x = CONFIGS[name], randn(SHAPE, generators(1, 2)).double()
    schedule = schedule_of(config)
    ours = [state.x for state in euler(denoiser, x, schedule, euler_times(schedule, steps))]
    assert error(ours, theirs(config, steps, x)) < FLOAT32


@pytest.mark.parity("diffusers EulerDiscreteScheduler, float32", FLOAT32)
@pytest.mark.parametrize("start", [1, 13, 19])
def test_a_part_of_the_schedule_is_that_of_diffusers(start: int) -> None:
    x, schedule = randn(SHAPE, generators(3)).double(), schedule_of(FILES["Karras"])
    ours = [state.x for state in euler(denoiser, x, schedule, euler_times(schedule, 20), start=start)]
    assert error(ours, theirs(FILES["Karras"], 20, x, start)) < FLOAT32


@pytest.mark.parity("diffusers EulerDiscreteScheduler", 1e-3)
@pytest.mark.parametrize("name", CONFIGS)
def test_timesteps_are_those_of_diffusers(name: str) -> None:
    """They lie between whole numbers with linspace spacing and Karras' noise levels. diffusers' are float32."""
    scheduler = EulerDiscreteScheduler.from_config(CONFIGS[name] | {"steps_offset": 1})
    for steps in (1, 2, 9, 20, 33, 50, 250):
        scheduler.set_timesteps(steps)
        ours = [step.t for step in euler_times(schedule_of(CONFIGS[name]), steps)]
        if len(scheduler.timesteps) == steps:  # diffusers' trailing rounds to one more for a few numbers of steps
            assert np.abs(np.array(ours) - scheduler.timesteps.numpy()).max() < 1e-3


@pytest.mark.parity("diffusers DDIMScheduler with set_alpha_to_one, float32", FLOAT32)
@pytest.mark.parametrize("steps", [20, 30, 50])
def test_with_leading_spacing_it_is_ddim_that_ends_at_one(steps: int) -> None:
    """So SDXL's default sampler is DDIM with a_0 = 1; without it they differ in the last step."""
    x = randn(SHAPE, generators(5)).double()
    schedule = Schedule(spacing="leading")
    ours = [state.x for state in euler(denoiser, x, schedule, euler_times(schedule, steps))]
    one = Schedule(spacing="leading", final_one=True)
    same = [state.x for state in ddim(denoiser, x, one, DDIM.times(one, steps))]
    assert error(ours, same) < 1e-12
    scheduler = DDIMScheduler.from_config(SDXL | {"set_alpha_to_one": True})
    scheduler.set_timesteps(steps)
    y = x
    for t in scheduler.timesteps.tolist():
        y = scheduler.step(denoiser(y, t), t, y).prev_sample
    assert error(ours[-1:], [y]) < FLOAT32
    other = [state.x for state in ddim(denoiser, x, schedule, DDIM.times(schedule, steps))]
    assert error(ours[-1:], other[-1:]) > 1e-3


@pytest.mark.parametrize("settings", [
    {"interpolation_type": "log_linear"}, {"timestep_type": "continuous"}, {"final_sigmas_type": "sigma_min"}, {"sigma_max": 10.0},
    {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
])  # fmt: skip
def test_settings_of_other_solvers_are_refused(settings: dict[str, Any]) -> None:
    (entry,) = settings.items()
    with pytest.raises(ValueError, match=f"the scheduler file sets {entry[0]} = {entry[1]}, which this Euler sampler does not"):
        euler_times(schedule_of(SDXL | settings), 10)
    assert len(DDIM.times(schedule_of(SDXL | settings), 10)) == 10


def test_steps_that_do_not_fit_are_refused() -> None:
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps must be between 1 and 1000"):
            euler_times(Schedule(), steps)
    with pytest.raises(ValueError, match="eta works only with DDIM: with euler it must be 0"):
        EULER.noise(0.5, generators(1))


def test_a_gaussian_is_followed_with_order_one() -> None:
    """Data of one Gaussian: (x_t - sqrt(a_t) m) / sqrt(a_t s^2 + 1 - a_t) is constant. Twice the steps halve the error."""
    mean, std, alphas = 2.0, 0.5, Schedule().alphas.double().numpy()

    def net(x: Tensor, t: float) -> Tensor:
        sigma = float(np.interp(t, np.arange(1000), np.sqrt((1 - alphas) / alphas)))
        a = 1 / (1 + sigma**2)
        return (1 - a) ** 0.5 * (x - a**0.5 * mean) / (a * std**2 + 1 - a)

    def off(steps: int) -> float:
        times = euler_times(Schedule(spacing="leading"), steps)
        x, a = torch.linspace(-3, 3, 31).double(), times[0].a
        exact = mean + std * (x - a**0.5 * mean) / (a * std**2 + 1 - a) ** 0.5
        *_, last = euler(net, x, Schedule(spacing="leading"), times)
        return float((last.x - exact).abs().max())

    errors = [off(steps) for steps in (100, 200)]
    assert errors[0] < 0.2 and 1.4 < errors[0] / errors[1] < 2.6, errors


# --schedule karras.


@pytest.mark.parametrize("sampler", [DPM, EULER], ids=lambda sampler: sampler.name)
def test_karras_can_be_asked_for(sampler: Any) -> None:
    """It is the file's own use_karras_sigmas, whatever the file says."""
    asked = replace(schedule_of(SD15), karras=True)
    assert sampler.times(asked, 12) == sampler.times(schedule_of(SD15 | {"use_karras_sigmas": True}), 12)
    assert sampler.times(asked, 12) != sampler.times(schedule_of(SD15), 12)
    assert math.isclose(dpm_times(asked, 12)[0].a, float(asked.alphas[-1]), rel_tol=1e-6)


def test_karras_is_not_for_ddim() -> None:
    assert Request(sampler="euler", schedule="karras").schedule == "karras"
    with pytest.raises(ValueError, match="--schedule karras is for --sampler dpm\\+\\+ and euler, not ddim"):
        Request(schedule="karras")
    with pytest.raises(ValueError, match="schedule must be one of karras, not 'exponential'"):
        Request(sampler="euler", schedule="exponential")  # type: ignore[arg-type]


def test_another_scheduler_of_the_file_is_named() -> None:
    assert other_scheduler(FILES["SD 1.5"], DDIM) == "PNDMScheduler"
    assert other_scheduler(SDXL, EULER) is None and other_scheduler(SDXL, DPM) == "EulerDiscreteScheduler"
    assert other_scheduler({}, DDIM) is None
