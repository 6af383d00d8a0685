"""What the two changes do alone, and what speaks against the headline of RESULTS.md, in sentences made from its numbers."""

from __future__ import annotations

import numpy as np

from eval.ablation.forms import FORMS, IP_ADAPTER, SIMPLE, TIER_A, fraction
from eval.ablation.rows import Results
from eval.ablation.summary import trainings
from eval.tables import with_interval

SETS = {"test": "test prompts", "confirm": "confirmation prompts"}


def parts(results: Results) -> list[str]:
    """Say in sentences how much of the lead each change gives alone, and which forms IP-Adapter is not shown to beat."""
    summary, told = results.data["summary"], []
    ends = {form: np.mean(end["information"]) for form, end in summary["endpoint"].items()}
    if set(ends) == set(TIER_A) and (lead := ends[IP_ADAPTER] - ends[SIMPLE]) > 0:
        shares = {form: (ends[form] - ends[SIMPLE]) / lead for form in ("shared", "concatenated")}
        how = "gives most" if min(shares.values()) > 0.5 else "gives a part"
        each = f"an own softmax {shares['shared']:.0%}, own projections {shares['concatenated']:.0%}"
        told.append(f"Each change alone {how} of this lead: {each}.")
    for form, difference in summary["difference"].items():
        if form != SIMPLE and difference["low"] <= 0 <= difference["high"]:
            name = f"`{FORMS[form].short}` ({FORMS[form].name})"
            told.append(f"No difference is shown between IP-Adapter and {name}: {with_interval(difference)}.")
    return [" ".join(told)] if told else []


def against(results: Results) -> list[str]:
    """List in sentences what weakens the claim, and on what its size depends."""
    return [*_reading(results), *_length(results), *_edges(results), *_sizes(results), *_other_measures(results)]


def _reading(results: Results) -> list[str]:
    """Say how the primary difference depends on the level, and on the straight line from the text alone to the smallest lambda."""
    summary, robustness = results.data["summary"], results.data["summary"]["robustness"]
    if not robustness:
        return []
    levels = ", ".join(f"{with_interval(each)} at {level}" for level, each in robustness["levels"].items())
    grounds = " and ".join(f"{with_interval(each)} ({SETS[name]})" for name, each in robustness["backgrounds"].items())
    told = f"The size of the lead depends on the level: {levels}. If only the background counts as following, it is {grounds}."
    end, smallest = summary["endpoint"][SIMPLE], robustness["smallest"]
    if not end["start"]:
        return [told]
    lead = np.mean(summary["endpoint"][IP_ADAPTER]["information"]) - smallest["information"]
    line = (
        f"{end['start']} of {len(end['information'])} seeds of the simple adapter are read on the straight line from the text alone to "
        f"their smallest lambda, {fraction(results.grid(SIMPLE)[1])}. At that lambda it follows {smallest['share']:.0%} as often as "
        f"the text alone, and has {smallest['information']:.1f}; with this number, the lead would be {lead:+.1f}."
    )
    return [told, line]


def _length(results: Results) -> list[str]:
    """Say where the primary difference is smallest, and whether the simple adapter gets worse with more training."""
    by_step = results.data["summary"]["steps"]
    if "difference" not in by_step:
        return []
    steps, means = by_step["steps"], [each["mean"] for each in by_step["difference"]]
    simple, least = np.mean(by_step["endpoint"][SIMPLE], axis=1), int(np.argmin(means))
    told = f"The lead depends on the length of training. It is smallest after {steps[least]:,} steps: {means[least]:+.1f}."
    if 0 < least < len(steps) - 1:
        told += " Before, it shrinks, and then it grows; the slope per doubling hides this."
    if end := by_step["read"][SIMPLE][least]["end"]:
        seeds = len(by_step["endpoint"][SIMPLE][least])
        told += f" There, {end} of {seeds} seeds of the simple adapter are still above the level at their largest lambda; "
        told += "a larger one may be better."
    if simple[-1] < simple.max():
        told += f" The simple adapter falls from {simple.max():.1f} to {simple[-1]:.1f} in the end."
    return [told]


def _edges(results: Results) -> list[str]:
    """Name the forms whose learning rate is at the edge of the range."""
    rates, runs = results.study["rates"], trainings(results)
    edges = (min(rates), max(rates)) if len(rates) > 1 else ()
    at_edge = [FORMS[form].short for form, each in runs.items() if each and each[0]["rate"] in edges]
    told = f"Rates were chosen by the held-out loss after {results.study['steps'] // 4:,} steps, with one seed; some losses hardly differ."
    if at_edge:
        told = f"The learning rate of {', '.join(f'`{name}`' for name in at_edge)} is at the edge of the range. {told}"
    return [f"{told} No form was trained longer at other rates."]


def _sizes(results: Results) -> list[str]:
    """Compare the numbers of trained parameters."""
    sizes = {form: runs[0]["parameters"] for form, runs in trainings(results).items() if runs}
    if sizes.get(IP_ADAPTER, 0) <= sizes.get(SIMPLE, 0) or SIMPLE not in sizes:
        return []
    ends = {form: np.mean(found["information"]) for form, found in results.data["summary"]["endpoint"].items()}
    same = [form for form in sizes if form != SIMPLE and sizes[form] == sizes[SIMPLE]]
    alike = [f"`{FORMS[form].short}`, as small, leads it by {ends[form] - ends[SIMPLE]:+.1f}" for form in same]
    told = f"IP-Adapter has {sizes[IP_ADAPTER] / sizes[SIMPLE]:.1f} times as many trained parameters as the simple adapter."
    return [f"{told} But {'; '.join(alike)}." if alike else told]


def _other_measures(results: Results) -> list[str]:
    """Name measures that do not favour IP-Adapter: CLIP-I of the image prompt alone, and the held-out loss."""
    summary, told = results.data["summary"], []
    if (clip := summary["paper"]["difference"]["clip_i"].get(SIMPLE)) and clip["low"] <= 0:
        told.append(f"With the image prompt alone at lambda 1, CLIP-I does not separate the two forms: {with_interval(clip, 3)}.")
    means = {form: np.mean(losses) for form, losses in summary["losses"].items()}
    if lower := [f"`{FORMS[form].short}`" for form in means if means[form] < means[IP_ADAPTER]]:
        told.append(f"The held-out loss of {' and '.join(lower)} is lower than that of IP-Adapter.")
    return told
