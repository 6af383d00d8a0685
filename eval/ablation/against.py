"""What speaks against the headline of RESULTS.md, found in the numbers."""

from __future__ import annotations

import numpy as np

from eval.ablation.forms import BASELINE, FORMS, PRIMARY
from eval.ablation.rows import Results
from eval.ablation.summary import trainings
from eval.tables import shown


def against(results: Results) -> list[str]:
    """List in sentences what weakens the claim: the length of training, the learning rates, and the numbers of parameters."""
    return [*_length(results), *_edges(results), *_sizes(results)]


def not_beaten(results: Results) -> list[str]:
    """Name in sentences the forms that IP-Adapter is not shown to beat, and how much of its lead over the simple adapter they have."""
    found = results.data["summary"]["difference"]
    told = []
    for form, difference in found.items():
        if form == PRIMARY or difference["low"] > 0 or PRIMARY not in found:
            continue
        share = 1 - difference["mean"] / found[PRIMARY]["mean"]
        told.append(
            f"IP-Adapter is not shown to beat `{FORMS[form].short}` ({FORMS[form].name}): {shown(difference)}. "
            f"That form has {share:.0%} of IP-Adapter's lead over the simple adapter."
        )
    return told


def _length(results: Results) -> list[str]:
    """Say where the primary difference is smallest, and whether the simple adapter gets worse with more training."""
    found = results.data["summary"]["steps"]
    if "difference" not in found:
        return []
    steps, means = found["steps"], [each["mean"] for each in found["difference"]]
    simple = np.mean(found["endpoint"][PRIMARY], axis=1)
    least, best = int(np.argmin(means)), int(np.argmax(simple))
    told = f"The lead depends on the length of training. It is smallest after {steps[least]:,} steps: {means[least]:+.1f}."
    if best < len(steps) - 1:
        told += f" The simple adapter is best after {steps[best]:,} steps ({simple[best]:.1f}), and worse in the end ({simple[-1]:.1f})."
    return [told]


def _edges(results: Results) -> list[str]:
    """Name the forms whose learning rate is at the edge of the range."""
    rates, runs = results.study["rates"], trainings(results)
    edges = (min(rates), max(rates)) if len(rates) > 1 else ()
    at_edge = [FORMS[form].short for form, each in runs.items() if each and each[0]["rate"] in edges]
    told = f"Rates were chosen after {results.study['steps'] // 4:,} steps with one seed."
    if at_edge:
        told = f"The learning rate of {', '.join(f'`{name}`' for name in at_edge)} is at the edge of the range. {told}"
    best = _best(results)
    if not {BASELINE, PRIMARY} <= set(best):
        return [f"{told} No form was trained longer at other rates."]
    told += f" Over all rates and lengths, the best endpoint of the simple adapter is {best[PRIMARY]}"
    return [f"{told}; that of IP-Adapter is {best[BASELINE]}."]


def _best(results: Results) -> dict[str, str]:
    """Return the best endpoint of each form that was trained to the end at every rate, and where it is reached."""
    found = {}
    for form, rates in results.data["summary"]["rates"].items():
        ends = [(end, step, rate) for rate, each in rates.items() for step, end in each.get("through", {}).items() if end is not None]
        if ends:
            end, step, rate = max(ends)
            found[form] = f"{end:.1f} (rate {rate}, {int(step):,} steps)"
    return found


def _sizes(results: Results) -> list[str]:
    """Compare the numbers of trained parameters."""
    sizes = {form: runs[0]["parameters"] for form, runs in trainings(results).items() if runs}
    if sizes.get(BASELINE, 0) <= sizes.get(PRIMARY, 0) or PRIMARY not in sizes:
        return []
    alike = [f"`{FORMS[form].short}`" for form, size in sizes.items() if size == sizes[PRIMARY] and form != PRIMARY]
    told = f"IP-Adapter has {sizes[BASELINE] / sizes[PRIMARY]:.1f} times as many trained parameters as the simple adapter."
    return [told + (f" {' and '.join(alike)} has as few as the simple adapter." if alike else "")]
