"""The primary difference read in other ways, for what speaks against the claim."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from eval.ablation.endpoint import PARTS, count_ends
from eval.ablation.forms import IP_ADAPTER, SIMPLE
from eval.ablation.names import alone_name
from eval.ablation.rows import Results
from eval.ablation.statistics import Curve, at_level

LEVELS = 0.6, 0.7, 0.9, 0.95  # other levels at which the primary difference is read


def robustness(results: Results) -> dict[str, Any]:
    """Return the primary difference read in other ways.

    `levels`: at other levels, for each set of prompts, where it was measured (`measured`). `only`: where only the background, or only size
    and place, count as following. `shares`: the share of the lead that `shared` and `concatenated` have, by level, on the test prompts.
    `smallest`: the share of following and the information of the simple adapter at its smallest lambda. `extremes`: the largest
    information of the simple adapter, with any seed at any lambda, and the smallest of IP-Adapter from lambda 1 on.
    """
    if not {IP_ADAPTER, SIMPLE} <= set(results.study["forms"]) or results.truth() is None:
        return {}
    level = results.study["level"]
    ours, simple = (results.curve(form) for form in (IP_ADAPTER, SIMPLE))
    summary: dict[str, Any] = {"levels": {split: by_level(results, split) for split in splits(results)}}
    summary["only"] = {key: only(results, key) for key in PARTS}
    curves = {form: results.curve(form) for form in results.study["forms"]}
    levels = [at for at in sorted({*LEVELS, level}) if all(measured(curve, at) for curve in curves.values())]
    summary["shares"] = {f"{at:.0%}": shares_of_the_lead(curves, at) for at in levels}
    share = simple.following.mean(axis=(0, 2))
    summary["smallest"] = {"share": float(share[1] / max(share[0], 1e-9)), "information": float(simple.value[:, 1].mean())}
    from_one = ours.value[:, results.grid(IP_ADAPTER).index(1.0) :]
    summary["extremes"] = [float(simple.value.mean(axis=-1).max()), float(from_one.mean(axis=-1).min())]
    return summary


def splits(results: Results) -> list[str]:
    """List the sets of prompts that were drawn, of those for the test and to confirm."""
    return [split for split in ("test", "confirm") if alone_name(results.primary, split) in results.units]


def measured(curve: Curve, level: float) -> bool:
    """Return whether a form was drawn near a level: not all its seeds are read on the straight line from the text alone."""
    return count_ends(curve, level)["start"] < len(curve.value)


def by_level(results: Results, split: str) -> dict[str, Any]:
    """Return the primary difference at other levels, where both forms were measured."""
    ours, simple = (results.curve(form, split=split) for form in (IP_ADAPTER, SIMPLE))
    levels = [at for at in LEVELS if measured(ours, at) and measured(simple, at)]
    return {f"{at:.0%}": asdict(results.bootstrap.difference(ours, simple, at_level(at))) for at in levels}


def only(results: Results, following: str) -> dict[str, Any]:
    """Return the primary difference where only the measure `following` counts as following the text, for each set of prompts.

    `read`: where both forms are read. `strict`: the same at the highest of `LEVELS`.
    """
    found: dict[str, Any] = {"read": {}, "strict": {}}
    for split in splits(results):
        curves = {form: results.curve(form, split=split, following=following) for form in (IP_ADAPTER, SIMPLE)}
        for at, into in ((results.study["level"], found), (LEVELS[-1], found["strict"])):
            into[split] = asdict(results.bootstrap.difference(curves[IP_ADAPTER], curves[SIMPLE], at_level(at)))
        found["read"][split] = {form: count_ends(curve, results.study["level"]) for form, curve in curves.items()}
    return found


def shares_of_the_lead(curves: dict[str, Curve], level: float) -> dict[str, float]:
    """Return the share of IP-Adapter's lead over the simple adapter that each of the other forms has, at a level."""
    means = {form: float(curve.seeds(at_level(level)).mean()) for form, curve in curves.items()}
    lead = means[IP_ADAPTER] - means[SIMPLE]
    return {form: (mean - means[SIMPLE]) / lead for form, mean in means.items() if form not in (IP_ADAPTER, SIMPLE)}
