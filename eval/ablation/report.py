"""Render RESULTS.md from results/ablation.json; no number is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.ablation import equal_rates
from eval.ablation.against import SETS, against, each_change
from eval.ablation.appendix import ceiling_table, grid_table, mark, rate_table
from eval.ablation.endpoint import RIGHT
from eval.ablation.forms import FORMS, IP_ADAPTER, SIMPLE
from eval.ablation.rows import Results
from eval.tables import markdown, seeds_interval, with_interval

TITLES = {
    "following": ("follows", ".0%"),
    "concept": ("concept", ".0%"),
    "information": ("information", ".1f"),
    "clip_i": ("CLIP-I", ".3f"),
    "clip_t": ("CLIP-T", ".3f"),
}
DIGITS = {"CLIP-I": 3, "retrieval AUC": 3}  # of secondary endpoints; others have one


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format the mean over seeds, and the standard deviation between seeds if there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def p_value(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def headline(results: Results, rates: Results | None = None) -> str:
    """State the result of the primary comparison (docs/ablation-protocol.md, "What counts").

    `rates`: the results of tier F. If the difference at equal learning rates is the smaller one, the headline leads with it.
    """
    summary = results.data["summary"]
    if SIMPLE not in summary["difference"]:
        return "The study does not hold both forms of the primary comparison."
    first, name = summary["difference"][SIMPLE], "palette information" if results.truth() else "similarity to the image prompt"
    told = [first, summary.get("confirmed", {}).get(SIMPLE, first)]
    again = f" (on the confirmation prompts {with_interval(told[1])})" if "confirmed" in summary else ""
    of = f"; the ceiling is {summary['ceilings']['vae']:.1f}" if results.truth() else ""
    where, minus, more = "where both follow the text equally often", "IP-Adapter minus the simple adapter is", ""
    text = f"{where}, {minus} {with_interval(first)} in {name}{again}{of}"
    if equal := asdict(equal_rates.primary(rates, results)) if rates else None:
        more = f" With one learning rate for both, it is {with_interval(equal)}."
        if equal["mean"] < first["mean"]:
            one, chosen = "with one learning rate for both", f"{with_interval(first)} with the rates that the held-out loss chose{again}"
            text, more = f"{where}, {minus} {with_interval(equal)} in {name} {one}, and {chosen}{of}", ""
            told.append(equal)
    if any(each["high"] < 0 for each in told):
        return f"The simple adapter beats decoupled attention here: {text}.{more}"
    if all(each["low"] > 0 for each in told):
        return f"Decoupled attention beats the simple adapter here: {text}.{more}"
    if first["low"] <= 0 and any(each["low"] > 0 for each in summary["steps"]["difference"][:-1]):
        return f"The simple adapter catches up: IP-Adapter is ahead earlier in training, but in the end, {text}.{more}"
    return f"The study does not decide between the two forms: {text}.{more}"


def square(ends: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Tabulate the endpoints of the four forms as a 2 x 2 table, with the share of right concepts where it is known."""

    def cell(form: str) -> str:
        endpoint = ends.get(form)
        if endpoint is None:
            return ""
        concept = f" (concept {np.mean(endpoint['concept']):.0%})" if "concept" in endpoint else ""
        return mark(spread(endpoint["information"]), endpoint) + concept

    rows = {"own W'_k, W'_v": ("ip_adapter", "concatenated"), "the text's W_k, W_v": ("shared", "simple")}
    return pd.DataFrame([{"": name, "separate softmax": cell(a), "joint softmax": cell(b)} for name, (a, b) in rows.items()])


def lead(results: Results, rates: Results | None = None) -> str:
    """State the result (`headline`), and at the chosen rates, what each of the two changes does alone, and the 2 x 2 table."""
    table = markdown(square(results.data["summary"]["endpoint"]))
    return "\n\n".join([headline(results, rates), *each_change(results, chosen=rates is not None), table])


def difference_table(results: Results, rates: Results | None) -> pd.DataFrame:
    """Tabulate IP-Adapter minus each other form, on the test and on the confirmation prompts, and minus the simple adapter of tier F."""
    summary, lines = results.data["summary"], []
    for key, prompts in (("difference", "test"), ("confirmed", "confirmation")):
        for form, d in summary.get(key, {}).items():
            line = {"IP-Adapter minus": FORMS[form].name, "prompts": prompts, "difference [95 %]": with_interval(d), "p": p_value(d["p"])}
            lines.append(line | {"over seeds alone": seeds_interval(d), "test": "primary" if form == SIMPLE else "adjusted"})
    if rates:
        d = asdict(equal_rates.primary(rates, results))
        line = {"IP-Adapter minus": f"the simple adapter at the learning rate {rates.data['summary']['rate']:g}", "prompts": "test"}
        line |= {"difference [95 %]": with_interval(d), "p": "", "over seeds alone": seeds_interval(d), "test": "tier F"}
        lines.append(line)
    return pd.DataFrame(lines)


def level_table(results: Results) -> pd.DataFrame:
    """Tabulate what is right in the drawings at the level, and with the text alone."""
    names = {key: key.removeprefix("right ") for key in RIGHT} | {"concept": "the image prompt's concept"}
    alone = results.alone()
    lines = [{"": "the text alone"} | {name: f"{alone[key].mean():.0%}" for key, name in names.items()}]
    for form, end in results.data["summary"]["endpoint"].items():
        lines.append({"": FORMS[form].short} | {name: mark(f"{np.mean(end[key]):.0%}", end) for key, name in names.items()})
    return pd.DataFrame(lines)


def step_table(results: Results) -> pd.DataFrame:
    """Tabulate the endpoint and the primary difference after each number of steps."""
    summary = results.data["summary"]["steps"]
    lines = []
    for i, step in enumerate(summary["steps"]):
        ends = {form: mark(spread(each[i]), summary["read"][form][i]) for form, each in summary["endpoint"].items()}
        line = {"steps": f"{step:,}"} | {FORMS[form].short: end for form, end in ends.items()}
        lines.append(line | ({"IP-Adapter minus simple": with_interval(summary["difference"][i])} if "difference" in summary else {}))
    return pd.DataFrame(lines)


def one_table(results: Results) -> pd.DataFrame:
    """Tabulate all tasks at lambda 1."""
    lines = []
    for task in results.data["tasks"]:
        for form, measures in results.data["summary"]["paper"][task].items():
            numbers = {TITLES[key][0]: format(np.mean(values), TITLES[key][1]) for key, values in measures.items()}
            if task == "picture":
                numbers.pop("follows", None)
            lines.append({"task": task, "form": FORMS[form].short, **numbers})
    return pd.DataFrame(lines)


def secondary_table(results: Results) -> pd.DataFrame:
    """Tabulate the secondary endpoints, and the held-out losses."""
    lines = []
    for name, row in results.data["summary"]["secondary"].items():
        digits = DIGITS.get(name, 1)
        ends = {form: mark(spread(values, digits), row["read"].get(form, {})) for form, values in row["forms"].items()}
        line = {"": name} | {FORMS[form].short: end for form, end in ends.items()}
        lines.append(line | {"IP-Adapter minus simple": with_interval(row["difference"], digits) if row["difference"] else ""})
    losses = results.data["summary"]["losses"]
    return pd.DataFrame([*lines, {"": "held-out loss"} | {FORMS[form].short: spread(each, 5) for form, each in losses.items()}])


def seed_counts(results: Results) -> str:
    """Say how many seeds each form has: "5 of IP-Adapter and simple, 3 of shared and joint"."""
    forms: dict[int, list[str]] = {}
    for form, each in results.data["summary"]["endpoint"].items():
        forms.setdefault(len(each["information"]), []).append(FORMS[form].short)
    return ", ".join(f"{count} of {' and '.join(names)}" for count, names in forms.items())


def following_alone(results: Results) -> str:
    """Say how often drawings from the text alone follow it, on each set of prompts."""
    measures = {SETS[split]: results.alone(split=split) for split in SETS if split in results.data["prompts"]}
    return ", ".join(f"{each['following'].mean():.0%} of the {name}" for name, each in measures.items())


def records(results: Results, rates: Results | None = None) -> str:
    """Say which commits and processors the rows come from, and which seeds were trained on several kinds of processor.

    `rates`: the results of tier F.
    """
    commits, processors = _made(results)
    kinds: dict[int, set[str]] = {}
    for name, unit in results.units.items():
        if name.startswith("train-"):
            kinds.setdefault(unit.value["seed"], set()).add(unit.made["processor"])
    seeds = [str(seed) for seed, each in kinds.items() if len(each) > 1]
    rows = "All rows but that of tier F" if rates else "All rows"
    sentence = f"{rows} come from commit {commits[0]}" if len(commits) == 1 else f"**The rows come from commits {', '.join(commits)}**"
    sentence += f", and were computed on {'; '.join(processors)}."
    if rates:
        sentence += " That one comes from commit {}, and was computed on {}.".format(*map("; ".join, _made(rates)))
    return sentence + (f" **The forms of seed {', '.join(seeds)} were trained on different processors.**" if seeds else "")


def _made(results: Results) -> tuple[list[str], list[str]]:
    """Return the commits and the processors of all rows."""
    made = [unit.made for unit in results.units.values()]
    return sorted({each["commit"] for each in made}), sorted({each["processor"] for each in made})


def render(results: Results, rates: Results | None = None) -> str:
    """Render RESULTS.md from the template beside this file. `rates`: the results of tier F."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True)
    tables = {
        "differences": difference_table(results, rates),
        "level": level_table(results) if results.truth() else pd.DataFrame(),
        "steps": step_table(results),
        "one": one_table(results),
        "secondary": secondary_table(results),
        "rates": rate_table(results),
        "grids": grid_table(results),
        "ceilings": ceiling_table(results),
    }
    summary = results.data["summary"]
    return templates.get_template("results.md.jinja").render(
        study=results.study,
        lead=lead(results, rates),
        against=against(results, rates),
        trend=with_interval(summary["steps"]["trend"]) if "trend" in summary["steps"] else "",
        p_trend=p_value(summary["steps"]["trend"]["p"]) if "trend" in summary["steps"] else "",
        alone={key: with_interval(each[SIMPLE], 3 if key == "clip_i" else 1) for key, each in summary["paper"]["difference"].items()},
        ceilings=summary["ceilings"],
        first=FORMS[IP_ADAPTER].name,
        task=results.primary,
        truth=results.truth() is not None,
        prompts=len(results.data["prompts"]["test"]["texts"]["conflict"]),
        confirmation=len(results.data["prompts"].get("confirm", {"texts": {"conflict": []}})["texts"]["conflict"]),
        robustness=summary["robustness"],
        counts=seed_counts(results),
        follows=following_alone(results),
        scorer=results.data["made_from"]["scorer"],
        records=records(results, rates),
        tables={name: markdown(table) if len(table) else "" for name, table in tables.items()},
    )
