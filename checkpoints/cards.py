"""The project's own files of weights: safetensors under our names, with a JSON card beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.files import naming, read_json, replacing_in, write_json, write_tensors
from checkpoints.fill import M, assemble, empty_module
from checkpoints.reader import File


def save(module: nn.Module, path: Path, card: dict[str, Any], dtype: torch.dtype | None = torch.float16) -> None:
    """Writes `path` (safetensors) and the card beside it (`.json`), with the module's config if it has one; both or none."""
    config = getattr(module, "config", None)
    with replacing_in(path.parent) as part:
        write_tensors(part / path.name, module.state_dict(), dtype)
        write_json(part / path.with_suffix(".json").name, ({"config": asdict(config)} if config else {}) | card)


def read_card(path: Path) -> dict[str, Any]:
    """The card of a file of weights. Raises FileNotFoundError that names the command which makes it."""
    card = path.with_suffix(".json")
    if not path.exists() or not card.exists():
        raise FileNotFoundError(f"{path} and its card {card.name} are not there; `make weights` trains them")
    return read_json(card)


def module_from_card(path: Path, module: Callable[..., M], config: type[Any] | None) -> M:
    """The empty module that the card of a file of our own describes."""
    card = read_card(path)
    with torch.device("meta"), naming(path.with_suffix(".json"), "does not describe a network"):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()} if config else {}
        return empty_module(module, config(**values)) if config else module()


def load(
    path: Path, module: Callable[..., M], config: type[Any] | None, dtype: torch.dtype | None = torch.float32
) -> M:
    """A module of our own from its file and card."""
    empty, file = module_from_card(path, module, config), File(path)
    return assemble(empty, {name: (name,) for name in empty.state_dict()}, file, "what its card says", dtype)
