"""Make the table of docs/world.md from the scores of `python -m eval world`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from eval.scores import Scores
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


NAMES = {
    "true": "held-out pictures",
    "reconstructed": "held-out pictures through the VAE: the ceiling",
    "text": "text with concept and background",
    "scene": "text with concept, background, size and place",
    "colour": "text with concept, background and the right colour name",
    "image": "image prompt alone",
    "complementary": "image prompt, and a text with background, size and place",
    "apart": "the same, with more guidance by the text",
    "conflict": "image prompt, and a text with another concept and background",
    "grey": "a uniform grey",
    "another": "another image prompt's palette",
}
COMPARED = "concept", "background", "all", "palette_error"  # what two judges are compared in


def lambdas(results: dict[str, Any]) -> dict[str, float]:
    """Return lambda of the lines that have one."""
    return {"image": 1.0, "apart": 1.0, **results["lambda"]}


def table(results: dict[str, Any]) -> str:
    """Make the table: one line per entry of `results["scores"]`, as value ± half of the 95 % interval."""
    given = lambdas(results)
    names = {key: f"{name}, λ = {given[key]:g}" if key in given else name for key, name in NAMES.items()}
    names["apart"] += f", guidance {results['text_guidance']:g} and {results['settings']['guidance']:g}"
    lines = [{"": name} | line(results["scores"][key]) for key, name in names.items()]
    return markdown(pd.DataFrame(lines, columns=["", *SHARES.values(), *ERRORS.values()]))


def two_judges(results: dict[str, Any], other: dict[str, Any]) -> str:
    """Tabulate the scores by two judges, one after the other in each cell, and the lambdas that they choose."""
    lines, both = [], (results, other)
    for key in [key for key in NAMES if "concept" in results["scores"][key] and key in other["scores"]]:
        cells = {"": NAMES[key], "λ": ", ".join(f"{lambdas(each)[key]:g}" for each in both if key in lambdas(each))}
        for measure in COMPARED:
            scale, unit = (100, " %") if measure in SHARES else (1, "")
            values = [f"{scale * each['scores'][key][measure][0]:.1f}" for each in both if measure in each["scores"][key]]
            cells[(SHARES | ERRORS)[measure]] = ", ".join(values) + unit if values else ""
        lines.append(cells)
    return markdown(pd.DataFrame(lines))


def line(scores: Scores) -> dict[str, str]:
    """Format scores as {column title: text}, such as "93.8 ± 1.5 %" or "31.5 ± 0.9"."""
    shares = {SHARES[key]: f"{plus_minus(score, scale=100)} %" for key, score in scores.items() if key in SHARES}
    return shares | {ERRORS[key]: plus_minus(score) for key, score in scores.items() if key not in SHARES}


def plus_minus(score: list[float], digits: int = 1, scale: float = 1) -> str:
    """Format a score as its value ± half of its interval."""
    value, low, high = score
    return f"{scale * value:.{digits}f} ± {scale * (high - low) / 2:.{digits}f}"
