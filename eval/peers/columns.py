"""Measure several programs in separate processes that take turns, and compare them in a table.

Each module with columns (step.py, training.py, loading.py) is a program: `python -m MODULE FOLDER COLUMN ...` measures one column
and prints JSON, {quantity: number}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

Values = dict[str, dict[str, list[float]]]  # {quantity: {column: the values of all rounds}}
Ratios = Mapping[str, tuple[str, str]]  # {name: (column, column to divide by)}
QUANTITIES = {  # what a row adds to the name, and the unit
    "seconds": ("", "s"),
    "seconds_read": (", and read", "s"),
    "gigabytes": ("", "GB"),
    "memory_read": (": anonymous memory / weights", ""),
}


def take_turns(module: str, folder: Path, names: Sequence[str], rounds: int, *options: str) -> Values:
    """Measure all columns of a module `rounds` times, each time in a new process."""
    values: Values = {}
    for name in tqdm([*names] * rounds, desc=" ".join([module.rpartition(".")[2], *options]), unit="measurement"):
        for quantity, value in measured(module, folder, name, *options).items():
            values.setdefault(quantity, {}).setdefault(name, []).append(value)
    return values


def measured(module: str, folder: Path, name: str, *options: str) -> dict[str, float]:
    """Measure one column in a process of its own. Raises ValueError if it fails."""
    done = subprocess.run([sys.executable, "-m", module, str(folder), name, *options], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{module} could not measure {name}: {(done.stderr.strip() or f'status {done.returncode}').splitlines()[-1]}")
    return dict(json.loads(done.stdout))


def lines(name: str, values: Values, ratios: Ratios) -> list[list[str]]:
    """Return a row for each quantity and ratio: name, both medians, and the median ratio with its range.

    A ratio is taken in each round, since ratios vary less than times. Shares, which have no unit, get no ratio.
    """
    rows = []
    for quantity, columns in values.items():
        frame, (added, unit) = pd.DataFrame(columns), QUANTITIES[quantity]
        for what, (ours, theirs) in ratios.items():
            ratio = frame[ours] / frame[theirs]
            digits = 1 if frame[theirs].median() > 2 else 2
            medians = [f"{frame[column].median():.{digits}f} {unit}".rstrip() for column in (ours, theirs)]
            compared = f"{ratio.median():.2f} [{ratio.min():.2f}, {ratio.max():.2f}]" if unit else ""
            rows.append([", ".join(part for part in (name, what) if part) + added, *medians, compared])
    return rows
