"""The rules by which `python -m eval world` chooses its settings, on validation prompts. A row holds a setting and its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.bench import Row

ERROR = 15.0  # largest palette error of `best_apart`
FOLLOW = 0.9  # required share of drawings with the concept of the conflicting text, and with its background


def best_scene(rows: Sequence[Row]) -> Row:
    """Return the row with the largest share of drawings whose concept, background, size and place are all right."""
    return max(rows, key=lambda row: float(row["all"][0]))


def best_apart(rows: Sequence[Row]) -> Row:
    """Return what `best_scene` does among the rows with a palette error of at most `ERROR`; if there are none, the one with the least."""
    keep = [row for row in rows if float(row["palette_error"][0]) <= ERROR]
    return best_scene(keep) if keep else min(rows, key=lambda row: float(row["palette_error"][0]))


def best_conflict(rows: Sequence[Row]) -> Row:
    """Return the row with the lowest palette error among those where concept and background each reach the share `FOLLOW`.

    If there is none, return the row where the smaller of the two shares is largest.
    """

    def follows(row: Row) -> float:
        return min(float(row["concept"][0]), float(row["background"][0]))

    keep = [row for row in rows if follows(row) >= FOLLOW]
    return min(keep, key=lambda row: float(row["palette_error"][0])) if keep else max(rows, key=follows)


RULES: dict[str, Callable[[Sequence[Row]], Row]] = {"complementary": best_scene, "conflict": best_conflict}
