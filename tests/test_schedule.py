"""The noise schedule: alpha-bar, visited timesteps and a_prev against diffusers' DDIMScheduler, and LDM's own rule."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from peers import randn

from model.words import Prediction
from sampling.ddim import DDIM
from sampling.dpm import DPM
from sampling.sampler import Sampler
from sampling.schedule import Schedule, Spacing

ROUNDING = 1e-13
STEPS = (1, 7, 20, 30, 50, 1000)
SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace")


def peer(steps: int, spacing: str = "leading", offset: int = 1, final_one: bool = False) -> Any:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=final_one,
        steps_offset=offset,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def ldm_visits(steps: int) -> list[int]:
    """LDM's make_ddim_timesteps, "uniform": range(0, T, T // steps), plus one."""
    return [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]


@pytest.mark.parity("diffusers DDIMScheduler", 0)
def test_alphas_are_diffusers_to_the_last_bit() -> None:
    alphas = Schedule().alphas
    assert alphas.dtype == torch.float32
    assert torch.equal(alphas, peer(50).alphas_cumprod)


def test_alphas_against_float64() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    exact = torch.cumprod(1 - betas, dim=0)
    assert float((Schedule().alphas.double() - exact).abs().max()) < 1e-6
    assert float(exact[0]) == pytest.approx(0.99915) and float(exact[999]) == pytest.approx(0.0046601, abs=1e-7)


@pytest.mark.parity("diffusers DDIMScheduler", 0)
@pytest.mark.parametrize("final_one", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pairs_are_those_of_diffusers(spacing: Spacing, steps: int, offset: int, final_one: bool) -> None:
    scheduler = peer(steps, spacing, offset, final_one)
    alphas, final = scheduler.alphas_cumprod.double(), float(scheduler.final_alpha_cumprod)
    # leading with offset 1 at 1000 steps asks diffusers for t = 1000, which isn't there
    visits = [min(t, 999) for t in scheduler.timesteps.tolist()]
    previous = [t - 1000 // steps for t in visits]
    ours = Schedule(spacing=spacing, offset=offset, final_one=final_one)
    assert ours.visits(steps) == visits
    assert ours.pairs(steps) == [
        (t, float(alphas[t]), float(alphas[p]) if p >= 0 else final) for t, p in zip(visits, previous, strict=True)
    ]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_any_number_of_steps_visits_that_many_timesteps(spacing: Spacing) -> None:
    schedule = Schedule(spacing=spacing)
    for steps in range(1, 1001):
        visits = schedule.visits(steps)
        assert (
            len(visits) == steps and min(visits) >= 0 and max(visits) <= 999 and visits == sorted(visits, reverse=True)
        ), f"{steps} steps"


@pytest.mark.parity("LDM make_ddim_timesteps", 0)
@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 100])
def test_ldm_rule(steps: int) -> None:
    ours = Schedule(spacing="ldm")
    visits = ldm_visits(steps)
    alphas = ours.alphas.double()
    previous = [float(alphas[t]) for t in visits[1:]] + [
        float(alphas[0])
    ]  # LDM: alphas_cumprod[0], then those of the visits
    assert ours.visits(steps) == visits
    assert ours.pairs(steps) == [(t, float(alphas[t]), p) for t, p in zip(visits, previous, strict=True)]


def test_ldm_and_diffusers_differ_at_30_steps() -> None:
    ldm, leading = Schedule(spacing="ldm").visits(30), Schedule(spacing="leading").visits(30)
    assert (len(ldm), ldm[0], ldm[-1]) == (31, 991, 1)
    assert (len(leading), leading[0], leading[-1]) == (30, 958, 1)


@pytest.mark.parametrize("steps", [20, 25, 50, 100, 200])
def test_ldm_and_diffusers_agree_where_steps_divide(steps: int) -> None:
    assert Schedule(spacing="ldm").pairs(steps) == Schedule(spacing="leading").pairs(steps)


@pytest.mark.parametrize("spacing", [*SPACINGS, "ldm"])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_refused(spacing: Spacing, steps: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 1000, not {steps}"):
        Schedule(spacing=spacing).pairs(steps)


@pytest.mark.parity("diffusers DDIMScheduler, DPMSolverMultistepScheduler", 0)
@pytest.mark.parametrize("sampler", [DDIM, DPM], ids=["ddim", "dpm++"])
@pytest.mark.parametrize(("steps", "fewer"), [(280, 250), (400, 333), (600, 500), (850, 500)])
def test_a_late_start_is_warned_of(sampler: Sampler, steps: int, fewer: int) -> None:
    """With more than 500 steps, diffusers' leading timesteps start at t = steps."""
    schedule = Schedule(spacing="leading")
    scheduler = peer(steps) if sampler is DDIM else DPMSolverMultistepScheduler.from_config(peer(steps).config)
    scheduler.set_timesteps(steps)
    with pytest.warns(UserWarning, match=rf"{steps} steps .* at timestep {max(scheduler.timesteps)} .*: use {fewer}"):
        sampler.times(schedule, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.times(schedule, fewer if sampler is DDIM else 50)
        sampler.times(replace(schedule, spacing="trailing"), steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_split_is_the_inverse_of_target(prediction: Prediction) -> None:
    schedule = Schedule(prediction=prediction)
    x0, eps = randn(5, 4, 3, 2, seed=1), randn(5, 4, 3, 2, seed=2)
    t = torch.tensor([0, 1, 500, 981, 999])
    x, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
    for i, step in enumerate(t.tolist()):
        found_eps, found_x0 = schedule.split(x[i], target[i], float(schedule.alphas.double()[step]))
        torch.testing.assert_close(found_eps, eps[i], atol=1e-12, rtol=0)
        torch.testing.assert_close(found_x0, x0[i], atol=1e-12, rtol=0)


@pytest.mark.parity("diffusers DDIMScheduler", ROUNDING)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noise_and_target_are_those_of_diffusers(prediction: Prediction) -> None:
    schedule, scheduler = Schedule(prediction=prediction), peer(50)
    x0, eps, t = randn(5, 4, 3, 2, seed=3), randn(5, 4, 3, 2, seed=4), torch.tensor([0, 1, 500, 981, 999])
    velocity = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(
        schedule.target(x0, eps, t), eps if prediction == "epsilon" else velocity, atol=ROUNDING, rtol=0
    )
