"""Read and write this project's own format: a safetensors file with our tensor names, and a JSON card beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.files import naming, read_json, replacing_in, write_json, write_tensors
from checkpoints.fill import M, assemble, empty_module
from checkpoints.reader import File


def save(module: nn.Module, path: Path, card: dict[str, Any], dtype: torch.dtype | None = torch.float16) -> None:
    """Save a module to `path` (safetensors) and its card, which includes the module's config, beside it (`.json`).

    Writes both files or neither. `dtype=None` keeps each tensor's dtype. Raises OSError if the files cannot be written,
    and ValueError if a value is too large for `dtype`.
    """
    config = getattr(module, "config", None)
    save_tensors(module.state_dict(), path, ({"config": asdict(config)} if config else {}) | card, dtype)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, card: dict[str, Any], dtype: torch.dtype | None = torch.float16
) -> None:
    """Save tensors and their card as `save` does."""
    with replacing_in(path.parent) as part:
        write_tensors(part / path.name, tensors, dtype)
        write_json(part / path.with_suffix(".json").name, card)


def read_card(path: Path) -> dict[str, Any]:
    """Read the card beside a weights file. Raises FileNotFoundError if either file is missing."""
    card = path.with_suffix(".json")
    if not path.exists() or not card.exists():
        raise FileNotFoundError(f"{path} or its card {card.name} is missing: run `make weights` to train the network")
    return read_json(card)


def module_from_card(path: Path, module: Callable[..., M], config: type[Any] | None) -> M:
    """Build the module that the card beside `path` describes, on the meta device.

    Raises ValueError if the card does not describe a network.
    """
    card = read_card(path)
    with torch.device("meta"), naming(path.with_suffix(".json"), "does not describe a network"):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()} if config else {}
        return empty_module(module, config(**values)) if config else module()


def load(
    path: Path, module: Callable[..., M], config: type[Any] | None, dtype: torch.dtype | None = torch.float32
) -> M:
    """Load a module from a file in this project's own format. `dtype=None` keeps each tensor's dtype."""
    empty, file = module_from_card(path, module, config), File(path)
    return assemble(empty, {name: (name,) for name in empty.state_dict()}, file, "the network that its card describes", dtype)
