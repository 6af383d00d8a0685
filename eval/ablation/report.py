"""Render RESULTS.md from results/ablation.json; no number is typed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.ablation.endpoint import grey_error
from eval.ablation.forms import BASELINE, FORMS, PRIMARY, SHARES
from eval.ablation.rows import Results, fraction
from eval.prompts import TASKS
from eval.tables import markdown

CONTROLS = {"shuffled": "another's picture", "null": "no picture"}
NUMBERS = {
    "palette_error": ("palette error", ".1f"),
    "placement_error": ("placement error", ".1f"),
    "clip_i": ("CLIP-I", ".3f"),
    "clip_t": ("CLIP-T", ".3f"),
    "clip_score": ("CLIPScore", ".2f"),
}


def measures(pictures: pd.DataFrame) -> dict[str, str]:
    """Format the mean of each measure over pictures; missing measures are empty.

    For `conflict`, concept and background show two shares: as in the text / as in the image prompt.
    """

    def mean(key: str, form: str) -> str:
        values = pictures[key].dropna() if key in pictures else pd.Series(dtype=float)
        return "" if values.empty else format(values.mean(), form)

    line = {}
    for key in ("concept", "background", "drawing"):
        wanted, own = (mean(f"{key}_{whose}", ".0%") for whose in ("wanted", "own"))
        line[key] = f"{wanted} / {own}" if wanted and (pictures["task"] == "conflict").all() else own
    return line | {title: mean(key, form) for key, (title, form) in NUMBERS.items()}


def task_table(pictures: pd.DataFrame, task: str, forms: Sequence[str]) -> pd.DataFrame:
    """Tabulate the measures of a task: the reference rows, then each form at each lambda and control."""
    mine, lines = pictures[pictures["task"] == task], []
    for name, group in mine[mine["seed"].isna()].groupby("form", sort=False):
        lines.append({"form": name, "λ": "", **measures(group)})
    for form in forms:
        whole = mine[(mine["form"] == form) & (mine["share"] == 1)]
        for lam, group in whole.groupby("lambda"):
            lines.append({"form": FORMS[form].name, "λ": fraction(float(str(lam))), **measures(group)})
        for control, group in whole.groupby("control", sort=False):
            lines.append({"form": FORMS[form].name, "λ": f"1, {CONTROLS[str(control)]}", **measures(group)})
    return pd.DataFrame(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def primary(results: Results) -> pd.DataFrame:
    """Tabulate the primary endpoint of each form and its difference from IP-Adapter."""
    summary, pictures = results.data["summary"], results.pictures
    errors = pictures[pictures["task"] == "conflict"].groupby("form")["error"].mean()
    ceiling = errors.get("truth, through the VAE", np.nan)

    def line(name: str, ends: Sequence[float]) -> dict[str, str]:
        times = "" if np.isnan(ceiling) else f"{np.mean(ends) / ceiling:.1f}"
        empty = {"parameters": "", "rate": "", "error": _spread(ends)}
        return {"form": name, **empty, "times the VAE's own": times, "minus IP-Adapter [95 %]": "", "p": ""}

    lines = [line("the text alone", [errors["text alone"]])]
    for form, ends in summary["endpoint"].items():
        size, rate = results.data["parameters"][form], results.data["rates"][form]["chosen"]
        lines.append(line(FORMS[form].name, ends) | {"parameters": f"{size:,}", "rate": f"{rate:g}"})
        if d := summary["difference"].get(form):
            lines[-1]["minus IP-Adapter [95 %]"] = f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"
            lines[-1]["p"] = f"{d['p']:.3f}" + (", primary" if form == PRIMARY else "")
    return pd.DataFrame(lines)


def verdict(results: Results) -> str:
    """State each difference in a sentence, one per line."""
    lines = []
    for form, d in results.data["summary"]["difference"].items():
        word = (
            "is worse than" if d["low"] > 0 else "is better than" if d["high"] < 0 else "cannot be distinguished from"
        )
        lines.append(f"- *{FORMS[form].name}* {word} IP-Adapter: {d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}].")
    return "\n".join(lines)


def caveat(results: Results) -> str:
    """Describe the limits of the endpoint: the score of a constant grey, and the short training. Empty without ground truth."""
    shipped, study = results.data.get("shipped_pictures"), results.study
    if results.truth is None or not shipped:
        return ""
    grey, own = grey_error(results.truth["palette"]), np.mean(results.data["summary"]["endpoint"][BASELINE])
    share = study["steps"] * study["batch"] / shipped
    return (
        f"**Read this first.** A constant grey, which ignores the image prompt, scores {grey:.2f} on this endpoint; IP-Adapter "
        f"scores {own:.1f}. {study['steps']} steps are {100 * share:.1f} % of the shipped adapter's training. So the differences below "
        "compare the forms early in training; they do not show that any form reproduces the palette."
    )


def by_share(results: Results) -> pd.DataFrame:
    """Tabulate the endpoint after each share of the training."""
    return pd.DataFrame(
        {"form": FORMS[form].name, **{f"{float(s):.0%} of the training": _spread(ends) for s, ends in each.items()}}
        for form, each in results.data["summary"]["share"].items()
    )


def rate_table(results: Results) -> pd.DataFrame:
    """Tabulate `gain_shuffled`, times 1000, after a short training at each learning rate."""
    return pd.DataFrame(
        {
            "form": FORMS[form].name,
            **{rate: "not finite" if gain is None else f"{1000 * gain:.2f}" for rate, gain in each["gains"].items()},
        }
        for form, each in results.data["rates"].items()
    )


def mass_table(results: Results) -> pd.DataFrame:
    """Tabulate 1 - g of each joint softmax, seed 0, before training and after each share of it, with and without a picture."""
    masses, lines = results.masses, []
    means = masses.groupby(["form", "words", "picture", "share"])["mass"].mean()
    counts = sorted(masses["words"].unique(), reverse=True)
    for form, words, picture in itertools.product(masses["form"].unique(), counts, ("own", "null")):
        named = {"form": FORMS[form].name, "text keys": words, "picture": {"own": "its own", "null": "none"}[picture]}
        shares = {"untrained": 0.0, **{f"{share:.0%}": share for share in SHARES}}
        lines.append(named | {key: f"{means[form, words, picture, share]:.1%}" for key, share in shares.items()})
    return pd.DataFrame(lines)


def steps_table(results: Results) -> pd.DataFrame:
    """Tabulate two forms drawn with few and with many steps, seed 0."""
    lines: list[dict[str, Any]] = []
    for form in (BASELINE, PRIMARY):
        many, all_few = results.more_steps(form), results.pictures
        lam, alone = many["lambda"][0], all_few[(all_few["form"] == "text alone") & (all_few["task"] == "conflict")]
        few = all_few[(all_few["form"] == form) & (all_few["seed"] == 0) & (all_few["share"] == 1)]
        few = few[(few["task"] == "conflict") & (few["lambda"] == lam)]
        for drawn, steps in ((few, results.study["draw_steps"]), (many, results.study["check_steps"])):
            follows = drawn["follows"] if results.truth else drawn["clip_t"] / alone["clip_t"].mean()
            numbers = {"follows the text": f"{follows.mean():.0%}", "error": f"{drawn['error'].mean():.1f}"}
            lines.append({"form": FORMS[form].name, "λ": fraction(lam), "steps": steps, **numbers})
    return pd.DataFrame(lines)


def half_width(summary: dict[str, Any]) -> float:
    """Return the half-width of the interval of the primary difference."""
    primary = summary["difference"][PRIMARY]
    return float(primary["high"] - primary["low"]) / 2


def render(results: Results) -> str:
    """Render RESULTS.md from the template beside this file."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True)
    tables = {
        "primary": primary(results),
        "shares": by_share(results),
        "mass": mass_table(results),
        "rates": rate_table(results),
        "steps": steps_table(results),
        **{task: task_table(results.pictures, task, results.study["forms"]) for task in TASKS},
    }
    return templates.get_template("results.md.jinja").render(
        study=results.study,
        prompts=len(results.data["prompts"]["conflict"]),
        scorer=results.data["scorer"],
        truth=results.truth is not None,
        first=FORMS[BASELINE].name,
        second=FORMS[PRIMARY].name,
        width=f"{half_width(results.data['summary']):.1f}",
        caveat=caveat(results),
        verdict=verdict(results),
        tables={name: markdown(table) for name, table in tables.items()},
    )
