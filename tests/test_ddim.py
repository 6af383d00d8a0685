"""DDIM: whole trajectories against diffusers' DDIMScheduler, and against data whose exact denoiser is known."""

from __future__ import annotations

import math

import pytest
import torch
from solvers import ddim_trajectory, denoiser, error, generators
from torch import Tensor

from model.words import Prediction
from sampling.ddim import DDIM, ddim, ddim_times
from sampling.sampler import Denoiser, randn
from sampling.schedule import Schedule, Spacing

SHAPE = (4, 5, 3)
EXACT = 1e-10  # where both compute in float64


@pytest.mark.parity("diffusers DDIMScheduler with float64 alphas", EXACT)
@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_trajectories_are_those_of_diffusers(spacing: Spacing, prediction: Prediction, eta: float, steps: int) -> None:
    schedule, x = Schedule(spacing=spacing, prediction=prediction), randn(SHAPE, generators(1, 2)).double()
    ours = [state.x for state in ddim(denoiser, x, schedule, ddim_times(schedule, steps), eta, generators(5, 6))]
    assert error(ours, ddim_trajectory(x, schedule, steps, eta, exact=True)) < EXACT
    assert error(ours, ddim_trajectory(x, schedule, steps, eta, exact=False)) < 1e-4  # its alphas are float32 even here


@pytest.mark.parity("diffusers DDIMScheduler with float64 alphas", EXACT)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
def test_trajectories_that_end_at_one(offset: int, eta: float) -> None:
    schedule, x = Schedule(spacing="leading", offset=offset, final_one=True), randn(SHAPE, generators(1, 2)).double()
    ours = [state.x for state in ddim(denoiser, x, schedule, ddim_times(schedule, 20), eta, generators(5, 6))]
    assert error(ours, ddim_trajectory(x, schedule, 20, eta, exact=True)) < EXACT


def test_states_hold_their_index_and_timestep() -> None:
    schedule = Schedule(final_one=True)
    states = list(ddim(denoiser, randn(SHAPE, generators(1)), schedule, ddim_times(schedule, 7)))
    assert [state.index for state in states] == list(range(7))
    assert [state.t for state in states] == schedule.visits(7)
    assert torch.equal(states[-1].x, states[-1].x0)  # the last step, to a = 1, is x_0 itself


def test_the_network_is_called_once_per_step_and_lazily() -> None:
    asked: list[int] = []

    def counting(x: Tensor, t: int) -> Tensor:
        asked.append(t)
        return denoiser(x, t)

    states = ddim(counting, randn(SHAPE, generators(1)), Schedule(), ddim_times(Schedule(), 5))
    assert asked == []
    next(states)
    assert asked == Schedule().visits(5)[:1]


@pytest.mark.parametrize("eta", [-0.5, 1.5])
def test_eta_outside_its_range_is_refused(eta: float) -> None:
    """Above 1, the coefficient of eps would be the square root of a negative number."""
    with pytest.raises(ValueError, match="eta"):
        DDIM.noise(eta, generators(1))


def gaussian_eps(mean: float, std: float, alphas: Tensor) -> Denoiser:
    """The exact E[eps | x_t] when the data is N(mean, std^2)."""
    a = alphas.double().tolist()
    return lambda x, t: (1 - a[t]) ** 0.5 * (x - a[t] ** 0.5 * mean) / (a[t] * std**2 + 1 - a[t])


def gaussian_error(steps: int, mean: float = 2.0, std: float = 0.5) -> float:
    """Compute the difference between the maps of DDIM and of the ODE.

    The ODE's map is x_T -> mean + std (x_T - sqrt(a_T) mean) / sqrt(a_T std^2 + 1 - a_T).
    """
    schedule = Schedule(spacing="trailing", final_one=True)
    x, a = torch.linspace(-3, 3, 61, dtype=torch.float64), float(schedule.alphas[999])
    exact = mean + std * (x - a**0.5 * mean) / (a * std**2 + 1 - a) ** 0.5
    *_, last = ddim(gaussian_eps(mean, std, schedule.alphas), x, schedule, ddim_times(schedule, steps))
    return float((last.x - exact).abs().max())


def test_error_on_a_gaussian_falls_like_one_over_steps() -> None:
    """Up to a factor log(steps): near t = 0, the noise level sqrt((1 - a) / a) grows like sqrt(t), so the last steps dominate."""
    errors = {steps: gaussian_error(steps) for steps in (25, 50, 100, 200, 500)}
    constants = [error * steps / math.log(steps) for steps, error in errors.items()]
    assert errors[500] < 0.02 < 0.1 < errors[25], errors
    assert max(constants) / min(constants) < 1.3, constants


def test_v_gives_the_same_map_as_epsilon() -> None:
    """v = sqrt(a) eps - sqrt(1 - a) x_0 is computed from the same exact denoiser."""
    eps_schedule, v_schedule = Schedule(), Schedule(prediction="v")
    eps, a = gaussian_eps(2.0, 0.5, eps_schedule.alphas), eps_schedule.alphas.double().tolist()

    def v(x: Tensor, t: int) -> Tensor:
        e = eps(x, t)
        x0 = (x - (1 - a[t]) ** 0.5 * e) / a[t] ** 0.5
        return a[t] ** 0.5 * e - (1 - a[t]) ** 0.5 * x0

    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    ours = [
        [state.x for state in ddim(model, x, schedule, ddim_times(schedule, 30))]
        for model, schedule in ((eps, eps_schedule), (v, v_schedule))
    ]
    assert error(*ours) < 1e-10


def mixture_eps(weights: Tensor, means: Tensor, std: float, alphas: Tensor) -> Denoiser:
    """Compute the exact E[eps | x_t] of a mixture of Gaussians: those of the components, weighted by their posterior."""
    a = alphas.double().tolist()

    def eps(x: Tensor, t: int) -> Tensor:
        variance, off = a[t] * std**2 + 1 - a[t], x[..., None] - a[t] ** 0.5 * means
        posterior = (weights.log() - off**2 / (2 * variance)).softmax(dim=-1)
        return (1 - a[t]) ** 0.5 * (posterior * off).sum(dim=-1) / variance

    return eps


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_mixture_of_gaussians_is_sampled(eta: float) -> None:
    weights, means, std = (
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([-1.5, 1.0], dtype=torch.float64),
        0.2,
    )
    schedule = Schedule(spacing="trailing", final_one=True)
    x = randn((8000,), generators(3)).double()
    *_, last = ddim(
        mixture_eps(weights, means, std, schedule.alphas), x, schedule, ddim_times(schedule, 250), eta, generators(4)
    )
    left, right = last.x[last.x < 0], last.x[last.x >= 0]
    assert len(left) / 8000 == pytest.approx(0.3, abs=0.03)
    assert float(left.mean()) == pytest.approx(-1.5, abs=0.03) and float(right.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(left.std()) == pytest.approx(std, abs=0.03) and float(right.std()) == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_noise_of_a_picture_is_the_same_at_any_batch_size(batch: int) -> None:
    alone = randn(SHAPE, generators(7))[0]
    seeds = [*range(100, 100 + batch - 1), 7]
    assert torch.equal(randn(SHAPE, generators(*seeds))[-1], alone)


def test_noise_has_the_dtype_of_like() -> None:
    drawn = randn(SHAPE, generators(7), torch.zeros(1, dtype=torch.float64))
    assert drawn.dtype == torch.float64 and torch.equal(drawn, randn(SHAPE, generators(7)).double())


def test_stochastic_pictures_do_not_depend_on_their_batch() -> None:
    x = randn(SHAPE, generators(1, 2, 3))
    together = list(ddim(denoiser, x, Schedule(), ddim_times(Schedule(), 10), 1.0, generators(4, 5, 6)))[-1].x
    alone = list(ddim(denoiser, x[1:2], Schedule(), ddim_times(Schedule(), 10), 1.0, generators(5)))[-1].x
    assert torch.equal(together[1:2], alone)
