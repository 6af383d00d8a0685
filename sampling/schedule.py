"""The noise schedule: alpha-bar, which timesteps to visit, and what epsilon and v mean.

Written a_t here for the cumulative product alpha-bar_t; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Prediction = Literal["epsilon", "v"]
Spacing = Literal["leading", "trailing", "linspace", "ldm"]


def noised(x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, where `a` broadcasts to x_0."""
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


@dataclass(frozen=True)
class Schedule:
    """Stable Diffusion's schedule; the default is SD 1.5's.

    `spacing` places the timesteps: the three of arXiv 2305.08891, Table 2, as diffusers rounds them, or the original LDM's;
    None takes the sampler's own, leading for DDIM and linspace for DPM-Solver++. `offset` is added to leading timesteps.
    `final_one` (DDIM): after the last step a = 1 instead of a_0. `karras` (DPM-Solver++): the noise levels of arXiv 2206.00364.
    `not_dpm` names settings of the scheduler's file that our DPM-Solver++ doesn't follow; it refuses to draw where there are any.
    """

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Prediction = "epsilon"
    spacing: Spacing | None = None
    offset: int = 1
    final_one: bool = False
    karras: bool = False
    not_dpm: tuple[str, ...] = ()

    @property
    def alphas(self) -> Tensor:
        """a_0 .. a_{T-1}, float32: beta is linear in its square root ("scaled linear")."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, dtype=torch.float32) ** 2
        return torch.cumprod(1 - betas, dim=0)

    def at(self, t: Tensor) -> Tensor:
        """a_t for timesteps of any shape, float32, on their device."""
        return _alphas_on(self, t.device)[t]

    def visits(self, steps: int) -> list[int]:
        """The timesteps that `steps` steps visit, from noise to picture. LDM's rule visits more if steps do not divide T.

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
        """(t, a_t, a_prev) of each step. a_prev belongs to t - T // steps (diffusers), or to the next visit (LDM)."""
        alphas, visits = self.alphas.double(), self.visits(steps)
        self.warn_of_late_start(steps, visits[0])
        final = 1.0 if self.final_one else float(alphas[0])
        after = [*visits[1:], -1] if self.spacing == "ldm" else [t - self.timesteps // steps for t in visits]
        return [
            (t, float(alphas[t]), float(alphas[p]) if p >= 0 else final) for t, p in zip(visits, after, strict=True)
        ]

    def warn_of_late_start(self, steps: int, first: int) -> None:
        """Warn if many leading steps begin below 0.9 T, where x_t is no longer noise, because T / steps is rounded down."""
        fewer = self.timesteps // (self.timesteps // steps + 1)
        if self.spacing in ("leading", None) and 10 * steps > self.timesteps and first < 0.9 * self.timesteps:
            warnings.warn(
                f"{steps} steps with leading spacing begin at timestep {first} of {self.timesteps}, as in diffusers, and give a "
                f"washed-out picture: take {fewer} steps",
                stacklevel=3,
            )

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for a batch of timesteps `b`; `x0` and `eps` are `b ...`."""
        return noised(x0, eps, self.at(t).to(x0).view(-1, *[1] * (x0.ndim - 1)))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network predicts: eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0."""
        if self.prediction == "epsilon":
            return eps
        a = self.at(t).to(x0).view(-1, *[1] * (x0.ndim - 1))
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    def split(self, x: Tensor, output: Tensor, a: float) -> tuple[Tensor, Tensor]:
        """(eps, x_0) from a network's output at x_t: the one boundary between epsilon and v."""
        if self.prediction == "epsilon":
            return output, (x - (1 - a) ** 0.5 * output) / a**0.5
        return a**0.5 * output + (1 - a) ** 0.5 * x, a**0.5 * x - (1 - a) ** 0.5 * output


@functools.lru_cache(maxsize=16)
def _alphas_on(schedule: Schedule, device: torch.device) -> Tensor:
    return schedule.alphas.to(device)
