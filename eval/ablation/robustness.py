"""The primary difference read in other ways, for what speaks against the claim."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from eval.ablation.endpoint import PARTS, count_ends
from eval.ablation.forms import IP_ADAPTER, SIMPLE
from eval.ablation.rows import Results
from eval.ablation.statistics import Bootstrap, at_level

LEVELS = 0.6, 0.7, 0.95  # other levels at which the primary difference is read


def robustness(results: Results) -> dict[str, Any]:
    """Return the primary difference read in other ways.

    `levels`: at other levels; `read`: where the simple adapter is read there (`count_ends`). `only`: where only the background, or only
    size and place, count as following. `shares`: the share of the lead that `shared` and `concatenated` have, by level. `smallest`: the
    share of following and the information of the simple adapter at its smallest lambda. `extremes`: the largest information of the
    simple adapter, with any seed at any lambda, and the smallest of IP-Adapter from lambda 1 on.
    """
    if not {IP_ADAPTER, SIMPLE} <= set(results.study["forms"]) or results.truth() is None:
        return {}
    bootstrap, level = Bootstrap(results.study["resamples"]), results.study["level"]
    ours, simple = (results.curve(form) for form in (IP_ADAPTER, SIMPLE))
    levels = {f"{at:.0%}": asdict(bootstrap.difference(ours, simple, at_level(at))) for at in LEVELS}
    summary: dict[str, Any] = {"levels": levels, "read": {f"{at:.0%}": count_ends(simple, at) for at in LEVELS}}
    summary["only"] = {key: only(results, key, bootstrap) for key in PARTS}
    summary["shares"] = {f"{at:.0%}": shares_of_the_lead(results, at) for at in sorted({*LEVELS, level})}
    share = simple.following.mean(axis=(0, 2))
    summary["smallest"] = {"share": float(share[1] / max(share[0], 1e-9)), "information": float(simple.value[:, 1].mean())}
    from_one = ours.value[:, results.grid(IP_ADAPTER).index(1.0) :]
    summary["extremes"] = [float(simple.value.mean(axis=-1).max()), float(from_one.mean(axis=-1).min())]
    return summary


def only(results: Results, following: str, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return the primary difference where only the measure `following` counts as following the text, for each set of prompts that was
    drawn; and where the simple adapter is `read`."""
    found: dict[str, Any] = {"read": {}}
    for split in [split for split in ("test", "confirm") if f"alone-{results.primary}-{split}" in results.units]:
        ours, simple = (results.curve(form, split=split, following=following) for form in (IP_ADAPTER, SIMPLE))
        found[split] = asdict(bootstrap.difference(ours, simple, at_level(results.study["level"])))
        found["read"][split] = count_ends(simple, results.study["level"])
    return found


def shares_of_the_lead(results: Results, level: float) -> dict[str, float]:
    """Return the share of IP-Adapter's lead over the simple adapter that each of the two forms between them has, at a level."""
    means = {form: float(results.curve(form).seeds(at_level(level)).mean()) for form in results.study["forms"]}
    lead = means[IP_ADAPTER] - means[SIMPLE]
    return {form: (mean - means[SIMPLE]) / lead for form, mean in means.items() if form not in (IP_ADAPTER, SIMPLE)}
