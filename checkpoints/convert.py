"""Convert checkpoints to other layouts, and compare them tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.adapters import adapter_file, adapter_kind, is_plus_v2, problems
from checkpoints.base import Base
from checkpoints.cards import save
from checkpoints.clip import load_image_encoder, load_text_encoder
from checkpoints.controls import load_control, save_control_diffusers
from checkpoints.describe import kind_of
from checkpoints.diffusers_folder import save_image, save_pipeline, save_text, save_unet, save_vae
from checkpoints.files import read_json_if_there, replacing_in, short_list, write_json, write_tensors
from checkpoints.lora import open_lora
from checkpoints.single_file import load_single
from checkpoints.stable_diffusion import load_base, load_unet, load_vae, scheduler_config
from model.unet import UNet
from model.words import Prediction

_LOADERS: dict[str, Callable[..., nn.Module]] = {
    "unet": load_unet,
    "vae": load_vae,
    "text_encoder": load_text_encoder,
    "image_encoder": load_image_encoder,
    "controlnet": load_control,
    "t2i": load_control,
}
_DIFFUSERS: dict[str, Callable[..., None]] = {
    "unet": save_unet,
    "vae": save_vae,
    "text_encoder": save_text,
    "image_encoder": save_image,
    "controlnet": save_control_diffusers,
    "t2i": save_control_diffusers,
}


def convert(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    diffusers: bool = False,
    prediction: Prediction | None = None,
) -> None:
    """Convert an adapter to the official layout, and a base model, one of its networks or a control to this project's format.

    `ema`: use the EMA copy of the UNet in a single file. `diffusers`: write a base model, network or control as a diffusers folder.
    `prediction`: what the UNet predicts, where the files do not say it. `dtype=None` keeps every tensor bit for bit.
    Raises ValueError for invalid input, and OSError if the target cannot be written. In both cases, existing files are unchanged.
    """
    kind = kind_of(source)
    _check(kind, source, target, ema, diffusers, prediction)
    if kind == "adapter":
        _convert_adapter(source, target, dtype)
    elif kind == "base":
        base = load_single(source, None, ema, prediction=prediction) if source.is_file() else load_base(source, None, prediction)
        if diffusers:
            save_pipeline(base, scheduler_config(source), target, dtype)
        else:
            _save_own(base, source, target, dtype)
    elif diffusers:
        _DIFFUSERS[kind](_LOADERS[kind](source, dtype=None), target, dtype)
    else:
        part = _LOADERS[kind](source, dtype=None)
        if isinstance(part, UNet) and prediction:
            part.config = replace(part.config, prediction=prediction)
        save(part, target, {"converted_from": source.name}, dtype)


def _check(kind: str, source: Path, target: Path, ema: bool, diffusers: bool, prediction: Prediction | None) -> None:
    """Raise ValueError if the options or the kind of target do not fit the kind of source."""
    one_file = kind != "base" and not diffusers
    ends = (".safetensors", ".bin") if kind == "adapter" else (".safetensors",)
    if kind == "lora":
        raise ValueError(f"{source} is a LoRA, which is not converted: merge it when drawing, with --lora")
    if diffusers and kind == "adapter":
        raise ValueError(f"{source} is an adapter, which diffusers reads from its official file: leave out --diffusers")
    if one_file and target.suffix not in ends:
        raise ValueError(f"{source} converts to one file: name TARGET{' or TARGET'.join(ends)}, not {target}")
    if ema and (kind != "base" or source.is_dir()):
        raise ValueError(f"{source} is not a base model in a single file, so it has no EMA copy: leave out --ema")
    if prediction and kind != "base" and (kind != "unet" or diffusers):
        raise ValueError(f"{source} converts to files that do not say what a UNet predicts: leave out --prediction")
    if target.exists() and one_file == target.is_dir():
        there, expected = ("folder", "file") if one_file else ("file", "folder")
        raise ValueError(f"{target} is a {there}: name a {expected} to write")
    card = target.with_suffix(".json")
    if kind == "adapter" and isinstance(read_json_if_there(card).get("config"), dict):  # the adapter would be taken for this network
        raise ValueError(f"{target} would have a card beside it, {card.name}, which describes a network: name another TARGET, or remove it")


def _convert_adapter(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    file = adapter_file(source)
    if reasons := problems(file):
        raise ValueError(f"{source} is not a complete adapter: {'; '.join(reasons)}")
    if (kind := adapter_kind(file)).startswith("IP-Adapter FaceID Plus") and kind.endswith("V2") != is_plus_v2(target):
        name = "keep plusv2 in its name" if kind.endswith("V2") else "leave plusv2 out of its name"
        raise ValueError(f"{source} is {kind}, which only the name of a file says: name another TARGET than {target}, and {name}")
    write_tensors(target, {name: file[name] for name in file}, dtype)


def _save_own(base: Base, source: Path, target: Path, dtype: torch.dtype | None) -> None:
    with replacing_in(target) as part:
        for name, module in base.parts.items():
            save(module, part / f"{name}.safetensors", {"converted_from": source.name}, dtype)
        if scheduler := scheduler_config(source):
            write_json(part / "scheduler" / "scheduler_config.json", scheduler)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, under this project's names. Adapters keep the official names."""
    kind = kind_of(path)
    if kind == "adapter":
        return dict(adapter_file(path))
    if kind == "lora":
        return dict(open_lora(path))
    if kind == "base":
        parts = load_base(path, dtype=None, prediction="v").parts  # it makes no difference to the tensors
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    return dict(_LOADERS[kind](path, dtype=None).state_dict())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def verify(a: Path, b: Path) -> list[str]:
    """Compare two checkpoints of any layout, tensor by tensor.

    Return a list of differences, which is empty if they are equal bit for bit.
    """
    one, two = tensors_of(a), tensors_of(b)
    lines = [
        f"only in {path}: {short_list(names)}"
        for path, names in ((a, one.keys() - two.keys()), (b, two.keys() - one.keys()))
        if names
    ]
    for name in sorted(one.keys() & two.keys()):
        x, y = one[name], two[name]
        if x.shape != y.shape:
            lines.append(f"{name}: {list(x.shape)} against {list(y.shape)}")
        elif x.dtype != y.dtype or not torch.equal(_bytes(x), _bytes(y)):
            lines.append(
                f"{name}: {x.dtype} against {y.dtype}, largest difference {float((x.double() - y.double()).abs().max()):.3g}"
            )
    return lines
