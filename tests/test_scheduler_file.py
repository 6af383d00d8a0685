"""Scheduler files of every kind: our samplers against diffusers' scheduler with the same file."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from small_models import EULER
from solvers import BETAS, FILES, SD15, denoiser, error, generators

from sampling.ddim import DDIM
from sampling.dpm import DPM, dpm_times
from sampling.sampler import randn
from sampling.schedule import Schedule
from sampling.scheduler_file import schedule_of

SAVED = [
    "PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", 
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler",
]  # fmt: skip
FLOAT32 = 2e-4  # diffusers' alphas and sigmas are float32
SAMPLERS = {"ddim": (DDIM, DDIMScheduler), "dpm++": (DPM, DPMSolverMultistepScheduler)}


def saved(name: str, folder: Path) -> dict[str, Any]:
    """Write the file of a diffusers scheduler, which contains every setting."""
    getattr(diffusers, name)(**BETAS).save_pretrained(folder)
    return json.loads((folder / "scheduler_config.json").read_text())  # type: ignore[no-any-return]


def trajectories_differ(config: dict[str, Any], sampler: str, steps: int = 12) -> float:
    """Return the largest difference between our latents and those of diffusers, over all steps."""
    ours, kind = SAMPLERS[sampler]
    scheduler = kind.from_config(
        config | {"clip_sample": False, "steps_offset": 1}
    )  # as Stable Diffusion's pipeline does
    scheduler.set_timesteps(steps)
    first = x = randn((4, 5, 3), generators(1, 2)).double()
    theirs = []
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(denoiser(x, t), t, x).prev_sample
        theirs.append(x)
    schedule = schedule_of(config)
    states = ours.draw(denoiser, first, schedule, ours.times(schedule, steps))
    return error([state.x for state in states], theirs)


@pytest.mark.parity("diffusers DDIMScheduler, DPMSolverMultistepScheduler, float32", FLOAT32)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", FILES)
def test_every_sampler_on_every_kind_of_file(name: str, sampler: str) -> None:
    assert trajectories_differ(FILES[name], sampler) < FLOAT32


@pytest.mark.parity("diffusers DDIMScheduler, DPMSolverMultistepScheduler, float32", FLOAT32)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SAVED)
def test_every_sampler_on_every_saved_file(tmp_path: Path, name: str, sampler: str) -> None:
    assert trajectories_differ(saved(name, tmp_path), sampler) < FLOAT32


@pytest.mark.parity("diffusers DDIMScheduler", 0)
@pytest.mark.parametrize("name", FILES)
def test_schedule_of_a_file_is_the_one_that_diffusers_makes_of_it(name: str) -> None:
    scheduler, ours = DDIMScheduler.from_config(FILES[name]), schedule_of(FILES[name])
    scheduler.set_timesteps(30)
    alphas, stride = scheduler.alphas_cumprod.double(), len(scheduler.alphas_cumprod) // 30
    final, visits = float(scheduler.final_alpha_cumprod), scheduler.timesteps.tolist()
    previous = [float(alphas[t - stride]) if t >= stride else final for t in visits]
    assert ours.pairs(30) == [(t, float(alphas[t]), p) for t, p in zip(visits, previous, strict=True)]
    assert ours.prediction == scheduler.config.prediction_type.removesuffix("_prediction")


def test_an_euler_file_ends_at_one() -> None:
    """Whatever it says of the last step, because that of Euler's method goes to a = 1 (test_euler.py)."""
    assert schedule_of(EULER).final_one and not schedule_of(EULER | {"_class_name": "DDIMScheduler"}).final_one


@pytest.mark.parity("diffusers DPMSolverMultistepScheduler, float32", FLOAT32)
@pytest.mark.parametrize("steps", [1, 2, 10, 14, 15, 20, 30, 60])
def test_karras_sigmas_are_those_of_diffusers(steps: int) -> None:
    config = FILES["Karras"]
    scheduler, ours = DPMSolverMultistepScheduler.from_config(config), dpm_times(schedule_of(config), steps)
    scheduler.set_timesteps(steps)
    assert [step.t for step in ours] == scheduler.timesteps.tolist()
    for (_, a, _), sigma in zip(ours, scheduler.sigmas.tolist(), strict=False):
        assert ((1 - a) / a) ** 0.5 == pytest.approx(sigma, rel=1e-5)
    assert trajectories_differ(config, "dpm++", steps) < FLOAT32


def test_an_empty_config_gives_sd15() -> None:
    assert schedule_of({}) == Schedule() == schedule_of(FILES["SD 1.5"])


EQUIVALENT: list[dict[str, Any]] = [
    *({"lower_order_final": a, "euler_at_final": b} for a, b in itertools.product((True, False), repeat=2)),
    {"solver_type": "bh2"},
    {"solver_type": "logrho"},
    {"lambda_min_clipped": -5.1},
    {"lambda_min_clipped": -math.inf},
    {"variance_type": "fixed_small"},
    {"flow_shift": 3.0, "time_shift_type": "exponential"},
    {"rescale_betas_zero_snr": None},
]


@pytest.mark.parity("diffusers DPMSolverMultistepScheduler, float32", FLOAT32)
@pytest.mark.parametrize("settings", EQUIVALENT, ids=str)
@pytest.mark.parametrize("steps", [10, 20])
def test_settings_that_mean_the_same_are_read(settings: dict[str, Any], steps: int) -> None:
    assert trajectories_differ(SD15 | settings, "dpm++", steps) < FLOAT32


OTHERS: list[dict[str, Any]] = [
    {"solver_order": 3},
    {"solver_order": 1},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "deis"},
    {"solver_type": "heun"},
    {"final_sigmas_type": "sigma_min"},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
    {"use_dynamic_shifting": True},
    {"lambda_min_clipped": -1.0},
    {"variance_type": "learned_range"},
]


@pytest.mark.parity("diffusers DDIMScheduler, float32", FLOAT32)
@pytest.mark.parametrize("settings", OTHERS, ids=lambda settings: next(iter(settings)))
def test_settings_that_change_the_picture_are_refused_by_name(settings: dict[str, Any]) -> None:
    """DDIM ignores these settings, as in diffusers."""
    key, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=rf"sets .*{key} = {value}.*draw with --sampler ddim"):
        dpm_times(schedule_of(SD15 | settings), 10)
    assert trajectories_differ(SD15 | settings, "ddim") < FLOAT32


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "linear"},
        {"trained_betas": [0.1]},
        {"rescale_betas_zero_snr": True},
        {"thresholding": True},
        {"prediction_type": "sample"},
        {"prediction_type": None},
        {"timestep_spacing": "karras"},
        {"timestep_spacing": 3},
        {"beta_start": "0.00085"},
        {"beta_end": None},
        {"beta_end": math.nan},
        {"beta_end": 5.0},
        {"beta_start": 0},
        {"beta_start": True},
        {"num_train_timesteps": 1000.5},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": -1},
        {"set_alpha_to_one": "no"},
        {"use_karras_sigmas": "yes"},
        {"use_karras_sigmas": None},
        {"lambda_min_clipped": math.nan},
        {"lambda_min_clipped": "low"},
    ],
    ids=str,
)
def test_other_schedules_and_impossible_values_are_refused(change: dict[str, Any]) -> None:
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"its {key} is {re.escape(repr(value))}"):
        schedule_of(SD15 | change)


def test_a_file_without_betas_is_refused() -> None:
    with pytest.raises(ValueError, match="beta_schedule is 'linear'"):
        schedule_of({"_class_name": "DDIMScheduler"})
