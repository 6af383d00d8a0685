"""What the two changes do alone, and what speaks against the headline of RESULTS.md, in sentences made from its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.ablation.endpoint import PARTS
from eval.ablation.forms import FORMS, IP_ADAPTER, SIMPLE, TIER_A, fraction
from eval.ablation.rows import Results
from eval.ablation.summary import trainings
from eval.tables import with_interval

SETS = {"test": "test prompts", "confirm": "confirmation prompts"}


def each_change(results: Results, chosen: bool = False) -> list[str]:
    """Say in sentences what the lead is about, how much of it each change gives alone, and which forms IP-Adapter is not shown to beat.

    `chosen`: say that this is at the chosen learning rates.
    """
    summary, told = results.data["summary"], []
    robustness, first = summary["robustness"], summary["difference"].get(SIMPLE, {"low": 0})
    if robustness and first["low"] > 0:
        if set(summary["endpoint"]) == set(TIER_A):
            softmax, own = ([share[form] for share in robustness["shares"].values()] for form in ("shared", "concatenated"))
            how = "recovers most" if min(*softmax, *own) > 0.5 else "recovers a part"
            shares = f"a separate softmax {_range(softmax)}, own projections {_range(own)}, depending on the level"
            either = "At the chosen rates, either" if chosen else "Either"
            told.append(f"{either} change alone {how} of the lead: {shares}. These overlap, so they do not add up.")
        if (rest := robustness["only"][PARTS[1]])["test"]["mean"] < first["mean"] / 2:
            sets = f"{with_interval(rest['test'])}" + (f" (confirmation {with_interval(rest['confirm'])})" if "confirm" in rest else "")
            unmatched = all(ends[IP_ADAPTER]["end"] == results.study["seeds"] for ends in rest["read"].values())
            note = "; IP-Adapter is then above the level at its largest lambda" if unmatched else ""
            told.append(f"Much of the lead is about the background: if only size and place count as following, it is {sets}{note}.")
    for form, difference in summary["difference"].items():
        if form != SIMPLE and difference["low"] <= 0 <= difference["high"]:
            name = f"`{FORMS[form].short}` ({FORMS[form].name})"
            told.append(f"IP-Adapter and {name} do not differ significantly: {with_interval(difference)}.")
    return [" ".join(told)] if told else []


def _range(shares: list[float]) -> str:
    return f"{min(shares):.0%} to {max(shares):.0%}"


def against(results: Results, rates: Results | None = None) -> list[str]:
    """List in sentences what weakens the claim, and on what its size depends. `rates`: the results of tier F."""
    return [*_reading(results), *_length(results), *_edges(results, rates), *_sizes(results), *_other_measures(results)]


def _reading(results: Results) -> list[str]:
    """Say how the primary difference depends on the level, and on the straight line from the text alone to the smallest lambda."""
    summary, robustness = results.data["summary"], results.data["summary"]["robustness"]
    if not robustness:
        return []
    (grounds, rest), seeds = (robustness["only"][key] for key in PARTS), len(summary["endpoint"][SIMPLE]["information"])
    told = [
        f"Much of the lead is about the background. If only the background counts as following, it is {_on_each_set(grounds)}; if only "
        f"size and place do, {_on_each_set(rest)}. For the latter, {_at_ends(rest['read'], seeds)}; at a level of 95%, it is "
        f"{_on_each_set(rest['strict'])}. In training, the image prompt always has the background of the target, so an adapter may "
        "learn to take it from there."
    ]
    by_set = [
        f"{', '.join(f'{with_interval(each)} at {level}' for level, each in levels.items())} ({SETS[split]})"
        for split, levels in robustness["levels"].items()
    ]
    where = "Levels at which all seeds of a form lie on the straight line from the text alone are left out."
    told.append(f"The size of the lead depends on the level: {'; '.join(by_set)}. {where}")
    if shares := {level: each for level, each in robustness["shares"].items() if each.keys() == {"shared", "concatenated"}}:
        pairs = ", ".join(f"{each['shared']:.0%} and {each['concatenated']:.0%} at {level}" for level, each in shares.items())
        told[-1] += f" A separate softmax and own projections alone recover {pairs} of it; we give no intervals for these shares."
    end, smallest = summary["endpoint"][SIMPLE], robustness["smallest"]
    if not end["start"]:
        return told
    lead = np.mean(summary["endpoint"][IP_ADAPTER]["information"]) - smallest["information"]
    line = (
        f"{end['start']} of {len(end['information'])} seeds of the simple adapter are read on the straight line from the text alone to "
        f"their smallest lambda, {fraction(results.grid(SIMPLE)[1])}. At that lambda it follows {smallest['share']:.0%} as often as "
        f"the text alone, and has {smallest['information']:.1f}; with this number, the lead would be {lead:+.1f}."
    )
    if (read := summary.get("confirmed_read")) and not any(read[SIMPLE].values()):
        line += " On the confirmation prompts, all seeds are read between lambdas that were drawn."
    return [*told, line]


def _on_each_set(differences: dict[str, Any]) -> str:
    """Write a difference on each set of prompts."""
    return " and ".join(f"{with_interval(differences[split])} ({name})" for split, name in SETS.items() if split in differences)


def _at_ends(read: dict[str, dict[str, dict[str, int]]], seeds: int) -> str:
    """Say how many readings are at the end of their curve, over all seeds and sets of prompts."""
    ours, simple = (sum(ends[form]["end"] for ends in read.values()) for form in (IP_ADAPTER, SIMPLE))
    of = f"of {seeds * len(read)} readings"
    return f"IP-Adapter is read at its largest lambda in {ours} {of}, and the simple adapter in {simple}"


def _length(results: Results) -> list[str]:
    """Say where the primary difference is smallest, and whether the simple adapter gets worse with more training."""
    by_step = results.data["summary"]["steps"]
    if "difference" not in by_step:
        return []
    steps, means = by_step["steps"], [each["mean"] for each in by_step["difference"]]
    simple, least = np.mean(by_step["endpoint"][SIMPLE], axis=1), int(np.argmin(means))
    if 0 < least < len(steps) - 1:
        told = f"The lead shrinks until {steps[least]:,} steps ({means[least]:+.1f}), then grows; the slope per doubling hides this."
    else:
        told = f"The lead depends on the length of training. It is smallest after {steps[least]:,} steps: {means[least]:+.1f}."
    if end := by_step["read"][SIMPLE][least]["end"]:
        seeds = len(by_step["endpoint"][SIMPLE][least])
        told += f" After {steps[least]:,} steps, {end} of {seeds} seeds of the simple adapter are still above the level at their largest "
        told += "lambda, so a larger one might help it."
    if simple[-1] < simple.max():
        told += f" The simple adapter falls from {simple.max():.1f} to {simple[-1]:.1f} in the end."
        widest = int(np.argmax(np.std(by_step["endpoint"][SIMPLE], axis=1)))
        each = ", ".join(f"{end:.1f}" for end in by_step["endpoint"][SIMPLE][widest])
        told += f" Its seeds do not fall together: after {steps[widest]:,} steps they have {each}."
    return [told]


def _edges(results: Results, again: Results | None) -> list[str]:
    """Name the forms whose learning rate is at the edge of the range, and those that were trained to the end at another one, `again`."""
    rates, runs = results.study["rates"], trainings(results)
    edges = (min(rates), max(rates)) if len(rates) > 1 else ()
    at_edge = [FORMS[form].short for form, each in runs.items() if each and each[0]["rate"] in edges]
    told = f"Rates were chosen by the held-out loss after {results.study['steps'] // 4:,} steps, with one seed; some losses hardly differ."
    if at_edge:
        told = f"The learning rate of {', '.join(f'`{name}`' for name in at_edge)} is at the edge of the range. {told}"
    if again is None:
        return [f"{told} No form was trained longer at other rates."]
    ends = ", ".join(f"{end:.1f}" for end in again.data["summary"]["endpoint"][str(again.study["steps"])]["information"])
    rate = f"{again.data['summary']['rate']:g}"
    return [
        f"{told} Only the simple adapter was also trained to the end at another rate, {rate}, the one of IP-Adapter: its seeds have {ends} "
        "there; it was not drawn on the confirmation prompts ([docs/learning-rate.md](docs/learning-rate.md))."
    ]


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
    """Name measures that do not favour IP-Adapter: at lambda 1, and the held-out loss."""
    summary, told = results.data["summary"], []
    if (clip := summary["paper"]["difference"]["clip_i"].get(SIMPLE)) and clip["low"] <= 0:
        told.append(f"With the image prompt alone at lambda 1, CLIP-I does not separate the two forms: {with_interval(clip, 3)}.")
    if SIMPLE in summary["losses"] and results.truth():
        better = [_better(task, summary["paper"][task]) for task in results.data["tasks"]]
        if found := "; ".join(filter(None, better)):
            follows = np.mean(summary["paper"][results.primary][SIMPLE]["following"])
            where = f"where it follows {follows:.0%} of the {results.primary} texts"
            told.append(f"At lambda 1, {where}, the simple adapter has higher means in some measures: {found}.")
    means = {form: np.mean(losses) for form, losses in summary["losses"].items()}
    if lower := [f"`{FORMS[form].short}`" for form in means if means[form] < means[IP_ADAPTER]]:
        told.append(f"The held-out loss of {' and '.join(lower)} is lower than that of IP-Adapter.")
    ends = {form: np.mean(end["information"]) for form, end in summary["endpoint"].items()}
    if SIMPLE in means and (worse := [form for form in means if means[form] > means[SIMPLE] and ends[form] > ends[SIMPLE]]):
        names = " and ".join(f"`{FORMS[form].short}`" for form in worse)
        same = "The held-out loss, which chose the learning rates, does not order the forms as the endpoint does"
        told.append(f"{same}: that of `simple` is lower than that of {names}.")
    return told


def _better(task: str, measures: dict[str, Any]) -> str:
    """List the measures of a task in which the simple adapter has the higher mean, with the means of both."""
    found = []
    for key, (name, digits) in {"concept": ("concept", ".0%"), "clip_i": ("CLIP-I", ".3f"), "clip_t": ("CLIP-T", ".3f")}.items():
        simple, ours = (np.mean(measures[form][key]) for form in (SIMPLE, IP_ADAPTER))
        if simple > ours and f"{simple:{digits}}" != f"{ours:{digits}}":
            found.append(f"{name} {simple:{digits}} against {ours:{digits}}")
    return f"`{task}`, {', '.join(found)}" if found else ""
