"""Reading tensors: safetensors, or a pickle that holds nothing but tensors, whole or in shards."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.files import printable, read_json
from checkpoints.signatures import check_is_weights, is_index

_GROWTH, _SLACK = 4, 1 << 26  # a pickle may take 4 times its size in memory, and 64 MB


class _Inert:
    """Stands in for the classes that old Lightning checkpoints name. It holds nothing and runs nothing."""

    def __setstate__(self, _: Any) -> None: ...


_LIGHTNING: list[Any] = [
    (_Inert, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
    for package in ("pytorch_lightning", "lightning.pytorch")
]


class File(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, mapped to memory; copy what must outlive the file.

    `path` is a file of tensors, or the index of a sharded one. A prefix `module.` on every name is left out,
    and names are escaped, so that they can be printed. Raises ValueError when the file is not a complete checkpoint, holds
    more than tensors, or would take far more memory than its size. A pickle from before PyTorch 1.6, or a compressed one,
    can't be mapped and is read as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_is_weights(path)
        if is_index(path):
            names, self._get, self._shape = _sharded(path)
        else:
            with _explaining(path):
                names, self._get, self._shape = _opened(path)
        if not names:
            raise ValueError(f"{path} holds no tensors")
        prefix = "module." if all(name.startswith("module.") for name in names) else ""
        self._names: dict[str, tuple[str, ...]] = {printable(name.removeprefix(prefix)): (name,) for name in names}
        if len(self._names) < len(names):
            raise ValueError(f"{path} holds names that look the same: download it again")

    def renamed(self, names: Mapping[str, str | tuple[str, ...]]) -> File:
        """The same file under other names, {new: old}; several old ones are joined along their first axis. What is not
        named is left out."""
        other, each = copy.copy(self), {new: (old,) if isinstance(old, str) else old for new, old in names.items()}
        other._names = {new: tuple(theirs for name in old for theirs in self._names[name]) for new, old in each.items()}
        return other

    def part(self, prefix: str) -> File:
        """The tensors whose names begin with `prefix`, without it."""
        return self.renamed({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})

    def without(self, pattern: str) -> File:
        """The tensors whose names do not begin as the regular expression `pattern` says."""
        return self.renamed({name: name for name in self if not re.match(pattern, name)})

    def __getitem__(self, name: str) -> Tensor:
        with _explaining(self.path):
            parts = [self._get(each) for each in self._names[name]]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self._shape(each) for each in self._names[name]]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self}


Opened = tuple[list[str], Callable[[str], Tensor], Callable[[str], tuple[int, ...]]]  # names, a tensor, its shape


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into a ValueError that names the file and says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({printable(str(error))}): download it again"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        kind, says = type(error).__name__, printable(str(error).partition("\n")[0])
        why = f"is not a readable checkpoint ({kind}: {says}): download it again"
        if kind == "UnpicklingError":
            why = "is damaged, or holds more than tensors, and nothing else is ever unpickled: ask for a .safetensors file"
        raise ValueError(f"{path} {why}") from error


def _sharded(index: Path) -> Opened:
    """The tensors of a file in shards, from its index, which says which file beside it holds each."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in where.values()
    ):
        raise ValueError(f"{index} is not the index of a file in shards: download it again")
    shards = {name: File(index.with_name(name)) for name in sorted(set(where.values()))}
    if absent := [name for name in where if printable(name) not in shards[where[name]]]:
        raise ValueError(f"{index} names {printable(absent[0])}, which its shard lacks: download both again")
    names = [name for shard in shards.values() for name in shard]
    holder = {name: shard for shard in shards.values() for name in shard}
    if len(holder) < len(names):
        raise ValueError(f"{index} has shards that hold the same tensor twice: download them again")
    return names, lambda name: holder[name][name], lambda name: holder[name].shape(name)


def _opened(path: Path) -> Opened:
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        handle = safe_open(path, "pt")
        return list(handle.keys()), handle.get_tensor, lambda name: tuple(handle.get_slice(name).get_shape())
    limit = _GROWTH * path.stat().st_size + _SLACK
    mapped = start[:2] == b"PK" and _is_uncompressed(path, limit)
    with torch.serialization.safe_globals(_LIGHTNING):
        tensors = _flat(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    if sum(tensor.nbytes for tensor in tensors.values()) > limit:
        raise ValueError("its tensors claim far more memory than the file has")
    return list(tensors), tensors.__getitem__, lambda name: tuple(tensors[name].shape)


def _is_uncompressed(path: Path, limit: int) -> bool:
    """Whether a zip file can be mapped. Raises ValueError when a checksum is wrong, or it unpacks to more than `limit` bytes."""
    with ZipFile(path) as file:
        if not any(part.filename.endswith("data.pkl") for part in file.infolist()):
            raise ValueError("it is a zip archive without tensors")
        if sum(part.file_size for part in file.infolist()) > limit:
            raise ValueError("it unpacks to far more than its size")
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
