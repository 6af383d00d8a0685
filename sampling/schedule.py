"""The noise schedule: alpha-bar, the timesteps that a sampler visits, and epsilon and v prediction.

We write a_t for the cumulative product alpha-bar_t: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps. So alpha_t and sigma_t of the IP-Adapter
paper (Eq. 1) are sqrt(a_t) and sqrt(1 - a_t), and alpha_t of the DDIM paper is a_t. We count t from 0, and a_0 is 0.99915; the DDIM paper
counts from 1, and its a_0 is 1, as with `final_one`.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.words import Prediction

Spacing = Literal["leading", "trailing", "linspace", "ldm"]


def diffuse(x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """Compute x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps; `a` broadcasts to x_0."""
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


@dataclass(frozen=True)
class Schedule:
    """Stable Diffusion's schedule; the default is SD 1.5's.

    `timesteps`: T. `spacing`: how timesteps are chosen, by one of the rules of arXiv 2305.08891, Table 2, rounded as in diffusers, or by
    that of LDM. None is the sampler's default: leading for DDIM, linspace for the others. `offset` is added to leading timesteps.
    `final_one` (DDIM): the last step ends at a = 1 instead of a_0. `karras` (DPM-Solver++, Euler): use the noise levels of arXiv
    2206.00364. `unsupported_by_dpm`, `unsupported_by_euler`, `unsupported_by_lcm`: settings of the scheduler file that these samplers do
    not support; if there are any, the sampler raises.
    """

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Prediction = "epsilon"
    spacing: Spacing | None = None
    offset: int = 1
    final_one: bool = False
    karras: bool = False
    unsupported_by_dpm: tuple[str, ...] = ()
    unsupported_by_euler: tuple[str, ...] = ()
    unsupported_by_lcm: tuple[str, ...] = ()

    @property
    def alphas(self) -> Tensor:
        """a_0 .. a_{T-1}, float32. The square root of beta is linear in t ("scaled linear")."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, dtype=torch.float32) ** 2
        return torch.cumprod(1 - betas, dim=0)

    def at(self, t: Tensor) -> Tensor:
        """Return a_t for timesteps of any shape, float32, on the same device."""
        return _alphas_on(self, t.device)[t]

    def visits(self, steps: int) -> list[int]:
        """Return the timesteps to visit, from noise to picture. LDM's rule gives more than `steps` if `steps` does not divide T.

        Raises ValueError unless 1 <= steps <= T.
        """
        total, grid = self.timesteps, np.zeros(0)
        if not 1 <= steps <= total:
            raise ValueError(f"steps must be between 1 and {total}, not {steps}")
        if self.spacing == "ldm":
            grid = np.arange(0.0, total, total // steps) + 1
        elif self.spacing == "trailing":
            return [int(t) for t in np.round(np.arange(total, 0, -total / steps))[:steps] - 1]
        elif self.spacing == "linspace":
            grid = np.linspace(0, total - 1, steps).round()
        else:
            grid = np.arange(0.0, steps) * (total // steps) + self.offset
        return [min(int(t), total - 1) for t in grid[::-1]]

    def pairs(self, steps: int) -> list[tuple[int, float, float]]:
        """Return (t, a_t, a_prev) for each step. a_prev is a at timestep t - T // steps (diffusers), or at the next visited one (LDM)."""
        alphas, visits = self.alphas.double(), self.visits(steps)
        self.warn_of_late_start(steps, visits[0])
        final = 1.0 if self.final_one else float(alphas[0])
        after = [*visits[1:], -1] if self.spacing == "ldm" else [t - self.timesteps // steps for t in visits]
        return [(t, float(alphas[t]), float(alphas[p]) if p >= 0 else final) for t, p in zip(visits, after, strict=True)]

    def warn_of_late_start(self, steps: int, first: int) -> None:
        """Warn if leading spacing with many steps starts below 0.9 T, where x_t should not be pure noise.

        This happens because T / steps is rounded down.
        """
        fewer = self.timesteps // (self.timesteps // steps + 1)
        if self.spacing in ("leading", None) and 10 * steps > self.timesteps and first < 0.9 * self.timesteps:
            warnings.warn(
                f"{steps} steps with leading spacing start at timestep {first} of {self.timesteps}, as in diffusers, which gives a "
                f"washed-out picture: use {fewer} steps",
                stacklevel=3,
            )

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Compute x_t for a batch of timesteps `b`; `x0` and `eps` are `b ...`."""
        return diffuse(x0, eps, self.at(t).to(x0).view(-1, *[1] * (x0.ndim - 1)))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the training target of the network: eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0."""
        if self.prediction == "epsilon":
            return eps
        a = self.at(t).to(x0).view(-1, *[1] * (x0.ndim - 1))
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    def split(self, x: Tensor, output: Tensor, a: float) -> tuple[Tensor, Tensor]:
        """Return (eps, x_0), computed from the network's output at x_t. Only this function and `target` depend on `prediction`."""
        if self.prediction == "epsilon":
            return output, (x - (1 - a) ** 0.5 * output) / a**0.5
        return a**0.5 * output + (1 - a) ** 0.5 * x, a**0.5 * x - (1 - a) ** 0.5 * output


def karras_sigmas(most: float, least: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Eq. 5 of arXiv 2206.00364: sigma^(1/rho) falls linearly from the largest value to the smallest."""
    first, last = math.pow(most, 1 / rho), math.pow(least, 1 / rho)
    return np.power(first + np.linspace(0, 1, steps) * (last - first), rho)


@functools.lru_cache(maxsize=16)
def _alphas_on(schedule: Schedule, device: torch.device) -> Tensor:
    return schedule.alphas.to(device)
