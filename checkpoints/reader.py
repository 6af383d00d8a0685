"""Read tensors from safetensors and from pickles that hold only tensors, in one file or in shards."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.files import printable, read_json
from checkpoints.signatures import check_is_weights, is_index

_GROWTH, _SLACK = 4, 1 << 26  # limit of the memory for a pickle: 4 times its size, plus 64 MB


class _Inert:
    """A stand-in for the classes in old Lightning checkpoints. It stores nothing and runs nothing."""

    def __setstate__(self, _: Any) -> None: ...


_LIGHTNING: list[Any] = [
    (_Inert, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
    for package in ("pytorch_lightning", "lightning.pytorch")
]


class File(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, memory-mapped. They share no memory, and changes to them are not written to the file.

    `path` is a file of tensors, or the index of a sharded one. The prefix `module.` is removed if all names have it,
    and names are escaped, so that they can be printed. Raises ValueError when the file is not a complete checkpoint,
    holds objects other than tensors, or would need far more memory than its size. Pickles that are compressed, or older
    than PyTorch 1.6, can't be mapped and are read into memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_is_weights(path)
        if is_index(path):
            names, self._get, self._shape = _open_shards(path)
        else:
            with _read_errors(path):
                names, self._get, self._shape = _open(path)
        if not names:
            raise ValueError(f"{path} holds no tensors")
        prefix = "module." if all(name.startswith("module.") for name in names) else ""
        self._names: dict[str, tuple[str, ...]] = {printable(name.removeprefix(prefix)): (name,) for name in names}
        if len(self._names) < len(names):
            raise ValueError(f"{path} holds tensors with names that look the same: download it again")

    def rename(self, names: Mapping[str, str | tuple[str, ...]]) -> File:
        """Return the same file with other names, {new: old}. A tuple of old names is concatenated along the first axis.

        Tensors that are not in `names` are left out.
        """
        other, parts = copy.copy(self), {new: (old,) if isinstance(old, str) else old for new, old in names.items()}
        other._names = {new: tuple(theirs for name in old for theirs in self._names[name]) for new, old in parts.items()}
        return other

    def part(self, prefix: str) -> File:
        """Keep the tensors whose names begin with `prefix`, and remove the prefix."""
        return self.rename({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})

    def without(self, pattern: str) -> File:
        """Leave out the tensors whose names match the regular expression `pattern` at the start."""
        return self.rename({name: name for name in self if not re.match(pattern, name)})

    def __getitem__(self, name: str) -> Tensor:
        with _read_errors(self.path):
            parts = [self._get(each) for each in self._names[name]]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it if the file is safetensors."""
        shapes = [self._shape(each) for each in self._names[name]]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors."""
        return {name: self.shape(name) for name in self}


Contents = tuple[list[str], Callable[[str], Tensor], Callable[[str], tuple[int, ...]]]  # names; name -> tensor; name -> shape


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn any error from a damaged file into a ValueError that names the file and says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({printable(str(error))}): download it again") from error
    except Exception as error:  # a damaged pickle can raise anything
        kind, reason = type(error).__name__, printable(str(error).partition("\n")[0])
        problem = f"is not a readable checkpoint ({kind}: {reason}): download it again"
        if kind == "UnpicklingError":
            problem = "is damaged, or holds objects other than tensors, which are never unpickled: use a .safetensors file instead"
        raise ValueError(f"{path} {problem}") from error


def _open_shards(index: Path) -> Contents:
    """Open a sharded checkpoint from its index, a map from names to the files beside it that hold the tensors."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) and Path(name).name == name for name in where.values()):
        raise ValueError(f"{index} is not the index of a sharded checkpoint: download it again")
    shards = {name: File(index.with_name(name)) for name in sorted(set(where.values()))}
    if missing := [name for name in where if printable(name) not in shards[where[name]]]:
        raise ValueError(f"{index} lists {printable(missing[0])}, but its shard lacks it: download both again")
    names = [name for shard in shards.values() for name in shard]
    holder = {name: shard for shard in shards.values() for name in shard}
    if len(holder) < len(names):
        raise ValueError(f"{index} has two shards with the same tensor: download them again")
    return names, lambda name: holder[name][name], lambda name: holder[name].shape(name)


def _open(path: Path) -> Contents:
    """Open a safetensors file or a pickle of tensors."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        handle = safe_open(path, "pt")
        return list(handle.keys()), handle.get_tensor, lambda name: tuple(handle.get_slice(name).get_shape())
    limit = _GROWTH * path.stat().st_size + _SLACK
    mmap = start[:2] == b"PK" and _is_uncompressed(path, limit)
    with torch.serialization.safe_globals(_LIGHTNING):
        tensors = _flatten(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    if sum(tensor.nbytes for tensor in tensors.values()) > limit:
        raise ValueError("its tensors need far more memory than the size of the file")
    _separate(tensors)
    return list(tensors), tensors.__getitem__, lambda name: tuple(tensors[name].shape)


def _is_uncompressed(path: Path, limit: int) -> bool:
    """Return whether all parts of a zip file are uncompressed, so that it can be memory-mapped.

    Raises ValueError when it has no tensors, a checksum is wrong, or it unpacks to more than `limit` bytes.
    """
    with ZipFile(path) as file:
        if not any(part.filename.endswith("data.pkl") for part in file.infolist()):
            raise ValueError("it is a zip archive without tensors")
        if sum(part.file_size for part in file.infolist()) > limit:
            raise ValueError("it unpacks to far more than its size")
        state = path.stat()
        if member := _damaged_part(path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns):
            raise ValueError(f"its part {member} is damaged")
        return all(part.compress_type == ZIP_STORED for part in file.infolist())


@cache
def _damaged_part(path: Path, *_version: int) -> str | None:
    """Return a part of a zip file whose checksum is wrong, or None. This reads all of the file, so it is done once for each version."""
    with ZipFile(path) as file:
        return file.testzip()


def _separate(tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of a pickle that begin inside another one, in place."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end:
            tensors[name] = tensor.clone()
        end = max(end, start + tensor.nbytes)


def _flatten(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Collect the tensors of nested dicts, by their keys joined with dots.

    A dict that occurs in several places is read once.
    """
    tensors: dict[str, Tensor] = {}
    visited, stack = {id(tree)}, [("", tree)]
    while stack:
        prefix, branch = stack.pop()
        for key, value in branch.items():
            if isinstance(value, Tensor):
                if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                    raise ValueError(f"{prefix}{key} is not a dense CPU tensor")
                if f"{prefix}{key}" in tensors:
                    raise ValueError(f"two tensors are named {prefix}{key}")
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and id(value) not in visited:
                visited.add(id(value))
                stack.append(("" if key == "state_dict" else f"{prefix}{key}.", value))
    return tensors
