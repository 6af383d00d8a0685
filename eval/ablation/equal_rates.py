"""The primary comparison at equal learning rates: IP-Adapter of tier A minus the simple adapter of tier F, read in several ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from eval.ablation.endpoint import PARTS, count_ends
from eval.ablation.forms import IP_ADAPTER, SIMPLE
from eval.ablation.rows import Results
from eval.ablation.statistics import Curve, Interval, at_index, at_level
from eval.ablation.summary import curve_at_one
from eval.tables import with_interval

AT_LEVEL = "at the level"


@dataclass(frozen=True)
class Lead:
    """IP-Adapter minus the simple adapter, and a note on how it was read."""

    difference: Interval
    note: str = ""

    def __str__(self) -> str:
        return with_interval(asdict(self.difference)) + (f" ({self.note})" if self.note else "")


def curves(results: Results, form: str, seeds: int) -> dict[int, Curve]:
    """Return the curves of a form after 1/4, 1/2 and all of the steps, with a few lambdas but for the last, for the first `seeds`."""
    last = results.study["steps"]
    return {step: results.curve(form, step=step, few=step < last).first(seeds) for step in (last // 4, last // 2, last)}


def primary(results: Results, first: Results) -> Interval:
    """Return the primary difference, at the level: IP-Adapter of tier A, `first`, minus the simple adapter of `results`."""
    return results.bootstrap.difference(first.curve(IP_ADAPTER), results.curve(SIMPLE), at_level(results.study["level"]))


def leads(results: Results, first: Results, seeds: int) -> dict[str, Lead]:
    """Return IP-Adapter of tier A, `first`, minus the simple adapter of `results`, read in several ways, on the first `seeds`."""
    bootstrap, level = results.bootstrap, results.study["level"]
    both = (first, IP_ADAPTER), (results, SIMPLE)

    def lead(ours: Curve, simple: Curve, note: str = "") -> Lead:
        ends = {name: count_ends(curve, level)["end"] for name, curve in (("IP-Adapter", ours), ("simple", simple))}
        read = [f"{name} at its largest λ: {count} of {seeds}" for name, count in ends.items() if count]
        return Lead(bootstrap.difference(ours, simple, at_level(level)), "; ".join([*([note] if note else []), *read]))

    ours, by_step = curves(first, IP_ADAPTER, seeds)[first.study["steps"]], curves(results, SIMPLE, seeds)
    best = max(by_step, key=lambda step: float(by_step[step].seeds(at_level(level)).mean()))
    found = {AT_LEVEL: lead(ours, by_step[results.study["steps"]])}
    for key in PARTS:
        a, b = (source.curve(form, following=key).first(seeds) for source, form in both)
        found[f"{AT_LEVEL}, counting only {key.removeprefix('right ')}"] = lead(a, b)
    found[f"{AT_LEVEL}, the simple adapter after the best number of steps"] = lead(ours, by_step[best], f"{best:,} steps")
    for task, name in ((results.primary, "at λ = 1"), ("picture", "the image prompt alone at λ = 1")):
        a, b = (curve_at_one(source, form, task).first(seeds) for source, form in both)
        found[name] = Lead(bootstrap.difference(a, b, at_index(0)))
    return found
