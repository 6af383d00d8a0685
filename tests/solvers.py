"""What the tests of samplers share: a stand-in for a network, DDIM's trajectory in diffusers, and scheduler files."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from sampling.sampler import randn
from sampling.schedule import Schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SD15 = BETAS | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
FILES: dict[str, dict[str, Any]] = {
    "SD 1.5": {"_class_name": "PNDMScheduler", **SD15},
    "SD 2.1": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **SD15},
    "no word of the last step": {"_class_name": "DPMSolverMultistepScheduler", "steps_offset": 1, **BETAS},
    "trailing": {"timestep_spacing": "trailing", **SD15},
    "other betas": {**SD15, "beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 800},
    "Karras": {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, **SD15},
    "DPM++ 2M Karras": {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_karras_sigmas": True,
        "timestep_spacing": "leading",
        **SD15,
    },
}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def denoiser(x: Tensor, t: float) -> Tensor:
    """A fixed smooth function of x and t, as a stand-in for a network."""
    return torch.sin(1.3 * x + t / 300) + 0.3 * x.roll(1, dims=-1) * math.cos(t / 100)


def ddim_trajectory(x: Tensor, schedule: Schedule, steps: int, eta: float, exact: bool) -> list[Tensor]:
    """Return diffusers' latents after every step, with noise from generators 5, 6. With `exact`, its float32 alphas become float64."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=schedule.final_one,
        steps_offset=schedule.offset,
        timestep_spacing=schedule.spacing,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[schedule.prediction],
    )
    scheduler.set_timesteps(steps)
    if exact:
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
            scheduler.alphas_cumprod.double(),
            scheduler.final_alpha_cumprod.double(),
        )
    noise, states = generators(5, 6), []
    for t in scheduler.timesteps.tolist():
        silent = eta == 0 or (
            schedule.final_one and t < 1000 // steps
        )  # sigma is 0 in a step to a = 1: we draw no noise
        z = torch.zeros_like(x) if silent else randn(x.shape[1:], noise, x)
        x = scheduler.step(denoiser(x, t), t, x, eta=eta, variance_noise=z).prev_sample
        states.append(x)
    return states


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
