"""Reading tensors: safetensors, or a pickle that holds nothing but tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class _Inert:
    """Stands in for the classes that old Lightning checkpoints name. It holds nothing and runs nothing."""

    def __setstate__(self, _: Any) -> None: ...


_LIGHTNING: list[Any] = [
    (_Inert, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
    for package in ("pytorch_lightning", "lightning.pytorch")
]


class File(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, mapped to memory; copy what must outlive the file.

    Raises ValueError when the file is not a complete checkpoint, or holds more than tensors. A pickle from before
    PyTorch 1.6, or a compressed one, can't be mapped and is read as a whole.
    """

    _get: Callable[[str], Tensor]
    _shape: Callable[[str], tuple[int, ...]]

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the file of weights in it")
        with open(path, "rb") as file:
            start = file.read(9)
        if not start:
            raise ValueError(f"{path} is empty: download it again")
        with _explaining(path):
            if start[8:] == b"{":
                handle = safe_open(path, "pt")
                names, self._get = list(handle.keys()), handle.get_tensor
                self._shape = lambda name: tuple(handle.get_slice(name).get_shape())
            else:
                tensors = _unpickled(path, is_zip=start[:2] == b"PK")
                names, self._get = list(tensors), tensors.__getitem__
                self._shape = lambda name: tuple(tensors[name].shape)
        if not names:
            raise ValueError(f"{path} holds no tensors")
        self._names = {name: name for name in names}

    def renamed(self, names: dict[str, str]) -> File:
        """The same file under other names, {new: old}. A tensor that is not named is left out."""
        other = copy.copy(self)
        other._names = {new: self._names[old] for new, old in names.items()}
        return other

    def part(self, prefix: str) -> File:
        """The tensors whose names begin with `prefix`, without it."""
        return self.renamed({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})

    def __getitem__(self, name: str) -> Tensor:
        with _explaining(self.path):
            return self._get(self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape(self._names[name])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self}


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into a ValueError that names the file and says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): download it again") from error
    except Exception as error:  # a damaged pickle can raise anything
        kind, says = type(error).__name__, str(error).partition("\n")[0]
        why = f"is not a readable checkpoint ({kind}: {says}): download it again"
        if kind == "UnpicklingError":
            why = "is damaged, or holds more than tensors, and nothing else is ever unpickled: ask for a .safetensors file"
        raise ValueError(f"{path} {why}") from error


def _unpickled(path: Path, is_zip: bool) -> dict[str, Tensor]:
    mapped = is_zip and _is_uncompressed(path)
    with torch.serialization.safe_globals(_LIGHTNING):
        return _flat(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))


def _is_uncompressed(path: Path) -> bool:
    """Whether a zip file can be mapped. Raises ValueError when a checksum is wrong."""
    with ZipFile(path) as file:
        if bad := file.testzip():
            raise ValueError(f"its part {bad} is damaged")
        return all(part.compress_type == ZIP_STORED for part in file.infolist())


def _flat(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of nested dicts, by their joined keys. A dict that stands in two places is read once."""
    tensors: dict[str, Tensor] = {}
    seen, stack = {id(tree)}, [("", tree)]
    while stack:
        prefix, branch = stack.pop()
        for key, value in branch.items():
            if isinstance(value, Tensor):
                if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                    raise ValueError(f"{prefix}{key} is no plain tensor")
                if f"{prefix}{key}" in tensors:
                    raise ValueError(f"two tensors are named {prefix}{key}")
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                stack.append(("" if key == "state_dict" else f"{prefix}{key}.", value))
    return tensors
