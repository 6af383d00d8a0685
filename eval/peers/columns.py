"""Measure several programs in separate processes that take turns, and compare them in a table.

Each module with columns (eval/peers/step.py, eval/peers/training.py) is a program: `python -m MODULE FOLDER COLUMN ...` measures one column
and prints JSON, {quantity: number}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

Values = dict[str, dict[str, list[float]]]  # {quantity: {column: the values of all rounds}}
Ratios = Mapping[str, tuple[str, str]]  # {name: (column, column to divide by)}
UNITS = {"seconds": "s", "gigabytes": "GB"}


def take_turns(module: str, folder: Path, names: Sequence[str], rounds: int, *options: str) -> Values:
    """Measure all columns of a module `rounds` times, each time in a new process."""
    values: Values = {}
    for _ in range(rounds):
        for name in names:
            for quantity, value in measured(module, folder, name, *options).items():
                values.setdefault(quantity, {}).setdefault(name, []).append(value)
    return values


def measured(module: str, folder: Path, name: str, *options: str) -> dict[str, float]:
    """Measure one column in a process of its own."""
    command = [sys.executable, "-m", module, str(folder), name, *options]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


def lines(name: str, values: Values, ratios: Ratios) -> list[list[str]]:
    """Return a row for each quantity and ratio: name, both medians, and the median ratio with its range.

    A ratio is taken in each round, since ratios vary less than times.
    """
    rows = []
    for quantity, columns in values.items():
        frame, unit = pd.DataFrame(columns), UNITS[quantity]
        for what, (ours, theirs) in ratios.items():
            ratio = frame[ours] / frame[theirs]
            medians = [f"{frame[column].median():.1f} {unit}" for column in (ours, theirs)]
            rows.append([f"{name}, {what}", *medians, f"{ratio.median():.2f} [{ratio.min():.2f}, {ratio.max():.2f}]"])
    return rows
