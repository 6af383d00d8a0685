"""Detect and describe the content of a file or folder of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from checkpoints.adapters import (
    BASES,
    ENCODERS,
    adapter_file,
    adapter_kind,
    adapter_sizes,
    display_name,
    encoder_name,
    problems,
    projection_of,
)
from checkpoints.clip import load_image_encoder, load_text_encoder
from checkpoints.controls import OWN, open_control
from checkpoints.files import printable, read_json_if_there, short_list
from checkpoints.lora import is_lora, open_lora, read_updates
from checkpoints.reader import File
from checkpoints.single_file import load_single, single_kind, single_settings
from checkpoints.skeletons import image_skeleton, text_skeleton
from checkpoints.stable_diffusion import as_ldm_vae, load_unet, load_vae
from model.features import GLOBAL
from model.image_projection import Projection

_SKELETONS: dict[str, Callable[..., nn.Module]] = {  # loaders of the networks; CLIP encoders are loaded as skeletons, without open_clip
    "unet": load_unet,
    "vae": load_vae,
    "text_encoder": partial(load_text_encoder, build=text_skeleton),
    "text_encoder_2": partial(load_text_encoder, build=text_skeleton),
    "image_encoder": partial(load_image_encoder, build=image_skeleton),
}
_NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_CONTROLS = {"a ControlNet": "controlnet", "a T2I-Adapter": "t2i"}
_CLASSES = {
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder",
    "CLIPVisionModelWithProjection": "image_encoder",
    "CLIPModel": "image_encoder",
    "ControlNetModel": "controlnet",
    "T2IAdapter": "t2i",
}
# For each network, an entry that occurs only in its config. (A ControlNet's config also has the entries of a UNet's.)
_CONFIG_ENTRIES = OWN | {"prediction": "unet", "scale": "vae", "vocabulary": "text_encoder", "patch": "image_encoder"}


def kind_of(path: Path) -> str:
    """Detect the content of `path`: "base", "adapter", "lora", "controlnet", "t2i", "unet", "vae", "text_encoder" or "image_encoder".

    Raises FileNotFoundError if `path` does not exist, and ValueError if it is none of these.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_dir():
        if (path / "unet").is_dir() or (path / "unet.safetensors").exists():
            return "base"
        if kind := _kind_of_folder(path):
            return kind
        raise ValueError(
            f"{path} holds no supported weights: neither a base model, nor a config.json that names a network"
        )
    file, card = File(path), read_json_if_there(path.with_suffix(".json"))
    entries = card.get("config")
    for key, kind in _CONFIG_ENTRIES.items():
        if isinstance(entries, dict) and key in entries:
            return kind
    if any(name.startswith(("image_proj.", "image_proj_model.")) for name in file):
        return "adapter"
    if is_lora(file):
        return "lora"
    if (kind := single_kind(file)) != "not a base model":
        return _CONTROLS.get(kind, "base")
    if kind := _kind_of_folder(path.parent) or ("vae" if as_ldm_vae(file) else ""):
        return kind
    origin = f" (made by `{printable(str(card['command']))}`)" if "command" in card else ""
    raise ValueError(
        f"{path} is neither a base model, an adapter nor one of their networks{origin}; it holds {short_list(file)}"
    )


def _kind_of_folder(folder: Path) -> str:
    """Return the kind of network in a folder, from its `config.json`; "" if there is none or it is not supported."""
    config = read_json_if_there(folder / "config.json")
    classes = config.get("_class_name") or config.get("architectures")
    return _CLASSES.get(str(classes[0] if isinstance(classes, list) and classes else classes), "")


def _size(tensors: Iterable[Tensor]) -> str:
    """Describe the number of parameters and tensors, and their dtypes."""
    sizes = [(str(tensor.dtype).removeprefix("torch."), tensor.numel()) for tensor in tensors]
    count = {dtype: sum(n for kind, n in sizes if kind == dtype) for dtype, _ in sizes}
    kinds = ", ".join(count) if len(count) == 1 else ", ".join(f"{n:,} {dtype}" for dtype, n in count.items())
    return f"{sum(count.values()):,} parameters in {len(sizes)} tensors, {kinds}"


_FOR = {  # what the name of a released file says of its use; the first that fits
    "plusv2": "FaceID PlusV2, by the name of the file: FaceID Plus has the same tensors, so keep the name",
    "faceid-plus": "FaceID Plus, by the name of the file: PlusV2 has the same tensors, and must have plusv2 in its name",
    "plus-face": "for a picture that is cropped to a face",
    "full-face": "for a picture that is cropped to a face, without its background",
    "light": "the light version, by the name of the file: it follows the text more closely",
}


def _uses(path: Path, projection: Projection, has_lora: bool) -> list[str]:
    """Describe an adapter: its release, what it needs, and the base models it fits."""
    reads, base = projection.reads, display_name(BASES, projection.context_dim)
    needs = []
    if reads.face:
        needs.append("a face embedding in a file (docs/drawing.md), as InsightFace gives it: --image face.safetensors")
    if reads.needs_encoder:
        needs.append(f"--image-encoder: the folder of {display_name(ENCODERS[reads], projection.image_dim)}")
    lines = [about for part, about in _FOR.items() if part in path.name.lower()][:1]
    lines += [f"needs {' and '.join(needs)}", f"goes with {base} and models that were tuned from it"]
    if has_lora:
        lines.append("holds a LoRA of the base model's attention layers, which is merged on loading; --face-lora-scale 0 leaves it out")
    return lines


def _describe_adapter(path: Path) -> list[str]:
    file = adapter_file(path)
    projection, count = projection_of(file), adapter_sizes(file).get("tokens")
    tokens = f"{count} tokens" if count else "one token per feature"
    context_dim, reads = projection.context_dim, encoder_name(projection.reads, projection.image_dim)
    layers = [int(m[1]) for name in file if (m := re.match(r"ip_adapter\.(\d+)\.to_k_ip\.weight$", name))]
    lines = [
        f"{adapter_kind(file)} for {display_name(BASES, context_dim)}, reads {reads}, {tokens}",
        f"{len(layers)} cross-attention layers, {_size(file[name] for name in file)}",
        *_uses(path, projection, any("_lora." in name for name in file)),
    ]
    expected = {768: 16, 1024: 16, 2048: 70}.get(context_dim, len(layers))
    if len(layers) != expected:
        lines.append(f"odd: {display_name(BASES, context_dim)} has {expected} cross-attention layers")
    if sorted(layers) != list(range(1, 2 * len(layers), 2)):
        lines.append("odd: its layers are not numbered 1, 3, 5, ...")
    return lines + [f"odd: {line}" for line in problems(file)]


def _describe_lora(path: Path) -> list[str]:
    updates = read_updates(open_lora(path))
    ranks = sorted({len(update.down) for update in updates.values()})
    size = _size(part for update in updates.values() for part in (update.down, update.up))
    texts = sum(name.startswith(("lora_te", "text_")) for name in updates)
    inside = f"{len(updates) - texts} modules of the UNet, {texts} of the text encoder"
    return [f"a LoRA of {inside}, rank {', '.join(map(str, ranks))}, {size}", "merge it with --lora FILE --lora-scale 0.8"]


def _describe_single(path: Path) -> list[str]:
    file = File(path)
    lines = [f"{single_kind(file)}, a single file: {_size(file[name] for name in file)}"]
    try:
        prediction = single_settings(path).prediction
        base = load_single(path, dtype=None, build=text_skeleton, prediction=prediction or "v")
        for name, part in base.parts.items():
            lines.append(f"{_NAMES.get(name, name)}: {_size(part.state_dict().values())}")
        if prediction is None:
            lines.append("the file does not say whether the UNet predicts epsilon or v: give --prediction, or put its .yaml beside it")
        channels, latent = base.unet.config.in_channels, base.vae.config.latent_channels
        if channels == 2 * latent + 1:
            lines.append(f"for inpainting: the UNet reads {channels} channels, which include a mask and the masked image")
        elif channels != latent:
            lines.append(f"odd: the UNet reads {channels} channels, but its VAE gives {latent}")
    except ValueError as error:
        lines.append(f"odd: {error}")
    if ema := [name for name in file if name.startswith("model_ema.")]:
        lines.append(f"an EMA copy of the UNet: {len(ema)} tensors (to use it, convert with --ema)")
    return lines


def _describe_control(path: Path) -> list[str]:
    control, file, names, _ = open_control(path)
    config, size = asdict(control.config), _size(file[name] for (name,) in names.values())
    settings = ", ".join(f"{k} {v}" for k, v in config.items() if k not in ("out_channels", "prediction", "sample_size"))
    if "context_dim" in config:
        return [f"ControlNet for {display_name(BASES, config['context_dim'])}, {size}", settings]
    return [f"T2I-Adapter, {size}", settings]


def inspect(path: Path) -> list[str]:
    """Describe a file or folder of weights: its kind, sizes and dtypes, and anything missing or unusual.

    Raises FileNotFoundError if it does not exist, and ValueError if it is not supported.
    """
    kind = kind_of(path)
    if kind == "adapter":
        return _describe_adapter(path)
    if kind == "base" and path.is_file():
        return _describe_single(path)
    if kind == "base":
        lines = [
            "a base model in a diffusers folder"
            if (path / "unet").is_dir()
            else "a base model in this project's own format"
        ]
        for name in _SKELETONS:
            part = path / name if (path / name).is_dir() else path / f"{name}.safetensors"
            if part.exists():
                lines += [f"{name}: {line}" for line in inspect(part)]
            elif name not in ("text_encoder_2", "image_encoder"):
                lines.append(f"odd: it has no {name}")
        return lines
    if kind == "lora":
        return _describe_lora(path)
    if kind in _CONTROLS.values():
        return _describe_control(path)
    module: Any = _SKELETONS[kind](path, dtype=None)
    config = {k: v for k, v in asdict(module.config).items() if k != "vocabulary"}
    what = kind.replace("_", " ")
    if kind == "unet":
        what = f"UNet for {display_name(BASES, config['context_dim'])}"
    if kind == "image_encoder":
        what = f"CLIP image encoder, {display_name(ENCODERS[GLOBAL], config['output_dim'])}"
    return [f"{what}, {_size(module.state_dict().values())}", ", ".join(f"{k} {v}" for k, v in config.items())]
