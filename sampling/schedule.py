"""The noise schedule: alpha-bar, which timesteps to visit, and what epsilon and v mean.

Written a_t here for the cumulative product alpha-bar_t; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Prediction = Literal["epsilon", "v"]
Spacing = Literal["leading", "trailing", "linspace", "ldm"]


@dataclass(frozen=True)
class Schedule:
    """Stable Diffusion's schedule; the default is SD 1.5 with DDIM.

    `spacing` names how `visits` places the timesteps: the three of arXiv 2305.08891, Table 2, as diffusers rounds them, or
    the original LDM's. `offset` is added to leading timesteps. `final_one`: after the last step a = 1 instead of a_0.
    """

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Prediction = "epsilon"
    spacing: Spacing = "leading"
    offset: int = 1
    final_one: bool = False

    @property
    def alphas(self) -> Tensor:
        """a_0 .. a_{T-1}, float32: beta is linear in its square root ("scaled linear")."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, dtype=torch.float32) ** 2
        return torch.cumprod(1 - betas, dim=0)

    def visits(self, steps: int) -> list[int]:
        """The timesteps that `steps` steps visit, from noise to picture. LDM's rule visits more where steps do not divide T.

        Raises ValueError unless 1 <= steps <= T.
        """
        total, grid = self.timesteps, np.zeros(0)
        if not 1 <= steps <= total:
            raise ValueError(f"steps must be between 1 and {total}, not {steps}")
        if self.spacing == "ldm":
            grid = np.arange(0.0, total, total // steps) + 1
        elif self.spacing == "leading":
            grid = np.arange(0.0, steps) * (total // steps) + self.offset
        elif self.spacing == "trailing":
            return [int(t) for t in np.round(np.arange(total, 0, -total / steps))[:steps] - 1]
        else:
            grid = np.linspace(0, total - 1, steps).round()
        return [min(int(t), total - 1) for t in grid[::-1]]

    def pairs(self, steps: int) -> list[tuple[int, float, float]]:
        """(t, a_t, a_prev) of each step. a_prev belongs to t - T // steps (diffusers), or to the next visit (LDM)."""
        alphas, visits = self.alphas.double(), self.visits(steps)
        final = 1.0 if self.final_one else float(alphas[0])
        after = [*visits[1:], -1] if self.spacing == "ldm" else [t - self.timesteps // steps for t in visits]
        return [
            (t, float(alphas[t]), float(alphas[p]) if p >= 0 else final) for t, p in zip(visits, after, strict=True)
        ]

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps for a batch of timesteps `b`."""
        a = self.alphas.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network predicts: eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0."""
        if self.prediction == "epsilon":
            return eps
        a = self.alphas.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    def split(self, x: Tensor, output: Tensor, a: float) -> tuple[Tensor, Tensor]:
        """(eps, x_0) from a network's output at x_t: the one boundary between epsilon and v."""
        if self.prediction == "epsilon":
            return output, (x - (1 - a) ** 0.5 * output) / a**0.5
        return a**0.5 * output + (1 - a) ** 0.5 * x, a**0.5 * x - (1 - a) ** 0.5 * output


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The DDIM schedule of a diffusers `scheduler_config.json`, whichever scheduler that names; {} gives SD 1.5's.

    As diffusers' pipeline does, `steps_offset` is 1 and samples are never clipped, whatever the file says; what it leaves
    out is as in `DDIMScheduler`. Raises ValueError for what Stable Diffusion's schedule is not.
    """
    if config:
        config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True, **config}
    for key, value in {
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        "thresholding": False,
    }.items():
        if config.get(key, value) != value:
            raise ValueError(f"the scheduler's {key} is {config[key]}; only {value} is read")
    kind, spacing = config.get("prediction_type", "epsilon"), config.get("timestep_spacing", "leading")
    if kind not in ("epsilon", "v_prediction") or spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(f"the scheduler's prediction_type {kind} or timestep_spacing {spacing} is not read")
    default = Schedule()
    return Schedule(
        timesteps=config.get("num_train_timesteps", default.timesteps),
        beta_start=config.get("beta_start", default.beta_start),
        beta_end=config.get("beta_end", default.beta_end),
        prediction="v" if kind == "v_prediction" else "epsilon",
        spacing=spacing,
        final_one=config.get("set_alpha_to_one", default.final_one),
    )
