"""Tier F of the ablation: the simple adapter at IP-Adapter's learning rate, trained to the end.  `python -m eval rates`

docs/ablation-protocol.md, "Tier F", says why, and what is compared.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from eval.ablation.appendix import mark
from eval.ablation.draws import Draw, draw
from eval.ablation.endpoint import PARTS, endpoint
from eval.ablation.forms import FORMS, IP_ADAPTER, SIMPLE, TIER_A
from eval.ablation.report import spread, square_of
from eval.ablation.rows import Results
from eval.ablation.statistics import Bootstrap, Curve, Interval, at_index, at_level
from eval.ablation.study import Study, Workspace
from eval.ablation.summary import curve_at_one, trainings
from eval.ablation.tier import ShortStudy, Tier, at_one, check_options, earlier
from eval.ablation.tier import jobs_of as jobs_at_the_end
from eval.ablation.work import Job
from eval.tables import markdown, with_interval


@dataclass(frozen=True)
class RateStudy(ShortStudy):
    """The size of tier F: as many steps as in tier A."""

    steps: int = 8000
    seeds: int = 3
    forms: tuple[str, ...] = (SIMPLE,)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        return self.steps // 4, self.steps // 2, self.steps


def jobs_of(workspace: Workspace, study: Study, tasks: Sequence[str]) -> list[Job]:
    """List all jobs: those of a tier that compares forms, the drawings of earlier checkpoints, and those of the image prompt alone."""
    jobs = jobs_at_the_end(workspace, study, tasks)
    for form, seed in study.runs(*study.forms):
        more = [Draw(form, seed, step, tasks[0]) for step in study.checkpoints[:-1]] + [Draw(form, seed, study.steps, "picture")]
        jobs += [Job(what.name, partial(draw, workspace, study, what), (what.run, what.grid)) for what in more]
    return jobs


def summarise(results: Results) -> dict[str, Any]:
    """Compute the numbers of the simple adapter."""
    return of_form(results, SIMPLE)


def curves(results: Results, form: str) -> dict[int, Curve]:
    """Return the curves of a form after 1/4, 1/2 and all of the steps, with a few lambdas but for the last."""
    last, seeds = results.study["steps"], RateStudy.seeds
    return {step: results.curve(form, step=step, few=step < last).first(seeds) for step in (last // 4, last // 2, last)}


def of_form(results: Results, form: str) -> dict[str, Any]:
    """Return a form's learning rate, its endpoints after 1/4, 1/2 and all of the steps, and what is drawn at lambda 1 in the end."""
    ends = {str(step): endpoint(curve, results.study["level"]) for step, curve in curves(results, form).items()}
    picture = curve_at_one(results, form, "picture").seeds(at_index(0)).mean()
    return {"rate": trainings(results)[form][0]["rate"], "endpoint": ends, "one": at_one(results, form) | {"picture": float(picture)}}


def table(results: Results, first: Results | None) -> pd.DataFrame:
    """Tabulate the simple adapter below the two forms of tier A, `first`, all on the seeds of tier F."""
    rows = [("IP-Adapter", of_form(first, IP_ADAPTER)), ("simple", of_form(first, SIMPLE))] if first else []
    lines = []
    for name, numbers in [*rows, ("simple", results.data["summary"])]:
        line = {"form": name, "rate": f"{numbers['rate']:g}"}
        line |= {f"{int(step):,} steps": mark(spread(end["information"]), end) for step, end in numbers["endpoint"].items()}
        line |= {"λ = 1: follows": f"{numbers['one']['following']:.0%}", "λ = 1: information": f"{numbers['one']['information']:.1f}"}
        lines.append(line | {"image prompt alone": f"{numbers['one']['picture']:.1f}"})
    return pd.DataFrame(lines)


def differences(results: Results, first: Results) -> dict[str, Interval]:
    """Return IP-Adapter of tier A, `first`, minus the simple adapter of `results`, read in several ways, on the seeds that both have."""
    seeds, bootstrap = RateStudy.seeds, Bootstrap(results.study["resamples"])
    read, both = at_level(results.study["level"]), ((first, IP_ADAPTER), (results, SIMPLE))
    ours, by_step = curves(first, IP_ADAPTER)[first.study["steps"]], curves(results, SIMPLE)
    best = max(by_step, key=lambda step: float(by_step[step].seeds(read).mean()))
    found = {"at the level": bootstrap.difference(ours, by_step[results.study["steps"]], read)}
    for key in PARTS:
        a, b = (source.curve(form, following=key).first(seeds) for source, form in both)
        found[f"at the level, counting only the {key.removeprefix('right ')}"] = bootstrap.difference(a, b, read)
    found[f"at the level, with the simple adapter after {best:,} steps, its best"] = bootstrap.difference(ours, by_step[best], read)
    for task, name in ((results.primary, "at λ = 1"), ("picture", "the image prompt alone at λ = 1")):
        a, b = (curve_at_one(source, form, task).first(seeds) for source, form in both)
        found[name] = bootstrap.difference(a, b, at_index(0))
    return found


def difference_table(results: Results, first: Results) -> pd.DataFrame:
    """Tabulate IP-Adapter minus the simple adapter at both rates, with 95 % intervals; for tier F also those over seeds alone."""
    lines, rate = [], f"{results.data['summary']['rate']:g}"
    for (name, old), (_, new) in zip(differences(first, first).items(), differences(results, first).items(), strict=False):
        line = {"IP-Adapter minus the simple adapter": name, "tier A": with_interval(asdict(old)), f"at {rate}": with_interval(asdict(new))}
        low, high = new.seeds or (np.nan, np.nan)
        lines.append(line | {f"at {rate}, over seeds alone": with_interval({"mean": new.mean, "low": low, "high": high})})
    return pd.DataFrame(lines)


def one_rate(results: Results, first: Results) -> pd.DataFrame:
    """Tabulate the endpoint of the four forms at one learning rate, that of tier F, on its seeds."""
    sources = {form: results if form == SIMPLE else first for form in TIER_A}
    ends = {form: endpoint(curves(source, form)[source.study["steps"]], source.study["level"]) for form, source in sources.items()}
    assert all(of_form(source, form)["rate"] == results.data["summary"]["rate"] for form, source in sources.items()), FORMS
    return square_of(ends)


def run(args: Namespace) -> None:
    """`python -m eval rates`"""
    check_options(args)
    results = Tier("rates", "rates", RateStudy(), jobs_of, summarise, {}).run(args, args.weights)
    first = earlier(results, args.out, "ablation")
    print(markdown(table(results, first)))
    if first:
        print(markdown(difference_table(results, first)), markdown(one_rate(results, first)), sep="\n\n")
