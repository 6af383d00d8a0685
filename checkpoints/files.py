"""Files: JSON, tensors and hashes. A file is written whole or not at all, and every failure is an OSError with one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.signatures import check_is_itself

_JSON_LIMIT = 1 << 27  # bytes; a tokenizer takes 4 MB


def check_output(path: Path) -> None:
    """Raises OSError, in a sentence, when `path` cannot be written. Call it before hours of work."""
    with _failures(path):
        if "\0" in str(path):
            raise NotWritten(f"{printable(str(path))} can't be written: its name holds a null character")
        if path.is_dir():
            raise NotWritten(f"{path} is a folder: name the file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise NotWritten(f"{path} can't be written: no permission to write in {path.parent}")


class NotWritten(OSError):
    """A file that can't be written; the message says which one and why."""


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """safetensors, torch and Pillow report a full disk or a missing permission with errors of their own. Make each an OSError."""
    try:
        yield
    except NotWritten as error:
        raise NotWritten(str(error).replace(f"{os.sep}.part{os.sep}", os.sep)) from error
    except (OSError, SafetensorError, RuntimeError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "what should be its folder is a file"
        raise NotWritten(f"{path} can't be written: {printable(reason)}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to, then renames it to `path`.

    If the body fails, the old file stays as it was and no temporary file is left. Keep the body to the writing alone, since
    a RuntimeError in it is read as a failure to write.
    """
    check_output(path)
    part = path.with_name(path.name + ".part")
    try:
        with _failures(path):
            yield part
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def replacing_in(folder: Path) -> Iterator[Path]:
    """As `replacing`, for files that belong together: yields a temporary folder, whose files then move into `folder`.

    Other files in `folder` stay. If the body fails, so do the old ones.
    """
    part = folder / ".part"
    check_output(folder / "file")
    try:
        with _failures(folder):
            part.mkdir(exist_ok=True)
            yield part
            written = [file.relative_to(part) for file in part.rglob("*") if file.is_file()]
            for file in written:
                check_output(folder / file)
            for file in written:
                os.replace(part / file, folder / file)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_LINES = re.compile(r"\n *")


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, with lists of plain values on one line. Raises OSError when it can't be written."""
    text = re.sub(r"\[\n([^][{}]*)\n *\]", lambda m: f"[{_LINES.sub(' ', m[1]).strip()}]", json.dumps(data, indent=1))
    with replacing(path) as part:
        part.write_text(text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Writes safetensors in `dtype`; None keeps each tensor's own.

    Raises ValueError when a value is too large for `dtype`, OSError when the file can't be written.
    """
    out: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        plain = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        if plain.dtype != tensor.dtype and plain.numel() and not is_finite(plain):
            raise ValueError(f"nothing is written: {name} holds values that are not finite in {dtype}")
        shared = plain.data_ptr() in places  # safetensors refuses tensors that share memory
        out[name] = plain.clone() if shared else plain
        places.add(plain.data_ptr())
    with replacing(path) as part:
        save_file(out, part)


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex. Raises ValueError when it is not a regular file (a device may never end)."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(path: Path) -> list[Path]:
    """The files that `path` is read from: the file and its card, or the weights and JSON in a folder."""
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin", ".json") and f.is_file())
    beside = (path.with_suffix(end) for end in (".json", ".yaml", ".yml"))
    return [path, *(file for file in beside if file.is_file() and file != path)]


@contextmanager
def naming(path: Path, says: str) -> Iterator[None]:
    """Make every error about the content of a file a ValueError that names it: "`path` `says`: the reason"."""
    try:
        yield
    except OSError:
        raise
    except KeyError as error:
        raise ValueError(f"{path} {says}: it lacks {printable(str(error))}") from None
    except Exception as error:  # JSON can hold anything
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"{path} {says}: {reason or type(error).__name__}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError that names the file when it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    check_is_itself(path)
    with naming(path, "is not a JSON object"):
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError(f"it is larger than {_JSON_LIMIT >> 20} MB")
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))


def read_json_if_there(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no file."""
    return read_json(path) if path.exists() else {}


def printable(text: str, most: int = 300) -> str:
    """Text from a file as it may reach a terminal: control characters escaped, and cut after `most` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return escaped + ("..." if len(text) > most else "")


def short_list(names: Iterable[str], most: int = 3) -> str:
    """The first names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
