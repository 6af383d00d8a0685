"""Convert a diffusers `scheduler_config.json` to a Schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from sampling.sampler import Sampler
from sampling.schedule import Schedule

# Settings that affect every sampler, with their supported values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "thresholding": (False, None),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
# Settings of diffusers' `EulerDiscreteScheduler`, with the values for which it equals `sampling.euler`.
_EULER: dict[str, tuple[Any, ...]] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "sigma_min": (None,),
    "sigma_max": (None,),
}
# The same for `DPMSolverMultistepScheduler` and `sampling.dpm`. It treats the solver types of other schedulers ("logrho", "bh1",
# "bh2") as "midpoint". `lower_order_final` and `euler_at_final` have no effect if the last step ends at sigma = 0.
_DPM: dict[str, tuple[Any, ...]] = {
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
# The same for `LCMScheduler` and `sampling.lcm`.
_LCM: dict[str, tuple[Any, ...]] = {"original_inference_steps": (50,), "timestep_scaling": (10, 10.0)}


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


_POSSIBLE: dict[str, Callable[[Any], bool]] = {
    "beta_start": _is_beta,
    "beta_end": _is_beta,
    "num_train_timesteps": lambda value: type(value) is int and 1 < value <= 100_000,
    "set_alpha_to_one": lambda value: type(value) is bool,
    "use_karras_sigmas": lambda value: type(value) is bool,
    "lambda_min_clipped": lambda value: type(value) in (int, float) and not math.isnan(value),
}


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """Convert a diffusers `scheduler_config.json`, of any scheduler class, to a Schedule. {} gives the schedule of SD 1.5.

    As in diffusers' pipeline, `steps_offset` is always 1 and samples are never clipped. Missing entries get the defaults of
    the sampler. Raises ValueError for invalid values, and for schedules that Stable Diffusion does not use.
    """
    if config:
        config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True, **config}
    for key, is_possible in _POSSIBLE.items():
        if key in config and not is_possible(config[key]):
            raise ValueError(f"its {key} is {config[key]!r}, which is not a valid value")
    for key, values in _FIXED.items():
        if key in config and not _is_one_of(config[key], values):
            raise ValueError(f"its {key} is {config[key]!r}, but only {' or '.join(map(str, values))} is supported")
    default = Schedule()
    schedule = Schedule(
        timesteps=config.get("num_train_timesteps", default.timesteps),
        beta_start=config.get("beta_start", default.beta_start),
        beta_end=config.get("beta_end", default.beta_end),
        prediction="v" if config.get("prediction_type") == "v_prediction" else "epsilon",
        spacing=config.get("timestep_spacing"),
        final_one=_is_euler(config) or config.get("set_alpha_to_one", default.final_one),
        karras=bool(config.get("use_karras_sigmas")),
    )
    by_dpm, by_euler, by_lcm = _unsupported_by_dpm(config, schedule), _others(config, _EULER), _others(config, _LCM)
    return replace(schedule, unsupported_by_dpm=by_dpm, unsupported_by_euler=by_euler, unsupported_by_lcm=by_lcm)


def _is_euler(config: Mapping[str, Any]) -> bool:
    """Return whether the file's own sampler is Euler at leading timesteps, as in SDXL.

    It ends at a = 1, whatever `set_alpha_to_one` says, and DDIM that does so is the same sampler.
    """
    leading = config.get("timestep_spacing") == "leading" and not config.get("use_karras_sigmas")
    return config.get("_class_name") == "EulerDiscreteScheduler" and leading


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    return any(value is each or (value == each and type(value) is type(each)) for each in values)


def _others(config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    """List the settings with other values than the supported ones."""
    return tuple(f"{key} = {config[key]}" for key, values in supported.items() if key in config and not _is_one_of(config[key], values))


def _unsupported_by_dpm(config: Mapping[str, Any], schedule: Schedule) -> tuple[str, ...]:
    """List the settings that our DPM-Solver++ does not support."""
    others, a = list(_others(config, _DPM)), schedule.alphas[-1].double()
    if config.get("variance_type") in ("learned", "learned_range"):
        others.append(f"variance_type = {config['variance_type']}")
    minimum = config.get("lambda_min_clipped", -math.inf)
    if minimum > 0.5 * float(torch.log(a / (1 - a))):  # it would cut off the first timesteps
        others.append(f"lambda_min_clipped = {minimum}")
    return tuple(others)


def other_scheduler(config: Mapping[str, Any], sampler: Sampler) -> str | None:
    """Return the class that a scheduler file names, if the sampler does not equal it.

    With leading spacing, DDIM that ends at a = 1 equals Euler's method.
    """
    name = config.get("_class_name")
    same = sampler.name == "ddim" and _is_euler(config)
    return name if isinstance(name, str) and name != sampler.peer and not same else None
