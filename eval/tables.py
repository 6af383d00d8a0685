"""Format tables as Markdown, and numbers on one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


def markdown(frame: pd.DataFrame) -> str:
    """Format a data frame as a Markdown table without its index. Missing values become empty cells."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.fillna("").to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def summary(values: Mapping[str, float]) -> str:
    """Format named numbers on one line: "concept 0.938, palette_error 31.500"."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def with_interval(difference: Mapping[str, float], digits: int = 1) -> str:
    """Format a difference with its 95 % interval: "+2.0 [+1.0, +3.0]"."""
    mean, low, high = (f"{difference[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def seeds_interval(difference: Mapping[str, Any]) -> str:
    """Format a difference with its interval over seeds alone; "" if there is one seed."""
    return with_interval({**difference, "low": difference["seeds"][0], "high": difference["seeds"][1]}) if difference["seeds"] else ""
