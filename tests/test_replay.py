"""The first steps of a stage, trained again and compared with stored losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from checkpoints.files import read_json, sha256
from eval import replay
from eval.__main__ import main
from eval.replay import difference
from train.options import STAGES

ROOT = Path(__file__).parent.parent


def replayed(monkeypatch: pytest.MonkeyPatch, *line: str) -> object:
    """Run the command. Return what it passes to sys.exit, or None."""
    monkeypatch.setattr(sys, "argv", ["eval", "--weights", str(ROOT / "weights"), "replay", *line])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return None


def test_a_stage_gives_the_same_losses_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(replay, "PICTURES", 16)
    out = tmp_path / "replay.json"
    assert replayed(monkeypatch, "vae", "--steps", "2", "--write", "--out", str(out)) is None
    stored = json.loads(out.read_text())
    assert len(stored["vae"]["losses"]) == 2 and stored["vae"]["pictures"] == 16
    assert replayed(monkeypatch, "vae", "--steps", "2", "--out", str(out)) is None
    assert "| vae | 2 | 0.0" in capsys.readouterr().out
    monkeypatch.setattr(replay, "first_losses", lambda *_: [1.2 * loss for loss in stored["vae"]["losses"]])
    assert replayed(monkeypatch, "vae", "--steps", "2", "--out", str(out)) == "a loss differs from the stored one by more than 5 %"


def test_the_stored_losses_are_of_the_shipped_weights() -> None:
    stored, weights = read_json(ROOT / "results" / "replay.json"), sorted((ROOT / "weights").glob("*.safetensors"))
    assert [*stored] == [*STAGES]
    for stage in stored.values():
        assert len(stage["losses"]) == 200 and min(stage["losses"]) > 0
        assert stage["sha256"] == {path.name: sha256(path) for path in weights if path.name in stage["sha256"]}


def test_means_over_a_few_steps_are_compared() -> None:
    """Single steps may differ more, and only steps that both have count."""
    stored = [1.0, 3.0] * 20
    assert difference([3.0, 1.0] * 10, stored) == 0
    assert difference([1.0, 3.0] * 10 + [2.0] * 10 + [2.2] * 10 + [99.0], stored) == pytest.approx(0.05)


def test_what_cannot_be_replayed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "replay.json"
    assert "there is no stage vea: choose from vae, clip" in str(replayed(monkeypatch, "vea", "--out", str(out)))
    assert str(out) in str(replayed(monkeypatch, "vae", "--out", str(out)))
    out.write_text("{}")
    assert "no losses are stored of vae" in str(replayed(monkeypatch, "vae", "--out", str(out)))
    (tmp_path / "weights").mkdir()
    line = ["--weights", str(tmp_path / "weights"), "replay", "adapter", "--write", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["eval", *line])
    with pytest.raises(SystemExit, match=r"^error: adapter: .*unet.safetensors"):
        main()
