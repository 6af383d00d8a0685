"""What a run shows beside its log: the clock, sheets of drawings, and curves in TensorBoard. None of it changes the training."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_run
from own_pictures import base, command, write_pictures
from PIL import Image
from small_run import numbers, same, train

from checkpoints.files import sha256
from train.__main__ import main, status
from train.clock import Clock
from train.display import Display

__all__ = ["base"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:these words are not", "ignore:this model's vocab")


def test_the_log_says_how_long_steps_wait_for_data(tmp_path: Path) -> None:

    def slow(step: int) -> small_run.Batch:
        time.sleep(0.05)
        return small_run.make(step)

    quick, waiting = train(tmp_path / "a")[2][-1], train(tmp_path / "b", make=slow)[2][-1]
    assert 0 < quick["waiting"] < waiting["waiting"] < 1 and waiting["waiting"] > 0.5
    assert waiting["pictures_per_second"] < 4 / 0.05 and waiting["pictures_per_second"] < quick["pictures_per_second"]


@pytest.mark.parametrize("idle", [True, False])
def test_only_an_idle_device_waits_for_data(idle: bool) -> None:
    """A GPU that still has work does not wait while the next batch is read."""
    clock = Clock()
    with clock.step(4), clock.waiting(lambda: idle):
        time.sleep(0.02)
    assert (clock.row()["waiting"] > 0.9) == idle and (clock.row()["waiting"] == 0) != idle


def test_previews_are_drawn_and_change_nothing(base: Path, tmp_path: Path) -> None:
    """A sheet after every second step, also of a run that is resumed; the same weights as without."""
    write_pictures(tmp_path / "data", 6)
    main(command(tmp_path, base, "--steps", "5"))
    plain = sha256(tmp_path / "out" / "ip_adapter.safetensors")
    for name in ("state", "out"):
        (tmp_path / name).rename(tmp_path / f"{name} without")
    main(command(tmp_path, base, "--steps", "5", "--preview-every", "2"))
    assert sha256(tmp_path / "out" / "ip_adapter.safetensors") == plain
    sheets = sorted((tmp_path / "state" / "previews").iterdir())
    assert [sheet.name for sheet in sheets] == ["ip_adapter-0000002.png", "ip_adapter-0000004.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (4 * 16, 4 * 16) and np.asarray(sheet).std() > 0
    said = status(["adapter", "--preview-every", "2"])
    assert said == "error: --preview-every draws your own pictures: give --data (the mini world is drawn at every validation)"


def test_tensorboard_gets_every_number_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a writer that only records; a resumed run goes on after the last step."""
    written: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    def writer(folder: str, purge_step: int) -> Any:
        opened.append((Path(folder).name, purge_step))
        return SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    train(tmp_path, until=8, display=Display(tensorboard=True))
    module, _, log = train(tmp_path, display=Display(tensorboard=True))
    assert opened == [("tiny", 1), ("tiny", 9)]
    rows = {(row["step"], name): value for row in log for name, value in row.items()}
    assert {(step, name): value for name, value, step in written}.items() >= rows.items()
    plain, _, without = train(tmp_path / "without")
    assert same(module, plain) and numbers(log) == numbers(without)
    assert json.loads((tmp_path / "tiny.jsonl").read_text().splitlines()[-1]) == log[-1]


def test_without_the_package_it_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"--tensorboard needs the package tensorboard: pip install -e '\.\[tensorboard\]'"):
        Display(tensorboard=True)
