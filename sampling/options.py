"""The options of `python -m sampling`: arguments become a Command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sampling.fields import check_number
from sampling.following import flag, options_by_file
from sampling.parser import MACHINE, parser
from sampling.request import Command, HintFile, ImagePrompt, LoraFile, Model, Request

# The options of an image prompt, and so of each --ip-adapter, with the field of ImagePrompt that each fills.
PROMPT = {
    "image": "images",
    "image_weight": "weights",
    "image_rule": "rule",
    "negative_image": "negatives",
    "scale": "scale",
    "image_layers": "layers",
    "image_start": "start",
    "image_end": "end",
    "image_mask": "mask",
}
CONTROL = {  # the options of each --control, with the field of HintFile that each fills
    "hint": "picture",
    "control_scale": "scale",
    "control_start": "start",
    "control_end": "end",
    "guess": "guess",
}
REPEATED = ("image", "image_weight", "negative_image")  # those that may be given more than once for one adapter


def parse(argv: Sequence[str] | None = None, about: str | None = None) -> Command:
    """Parse arguments into a Command. Raises ValueError when they contradict each other."""
    arguments = vars(parser(about).parse_args(argv))
    own = {"again", "out", "save_embedding", "device", *MACHINE}
    if "again" in arguments and (other := sorted(arguments.keys() - own)):
        flags = ", ".join("--no-paste" if name == "paste" else flag(name) for name in other)
        raise ValueError(f"--again takes every setting from its picture: leave out {flags}")
    adapters = arguments.pop("ip_adapter", [])
    if prompts := image_prompts(arguments, adapters):
        arguments["image_prompts"] = prompts
    controls = arguments.pop("control", [])
    arguments["hints"] = hint_files(arguments, controls)
    arguments["loras"] = lora_files(arguments)

    def fill(kind: type[Any]) -> dict[str, Any]:
        return {each.name: arguments[each.name] for each in fields(kind) if each.name in arguments}

    request, model = Request(**fill(Request)), Model(adapters=tuple(adapters), controls=tuple(controls), **fill(Model))
    command = Command(request, model, **fill(Command))
    if command.num < 1:
        raise ValueError(f"--num must be at least 1, not {command.num}")
    if (path := command.save_embedding) and path.suffix != ".safetensors":
        raise ValueError(f"{path}: embeddings are written as safetensors, which --image reads: use the name {path.stem}.safetensors")
    if "fit" in arguments and not request.image_prompts:
        raise ValueError("--fit is for an image prompt: name it with --image")
    if not request.unconditional:
        check_no_negatives(request)
    return command


def check_no_negatives(request: Request) -> None:
    """Raise ValueError for what only the unconditional pass would read."""
    negatives = {"--negative-prompt": request.negative_prompt, "--negative-image": any(one.negatives for one in request.image_prompts)}
    if unread := [name for name, given in negatives.items() if given]:
        raise ValueError(f"{unread[0]} is for the unconditional pass, which --guidance 1 leaves out: raise --guidance, or leave it out")


def image_prompts(arguments: dict[str, Any], adapters: Sequence[Path]) -> tuple[ImagePrompt, ...]:
    """Take the options of image prompts out of `arguments`. Raises ValueError if they are ambiguous."""
    several, prompts = len(adapters) > 1, []
    for place, own in enumerate(options_by_file(arguments, PROMPT, "ip_adapter", adapters, "--image and --scale", REPEATED)):
        if "image" in own:
            values: dict[str, Any] = {PROMPT[name]: v if name in REPEATED else v[0] for name, v in own.items()}
            if "rule" in values and "weights" not in values:
                raise ValueError("--image-rule says what the weights of pictures multiply: give each --image an --image-weight")
            prompts.append(ImagePrompt(**values))
        elif several:
            raise ValueError(
                f"of several --ip-adapter, each is followed by its own --image; {adapters[place]} has none"
            )
        elif alone := [name for name in own if name != "scale"]:  # a scale without a picture has no effect
            raise ValueError(f"{flag(alone[0])} is for an image prompt: name it with --image")
        else:
            for value in own.get("scale", ()):
                check_number(value, "scale")
    return tuple(prompts)


def hint_files(arguments: dict[str, Any], controls: Sequence[Path]) -> tuple[HintFile, ...]:
    """Take the options of controls out of `arguments`. Raises ValueError if they are ambiguous, or if a control has no hint."""
    hints = []
    for place, own in enumerate(options_by_file(arguments, CONTROL, "control", controls, "--hint and --control-scale")):
        if own and not controls:
            raise ValueError(f"{flag(next(iter(own)))} is for a control: name its file with --control")
        if controls and "hint" not in own:
            raise ValueError(f"{controls[place]} needs a hint, such as a picture of edges: name it with --hint")
        if own:
            hints.append(HintFile(**{CONTROL[name]: values[0] for name, values in own.items()}))
    return tuple(hints)


def lora_files(arguments: dict[str, Any]) -> tuple[LoraFile, ...]:
    """Take the LoRAs and their scales out of `arguments`. Raises ValueError if they are ambiguous."""
    files = arguments.pop("lora", [])
    scales = [own.get("lora_scale", [LoraFile.scale]) for own in options_by_file(arguments, ["lora_scale"], "lora", files, "--lora-scale")]
    if not files and scales != [[LoraFile.scale]]:
        raise ValueError("--lora-scale is for a LoRA: name its file with --lora")
    return tuple(LoraFile(file, scale[0]) for file, scale in zip(files, scales, strict=False))
