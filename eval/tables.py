"""Tables as Markdown, and numbers in one line."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd


def markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table, without its index; missing values are empty cells."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.fillna("").to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def summary(values: Mapping[str, float]) -> str:
    """Named numbers in one line: "concept 0.938, palette_error 31.500"."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
