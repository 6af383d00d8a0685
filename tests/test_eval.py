"""The command line of `python -m eval`: help, the modules of the commands, and error messages."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from eval.__main__ import MODULES, main
from eval.options import parser
from eval.peers.timing import beside
from eval.tables import markdown, summary

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "pandas", "matplotlib", "open_clip", "diffusers", "numpy")


def commands() -> dict[str, argparse.ArgumentParser]:
    subparsers = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)


@pytest.mark.parametrize("command", ["", *MODULES])
def test_help_imports_nothing_heavy(command: str) -> None:
    """Run in a new process."""
    code = f"""
import runpy, sys
sys.argv = ["eval", *{command.split()!r}, "--help"]
try:
    runpy.run_module("eval", run_name="__main__")
except SystemExit as end:
    print("code", end.code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: python -m eval" in ran.stdout and ran.stdout.strip().endswith("code 0 []"), ran.stdout + ran.stderr


def test_every_command_and_option_is_described() -> None:
    assert set(commands()) == set(MODULES)
    for name, command in commands().items():
        assert command.description and command.description.endswith("."), name
        for action in command._actions:
            assert action.help and action.help[0].islower() | action.help[0].isupper(), (name, action.dest)
            assert action.default in (None, False, "==SUPPRESS==", "", []) or "default" in action.help, (
                name,
                action.dest,
            )


@pytest.mark.parametrize("command", MODULES)
def test_every_command_has_its_module(command: str) -> None:
    assert callable(import_module(MODULES[command]).run)


@pytest.mark.parametrize("command", ["judge", "vae"])
def test_trainings_are_not_measurements(command: str) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([command])


def told(monkeypatch: pytest.MonkeyPatch, *options: object) -> str:
    """Run a command that must fail; return its error message."""
    monkeypatch.setattr("sys.argv", ["eval", *map(str, options)])
    with pytest.raises(SystemExit) as error:
        main()
    return str(error.value)


@pytest.mark.parametrize("command", ["world", "fine", "frechet", "parity", "benchmark", "attention", "ablation", "calibration"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is a folder, or inside a file. No weights exist here, so any work would give another error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" if command == "ablation" else tmp_path
    options = ["--smoke"] if command == "ablation" else []
    assert re.search("can't be written|is a folder", told(monkeypatch, command, "--out", out, *options))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--n 0", "--steps 0", "--n -3", "--steps 1.5", "--n many"])
def test_impossible_counts_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["world", *option.split()])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "eval.fine", raising=False)
    monkeypatch.delitem(sys.modules, "eval.tables", raising=False)
    monkeypatch.delitem(sys.modules, "eval.ablation.report", raising=False)
    assert told(monkeypatch, "fine") == "error: pandas is not installed: pip install -e '.[world,eval,test]'"


@pytest.mark.parametrize("command", ["ablation", "world", "fine", "frechet"])
def test_a_missing_device_is_told(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path if command == "ablation" else tmp_path / "results.json"
    assert told(monkeypatch, command, "--device", "cuda:99", "--out", out).startswith("error: --device cuda:99 can't be used here (")


def test_parity_names_what_is_not_equal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One part has more than twice the public error in one dtype. The numbers are written before the error is raised."""
    parts = {
        "a": {"float32": [1e-6, 1.9e-6], "bfloat16": [0.01, 0.021]},
        "b": {"float32": [1.0, 1.0], "bfloat16": [1.0, 0.1]},
    }
    monkeypatch.setattr("eval.peers.parity.measure", lambda *_: parts)
    said = told(monkeypatch, "parity", "--out", tmp_path / "parity.json")
    assert said.endswith("more than twice the public one: a in bfloat16: 2.1e-02 against 1.0e-02")
    assert json.loads((tmp_path / "parity.json").read_text())["parts"] == parts


def test_a_table_is_markdown() -> None:
    frame = pd.DataFrame({"": ["a", "b"], "λ": [0.5, None], "n": [1, 2]})
    assert markdown(frame).splitlines() == ["|  | λ | n |", "| --- | --- | --- |", "| a | 0.5 | 1 |", "| b |  | 2 |"]
    assert summary({"a": 0.12345, "b": 2}) == "a 0.123, b 2.000"


def test_two_functions_are_timed_alternately() -> None:
    """The functions only sleep, so the ratio is that of the sleeps. Every round starts with a warm-up run."""
    import time

    calls: list[str] = []

    def sleep(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    row = beside(lambda: sleep("ours", 0.01), lambda: sleep("theirs", 0.2), rounds=3)
    assert 0.01 <= row["ours"] < 0.1 and 0.2 <= row["theirs"] < 2 and row["ratio"] < 0.5  # other processes may delay a sleep
    assert calls == ["ours", "ours", "theirs", "theirs"] * 3
