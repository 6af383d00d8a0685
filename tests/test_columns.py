"""The columns of the benchmark: their medians, ranges and ratios. (The steps themselves need weights of full size.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.peers import benchmark, columns


def test_columns_take_turns_and_ratios_are_taken_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"diffusers": [10, 20, 10], "plain": [9, 22, 11], "fast": [7, 13, 8], "diffusers, memory kept": [9, 19, 9]}
    asked: list[str] = []

    def measure(_: Path, column: str, dtype: str) -> float:
        asked.append(column)
        assert dtype == "bfloat16"
        return float(times[column][asked.count(column) - 1])

    monkeypatch.setattr(columns, "measured_seconds", measure)
    row = columns.columns(Path("x"), 3, "bfloat16")
    assert asked == [*columns.COLUMNS] * 3
    assert (row["ours"], row["theirs"], row["ratio"]) == (8, 10, 0.7)
    assert row["seconds"]["plain"] == [11, 9, 22]
    assert row["ratios"]["plain / diffusers"] == [1.1, 0.9, 1.1]
    page = columns.table(row)
    assert "| fast | 8.00 s | 7.00 s | 13.00 s |" in page and "| fast / diffusers | 0.700 | 0.650 | 0.800 |" in page
    assert "0.70" in benchmark.table({"fast step, bfloat16": row})


def test_a_column_is_one_of_three_sides() -> None:
    assert {kind for kind, _ in columns.COLUMNS.values()} == {"theirs", "plain", "fast"}
    assert {name for pair in columns.RATIOS.values() for name in pair} == set(columns.COLUMNS)
