"""Files of weights: the project's own safetensors, each with a readable card (JSON) beside it.

A card holds the config that rebuilds the module, how it was trained and how good it is. Weights are safetensors, never
pickles; files are written to a temporary name and renamed, so an interrupted write loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.adapter import IPAdapter
from model.image_encoder import ImageConfig, ImageEncoder
from model.image_projection import ImageProjection
from model.text_encoder import TextConfig, TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

M = TypeVar("M", bound=nn.Module)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(module: nn.Module, path: Path, card: dict[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Writes `path` (safetensors) and the card beside it (`.json`), with the module's config if it has one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in module.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    os.replace(part, path)
    config = getattr(module, "config", None)
    write_json(path.with_suffix(".json"), ({"config": asdict(config)} if config else {}) | card)


def read_card(path: Path) -> dict[str, Any]:
    """The card of a file of weights. Raises FileNotFoundError that names the command which makes it."""
    card = path.with_suffix(".json")
    if not path.exists() or not card.exists():
        raise FileNotFoundError(f"{path} and its card {card.name} are not there; `make weights` trains them")
    data: dict[str, Any] = json.loads(card.read_text())
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in float32. Raises ValueError when it is not one or holds a NaN."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path} holds values that are not finite, in {name}")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def fill(module: M, tensors: dict[str, Tensor]) -> M:
    """Puts the tensors into a module built on the meta device, strictly; returns it frozen and in eval mode."""
    module.load_state_dict(tensors, strict=True, assign=True)
    left = [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if left:
        raise RuntimeError(f"these tensors were not filled: {', '.join(left)}")
    return module.eval().requires_grad_(False)


def _load(path: Path, module: type[M], config: type[Any]) -> M:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in read_card(path)["config"].items()}
    with torch.device("meta"):
        empty = module(config(**values))
    return fill(empty, read_tensors(path))


def load_unet(path: Path) -> UNet:
    return _load(path, UNet, UNetConfig)


def load_vae(path: Path) -> VAE:
    return _load(path, VAE, VAEConfig)


def load_text_encoder(path: Path) -> TextEncoder:
    return _load(path, TextEncoder, TextConfig)


def load_image_encoder(path: Path) -> ImageEncoder:
    return _load(path, ImageEncoder, ImageConfig)


def load_adapter(path: Path, unet: UNet) -> IPAdapter:
    """An adapter for this UNet; its widths and number of tokens come from the weights."""
    read_card(path)
    tensors = read_tensors(path)
    rows, image_dim = tensors["image_projection.proj.weight"].shape
    context_dim = len(tensors["image_projection.norm.weight"])
    with torch.device("meta"):
        projection = ImageProjection(image_dim, context_dim, rows // context_dim)
    adapter = IPAdapter(unet, projection, own_projections="to_k.0.weight" in tensors)
    return fill(adapter, tensors)
