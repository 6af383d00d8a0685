"""Read and write folders in the layout of diffusers and transformers: a `config.json` and weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.files import naming, read_json, replacing_in, write_json, write_tensors
from checkpoints.fill import M, empty_module
from checkpoints.names import TRANSPOSED, Names
from checkpoints.reader import File

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def module_from_config(
    folder: Path, module: Callable[[Any], M], config: Callable[[dict[str, Any]], Any], what: str
) -> M:
    """Build the module that a folder's `config.json` describes, on the meta device.

    Raises ValueError if the config is not supported.
    """
    with naming(folder / "config.json", f"is not a supported config of {what}"):
        return empty_module(module, config(read_json(folder / "config.json")))


def has_config(path: Path) -> bool:
    """Return whether `path` is a folder in the layout of diffusers or transformers, or a weights file in such a folder.

    False for a weights file that has its own card.
    """
    has_card = path.is_file() and path.with_suffix(".json").is_file() and path.suffix != ".json"
    return path.is_dir() or (not has_card and (path.parent / "config.json").is_file())


def folder_of(path: Path) -> Path:
    """Return `path` if it is a folder, otherwise its parent."""
    return path if path.is_dir() else path.parent


def weights_in(path: Path) -> File:
    """Open a weights file, or the weights in a folder.

    Prefers safetensors to pickles, and full weights to variants (`.fp16`, `.non_ema`). Sharded weights need their index.
    Raises FileNotFoundError if there are no weights.
    """
    if path.is_file():
        return File(path)
    for file in _candidates(path):
        return File(file)
    raise FileNotFoundError(f"{path} holds no weights: it needs {_STEMS[0]}.safetensors, {_STEMS[1]}.safetensors or the same as .bin")


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the weights files in a folder, in order of preference."""
    for end in (".safetensors", ".bin"):
        for stem in _STEMS:
            yield from (
                file for file in (folder / f"{stem}{end}", folder / f"{stem}{end}.index.json") if file.is_file()
            )
        for stem in _STEMS:
            single = (file for file in folder.glob(f"{stem}.*{end}") if "-of-" not in file.name)
            yield from sorted([*single, *folder.glob(f"{stem}{end}.index.*.json")])


_PROJ = re.compile(r"attn\.proj_(in|out)\.weight$")


def write_diffusers(
    module: nn.Module,
    names: Names,
    config: dict[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
    stem: str = "diffusion_pytorch_model",
) -> None:
    """Write a network under the names of diffusers or transformers, and its `config.json`.

    A tensor with several names is split. The linear layers around transformers become 1x1 convolutions if the config says so
    (`use_linear_projection`).
    """
    conv, tensors = config.get("use_linear_projection") is False, dict[str, Tensor]()
    for ours, tensor in module.state_dict().items():
        tensor = tensor.T if names[ours][0] in TRANSPOSED else tensor
        tensor = tensor[:, :, None, None] if conv and _PROJ.search(ours) else tensor
        tensors |= zip(names[ours], tensor.chunk(len(names[ours])), strict=True)
    with replacing_in(folder) as part:
        write_tensors(part / f"{stem}.safetensors", tensors, dtype)
        write_json(part / "config.json", config)
