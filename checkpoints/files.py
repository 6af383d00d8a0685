"""Files: read and written JSON, written tensors, hashes. A file is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def check_output(path: Path) -> None:
    """Raises OSError, in a sentence, when `path` cannot be written. Call it before hours of work."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{path} can't be written: {error.filename or path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} can't be written: no permission to write in {path.parent}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to, then renames it to `path`.

    If the body fails, the old file stays as it was and no temporary file is left. safetensors and torch report a full disk
    or a missing permission with errors of their own; here they all become an OSError with one sentence. Keep the body to the
    writing alone, since a RuntimeError in it is read as a failure to write.
    """
    check_output(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise OSError(f"{path} can't be written: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(path: Path) -> list[Path]:
    """The files that `path` is read from: the file and its card, or the weights and JSON in a folder."""
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin", ".json") and f.is_file())
    return [path, *([card] if (card := path.with_suffix(".json")).exists() else [])]


@contextmanager
def naming(path: Path, says: str) -> Iterator[None]:
    """Errors about a config name the file."""
    try:
        yield
    except OSError:
        raise
    except KeyError as error:
        raise ValueError(f"{path} {says}: it lacks {error}") from None
    except Exception as error:  # JSON can hold anything
        raise ValueError(f"{path} {says}: {error or type(error).__name__}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError that names the file when it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    with naming(path, "is not a JSON object"):
        return dict(json.loads(path.read_text()))


def read_json_if_there(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no file."""
    return read_json(path) if path.exists() else {}


_LINES = re.compile(r"\n *")


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, a list of plain values on one line, under a temporary name, then renames it."""
    text = re.sub(
        r"\[\n([^][{}]*)\n *\]", lambda found: f"[{_LINES.sub(' ', found[1]).strip()}]", json.dumps(data, indent=1)
    )
    with replacing(path) as part:
        part.write_text(text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Writes safetensors under a temporary name, then renames it. Raises ValueError when a value is too large for `dtype`."""
    out: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        plain = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        if plain.dtype != tensor.dtype and plain.numel() and not is_finite(plain):
            raise ValueError(f"{path} is not written: {name} holds values that are not finite in {dtype}")
        out[name] = (
            plain.clone() if plain.data_ptr() in places else plain
        )  # safetensors refuses tensors that share memory
        places.add(plain.data_ptr())
    with replacing(path) as part:
        save_file(out, part)


def short_list(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
