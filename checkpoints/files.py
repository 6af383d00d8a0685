"""Writing files: every file of the project appears whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
