"""Write a Request and a Model as the command that draws them: the inverse of `sampling.options.parse`."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sampling.fields import map_paths, to_json
from sampling.following import flag
from sampling.options import CONTROL, PROMPT
from sampling.request import HintFile, ImagePrompt, LoraFile, Model, Request


def arguments(request: Request, model: Model) -> list[str]:
    """Return the arguments that `parse` reads as this request and model.

    Fields with their default value are left out, and so is what is negative where nothing reads it.
    """
    if not request.unconditional:
        prompts = tuple(replace(prompt, negatives=()) for prompt in request.image_prompts)
        request = replace(request, negative_prompt="", image_prompts=prompts)
    files, scales = ("checkpoint", "image_encoder", "vae", "prediction", "dtype"), ("face_lora_scale", "face_structure_scale")
    base = _options(model, {name: name for name in (*files, *scales)})
    base += [option for lora in model.loras for option in (f"--lora={lora.path}", *_options(lora, {"lora_scale": "scale"}))]
    lists = {"image_prompts", "hints"}
    plain = {field.name: field.name for field in fields(Request) if field.name not in lists}
    options = [*base, *_options(request, plain)]
    for i in range(max(len(request.image_prompts), len(model.adapters))):
        options += [f"--ip-adapter={path}" for path in model.adapters[i : i + 1]]
        options += [each for prompt in request.image_prompts[i : i + 1] for each in _options(prompt, PROMPT)]
    for control, hint in zip(model.controls, request.hints, strict=False):
        options += [f"--control={control}", *_options(hint, CONTROL)]
    return options


def command_line(request: Request, model: Model) -> str:
    """Return the whole command, quoted for a shell. Files below the current folder get their name from there."""
    here = Path.cwd()

    def near(path: Path) -> Path:
        return path.relative_to(here) if path.is_relative_to(here) else path

    apart = [one if "=-" in one else one.split("=", 1) for one in arguments(map_paths(request, near), model)]
    words = [each for one in apart for each in ([one] if isinstance(one, str) else one)]
    return shlex.join(["python", "-m", "sampling", *words])


def _options(item: Request | Model | LoraFile | ImagePrompt | HintFile, names: dict[str, str]) -> list[str]:
    """Write the fields of an item as `--option=value`, and pairs of a Request as `--option value value`. `names` maps options to fields."""
    defaults = {field.name: field.default for field in fields(item)}
    options = []
    for option, name in names.items():
        value = getattr(item, name)
        if value == defaults[name]:
            continue
        if isinstance(item, Request) and isinstance(value, tuple):
            options += [flag(option), *map(str, value)]
            continue
        for one in value if isinstance(value, tuple) and name != "layers" else [value]:
            options.append(_option(option, one))
    return options


def _option(option: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(option) if value else f"--no-{option}"
    return f"{flag(option)}={json.dumps(to_json(value)) if isinstance(value, dict | tuple) else value}"
