"""The state of a run on disk: written atomically, refused when it is damaged or of another run, locked while in use."""

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
from train.errors import Damaged, OtherRun


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state`, plain data and tensors, in place of the file that was there."""
    with replacing(path) as part:
        torch.save(state, part)


def load(path: Path) -> dict[str, Any] | None:
    """The state, or None when there is none yet. Never unpickles code. Raises `Damaged`."""
    if not path.exists():
        return None
    try:
        with ZipFile(path) as file:  # torch.load does not compare the checksums
            if bad := file.testzip():
                raise BadZipFile(f"wrong checksum of {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises errors of many kinds for a file that is not its own
        raise Damaged(path, str(error).partition("\n")[0]) from None
    if not isinstance(state, dict):
        raise Damaged(path, "it is not the state of a run")
    return state


def changing(module: nn.Module) -> dict[str, Tensor]:
    """The part of a module's state that training changes: buffers, and parameters that require gradients."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts back what `changing` gave. Raises KeyError or RuntimeError when that was of another module."""
    if state.keys() != changing(module).keys():
        raise KeyError("its tensors have other names")
    module.load_state_dict(state, strict=False)


def refuse_other(path: Path, made_from: Mapping[str, Any]) -> None:
    """Raises `OtherRun`, naming what differs, when there is a state that was not made from `made_from`.

    `made_from` may be a part of what the state records, so that a run can ask before it does anything slow.
    """
    state = load(path)
    if state is None:
        return
    if (found := state.get("made_from")) is None:
        raise OtherRun(f"{path} does not say what it was made from: name another folder with --state, or remove it")
    if other := [name for name, value in made_from.items() if found.get(name) != value]:
        raise OtherRun(
            f"{path} is the state of another run, with other {', '.join(other)}: name another folder with --state, or remove it"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a state folder. The lock goes when this process ends, however it ends.

    Raises BlockingIOError, in a sentence, while another process holds it. A new folder that stays empty is removed again.
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
                "wait until it ends, or name another folder with --state"
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
