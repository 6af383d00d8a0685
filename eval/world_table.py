"""Make the table of docs/world.md from the scores of `python -m eval world`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from eval.tables import markdown

SHARES = {
    "concept": "concept",
    "background": "background",
    "size": "size",
    "place": "place",
    "all": "all four",
    "drawing": "drawing",
}
ERRORS = {"palette_error": "palette error", "placement_error": "placement error"}


def table(results: dict[str, Any]) -> str:
    """Make the table: one line per entry of `results["scores"]`, as value ± half of the 95 % interval."""
    lam = {key: f"λ = {value:g}" for key, value in results["lambda"].items()}
    names = {
        "true": "held-out pictures",
        "reconstructed": "held-out pictures through the VAE: the ceiling",
        "text": "text with concept and background",
        "scene": "text with concept, background, size and place",
        "colour": "text with concept, background and the right colour name",
        "image": "image prompt alone, λ = 1",
        "complementary": f"image prompt, and a text with background, size and place, {lam['complementary']}",
        "conflict": f"image prompt, and a text with another concept and background, {lam['conflict']}",
        "grey": "a uniform grey",
        "another": "another image prompt's palette",
    }
    lines = [{"": name} | line(results["scores"][key]) for key, name in names.items()]
    return markdown(pd.DataFrame(lines, columns=["", *SHARES.values(), *ERRORS.values()]))


def line(scores: dict[str, list[float]]) -> dict[str, str]:
    """Format scores as {column title: text}, such as "93.8 ± 1.5 %" or "31.5 ± 0.9"."""
    cells = {}
    for key, (value, low, high) in scores.items():
        half = (high - low) / 2
        if key in SHARES:
            cells[SHARES[key]] = f"{100 * value:.1f} ± {100 * half:.1f} %"
        else:
            cells[ERRORS[key]] = f"{value:.1f} ± {half:.1f}"
    return cells
