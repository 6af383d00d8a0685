"""Folders of diffusers and transformers: a `config.json` and the weights beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoints.files import naming, read_json
from checkpoints.fill import M, empty_module
from checkpoints.reader import File

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def module_from_config(
    folder: Path, module: Callable[[Any], M], config: Callable[[dict[str, Any]], Any], what: str
) -> M:
    """The empty module that a folder's `config.json` describes."""
    with naming(folder / "config.json", f"is not the config of {what} that is read"):
        return empty_module(module, config(read_json(folder / "config.json")))


def has_config(path: Path) -> bool:
    """Whether `path` is a folder of diffusers or transformers, or a file of weights in one."""
    own = path.is_file() and path.with_suffix(".json").is_file() and path.suffix != ".json"
    return path.is_dir() or (not own and (path.parent / "config.json").is_file())


def folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def weights_in(path: Path) -> File:
    """The weights in a folder, or the file of them that `path` names.

    Safetensors come before pickles, and the full weights before a variant (`.fp16`, `.non_ema`). Files may be in shards,
    with their index. Raises FileNotFoundError when there are none.
    """
    if path.is_file():
        return File(path)
    for file in _candidates(path):
        return File(file)
    raise FileNotFoundError(f"{path} holds no weights: no {_STEMS[0]}.safetensors, {_STEMS[1]}.safetensors or .bin")


def _candidates(folder: Path) -> Iterator[Path]:
    for end in (".safetensors", ".bin"):
        for stem in _STEMS:
            yield from (
                file for file in (folder / f"{stem}{end}", folder / f"{stem}{end}.index.json") if file.is_file()
            )
        for stem in _STEMS:
            single = (file for file in folder.glob(f"{stem}.*{end}") if "-of-" not in file.name)
            yield from sorted([*single, *folder.glob(f"{stem}{end}.index.*.json")])
