"""Checkpoints: whole or not at all, never code, and one run in a folder."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import train

from train import checkpoint
from train.checkpoint import lock_folder


def test_checkpoint_round_trip_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pt"
    assert checkpoint.load(path) is None
    checkpoint.save(path, {"x": torch.arange(3), "log": [{"loss": 0.1, "step": 1}]})
    state = checkpoint.load(path)
    assert state is not None and torch.equal(state["x"], torch.arange(3)) and state["log"] == [{"loss": 0.1, "step": 1}]
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"step": 1})

    def full(_: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1}


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain", [False, True])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path, plain: bool) -> None:
    state = {"step": 1, "module": Malicious(tmp_path / "owned")}
    if plain:
        (tmp_path / "tiny.pt").write_bytes(pickle.dumps(state))
    else:
        torch.save(state, tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match=r"tiny\.pt is damaged .*: remove it"):
        train(tmp_path)
    assert not (tmp_path / "owned").exists()


# one run in a folder

HOLD = """
import sys, time
from pathlib import Path
from train.checkpoint import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    if len(sys.argv) > 2:
        import os
        if os.fork() == 0:  # as a worker that outlives it
            time.sleep(60)
            os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize("worker", [(), ("worker",)])
def test_a_second_run_is_refused_while_the_first_is_alive(tmp_path: Path, worker: tuple[str, ...]) -> None:
    folder = tmp_path / "runs"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *worker], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "locked\n"
    try:
        with pytest.raises(OSError, match=rf"runs is in use by another run \(process {first.pid}\): wait"), lock_folder(folder):
            pass
    finally:
        first.kill()
        first.wait()
    with lock_folder(folder):
        pass


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), lock_folder(tmp_path / "new" / "runs"):
        raise ValueError("no")
    assert not (tmp_path / "new" / "runs").exists()
    with lock_folder(tmp_path / "runs"):
        (tmp_path / "runs" / "a.pt").touch()
    assert sorted(file.name for file in (tmp_path / "runs").iterdir()) == ["a.pt", "lock"]
