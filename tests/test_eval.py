"""The command line of the measurements: its help, and which module answers a command."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from eval.__main__ import MODULES
from eval.options import parser
from eval.peers.timing import beside
from eval.tables import markdown, summary

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "pandas", "matplotlib", "open_clip", "diffusers", "numpy")


def commands() -> dict[str, argparse.ArgumentParser]:
    found = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


@pytest.mark.parametrize("command", ["", *MODULES])
def test_help_imports_nothing_heavy(command: str) -> None:
    """As the shell runs it."""
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


@pytest.mark.parametrize("command", ["judge", "clip"])
def test_trainings_are_not_measurements(command: str) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([command])


def test_a_table_is_markdown() -> None:
    frame = pd.DataFrame({"": ["a", "b"], "λ": [0.5, None], "n": [1, 2]})
    assert markdown(frame).splitlines() == ["|  | λ | n |", "| --- | --- | --- |", "| a | 0.5 | 1 |", "| b |  | 2 |"]
    assert summary({"a": 0.12345, "b": 2}) == "a 0.123, b 2.000"


def test_two_sides_are_timed_in_turn() -> None:
    """Sleeping is what takes the time: the ratio is that of the two sleeps, and every round warms up first."""
    import time

    calls: list[str] = []

    def sleep(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    row = beside(lambda: sleep("ours", 0.02), lambda: sleep("theirs", 0.08), rounds=3)
    assert 0.02 <= row["ours"] < 0.05 and 0.08 <= row["theirs"] < 0.2 and 0.1 < row["ratio"] < 0.5
    assert calls == ["ours", "ours", "theirs", "theirs"] * 3
