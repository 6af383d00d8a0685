"""The saved state of a run: write it atomically, reject damaged states and states of other runs, lock the folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from checkpoints.files import check_output, replacing
from train.errors import DamagedState, OtherRun


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (plain data and tensors), replacing an existing file."""
    with replacing(path) as part:
        torch.save(state, part)


def load(path: Path) -> dict[str, Any] | None:
    """Return the state, or None if there is no file. Never unpickles code. Raises `DamagedState`."""
    if not path.exists():
        return None
    try:
        with ZipFile(path) as file:  # torch.load does not verify checksums
            if bad := file.testzip():
                raise BadZipFile(f"wrong checksum of {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds of errors for files it cannot read
        raise DamagedState(path, str(error).partition("\n")[0]) from None
    if not isinstance(state, dict):
        raise DamagedState(path, "it is not the state of a run")
    return state


def changing(module: nn.Module) -> dict[str, Tensor]:
    """Return the state that training changes: buffers, and parameters that require gradients."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state returned by `changing`. Raises KeyError or RuntimeError if it came from another module."""
    if state.keys() != changing(module).keys():
        raise KeyError("its tensors have different names")
    module.load_state_dict(state, strict=False)


def refuse_other(path: Path, made_from: Mapping[str, Any], complete: bool = True) -> None:
    """Raise `OtherRun` if the state was made from other inputs than `made_from`; the message names the differences.

    If `made_from` is not `complete`, it may hold only some of the recorded inputs, so that a run can check early, before slow work.
    """
    state = load(path)
    if state is None:
        return
    if (inputs := state.get("made_from")) is None:
        raise OtherRun(f"{path} does not record what it was made from: choose another folder with --state, or remove it")
    names = {**made_from, **inputs} if complete else made_from
    if other := [name for name in names if inputs.get(name) != made_from.get(name)]:
        raise OtherRun(
            f"{path} is the state of a run with different {', '.join(other)}: choose another folder with --state, or remove it"
        )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a state folder against other processes. The system releases the lock when this process ends.

    Raises BlockingIOError if another process holds the lock. On exit, a folder created here is removed if it is empty.
    """
    path, new = folder / "lock", not folder.exists()
    check_output(path)
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by worker processes
        except OSError:
            file.seek(0)
            raise BlockingIOError(
                f"{folder} is in use by another run (process {file.read().strip() or 'unknown'}): "
                "wait until it ends, or choose another folder with --state"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if new and list(folder.iterdir()) == [path]:
                path.unlink()
                folder.rmdir()
