"""Read and write JSON and tensors, and hash files.

Writes are atomic, and every failure to write is an OSError of one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.signatures import check_not_placeholder

_JSON_LIMIT = 1 << 27  # bytes; the largest file needed, a tokenizer, has 4 MB


def check_output(path: Path) -> None:
    """Raise OSError when `path` can't be written. Call it before long work, so that the work is not lost."""
    with _write_errors(path):
        if "\0" in str(path):
            raise NotWritten(f"{printable(str(path))} can't be written: its name contains a null character")
        if path.is_dir():
            raise NotWritten(f"{path} is a folder: name the file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise NotWritten(f"{path} can't be written: no permission to write in {path.parent}")


class NotWritten(OSError):
    """A file that can't be written; the message says which one and why."""


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn write errors into NotWritten. safetensors, torch and Pillow each raise their own types of error."""
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError, RuntimeError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a file has the name of its folder"
        raise NotWritten(f"{path} can't be written: {printable(reason)}") from error


def _usual_mode() -> int:
    """Return the permissions that this process gives new files."""
    mask = os.umask(0o022)  # the only way to read it is to set it
    os.umask(mask)
    return 0o666 & ~mask


MODE = _usual_mode()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, a hidden file beside `path`, then rename it to `path`.

    If the body fails, the old file is unchanged and the temporary file is removed; if the process is killed, the next write to `path`
    takes its place. Do nothing but write in the body, because any RuntimeError in it becomes a NotWritten.
    """
    check_output(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with _write_errors(path):
            yield part
            part.chmod(MODE)  # safetensors writes files that only their owner can read
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def replacing_in(folder: Path) -> Iterator[Path]:
    """Like `replacing`, for files that belong together: yield a temporary folder, then move its files into `folder`.

    Other files in `folder` are kept. If the body fails, the old files are unchanged.
    """
    check_output(folder / "file")
    with _write_errors(folder):
        part = Path(tempfile.mkdtemp(".part", ".", folder))
        try:
            yield part
            files = [file.relative_to(part) for file in part.rglob("*") if file.is_file()]
            for file in files:
                check_output(folder / file)
            for file in files:
                os.replace(part / file, folder / file)
        except NotWritten as error:
            raise NotWritten(str(error).replace(str(part), str(folder))) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, with each list of plain values on one line. Raises OSError when it can't be written."""
    text = re.sub(r"\[\n([^][{}]*)\n *\]", lambda m: "[" + re.sub(r"\n *", " ", m[1]).strip() + "]", json.dumps(data, indent=1))
    with replacing(path) as part:
        part.write_text(text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write a safetensors file, or a `.bin` of torch, where `a.b` is tensor b of group a, as in official adapters.

    `dtype=None` keeps each tensor's dtype, and integers are always kept. Raises ValueError when a value is too large for `dtype`, and
    OSError when the file can't be written.
    """
    output, pointers = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        value = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        if value.dtype != tensor.dtype and not is_finite(value):
            raise ValueError(f"nothing was written: {name} has values that are not finite in {dtype}, so use another dtype")
        shared = value.data_ptr() in pointers  # safetensors refuses tensors that share memory
        output[name] = value.clone() if shared else value
        pointers.add(value.data_ptr())
    with replacing(path) as part:
        if path.suffix == ".bin":
            groups: dict[str, dict[str, Tensor]] = {}
            for name, tensor in output.items():
                group, _, rest = name.partition(".")
                groups.setdefault(group, {})[rest] = tensor.clone()  # torch would write all of the file that a tensor is mapped from
            torch.save(groups, part)
        else:
            save_file(output, part)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Raises ValueError when it is not a regular file, since reading a device may never end.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(path: Path) -> list[Path]:
    """Return the files that loading `path` reads: a file and its card or `.yaml`, or the weights and JSON files in a folder."""
    if path.is_dir():
        found = (f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin", ".json") and f.is_file())
        return sorted(f for f in found if not any(part.endswith(".part") for part in f.relative_to(path).parts))
    beside = (path.with_suffix(end) for end in (".json", ".yaml", ".yml"))
    return [path, *(file for file in beside if file.is_file() and file != path)]


@contextmanager
def naming(path: Path, problem: str) -> Iterator[None]:
    """Turn any error about the content of a file into the ValueError "`path` `problem`: the reason"."""
    try:
        yield
    except OSError:
        raise
    except KeyError as error:
        raise ValueError(f"{path} {problem}: it lacks {printable(str(error))}") from None
    except Exception as error:  # JSON can hold anything
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"{path} {problem}: {reason or type(error).__name__}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, and ValueError when the file is not a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    check_not_placeholder(path)
    with naming(path, "is not a JSON object"):
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError(f"it is larger than {_JSON_LIMIT >> 20} MB")
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Read a JSON object, or return {} if the file does not exist."""
    return read_json(path) if path.exists() else {}


def printable(text: str, limit: int = 300) -> str:
    """Make text from a file safe to print: escape control characters, and cut it off after `limit` characters."""
    if text.isprintable() and len(text) <= limit:
        return text
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return line + ("..." if len(text) > limit else "")


def short_list(names: Iterable[str], limit: int = 3) -> str:
    """Return the first `limit` names in alphabetical order, and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinity.

    If the sum is finite, all numbers are. If it is not, it may only be too large, and the smallest and the largest number tell: if one
    number is NaN, both are. This allocates no memory, and in nearly all cases reads it once.
    """
    flat = tensor if tensor.is_contiguous() else tensor.flatten()
    if math.isfinite(flat.sum()):
        return True
    low, high = flat.aminmax()
    return math.isfinite(low) and math.isfinite(high)
