"""Tier F of the ablation: the simple adapter at IP-Adapter's learning rate, trained to the end.  `python -m eval rates`

docs/ablation-protocol.md, "Tier F", says why, and what is compared.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd

from eval.ablation.appendix import mark
from eval.ablation.draws import Draw, draw
from eval.ablation.forms import IP_ADAPTER, SIMPLE
from eval.ablation.report import spread
from eval.ablation.rows import Results
from eval.ablation.statistics import Bootstrap, at_level
from eval.ablation.study import Study, Workspace
from eval.ablation.summary import endpoint, trainings
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
    """List all jobs: those of a tier that compares forms, and the drawings of earlier checkpoints."""
    jobs = jobs_at_the_end(workspace, study, tasks)
    for form, seed in study.runs(*study.forms):
        for step in study.checkpoints[:-1]:
            what = Draw(form, seed, step, tasks[0])
            jobs.append(Job(what.name, partial(draw, workspace, study, what), (what.run, what.grid)))
    return jobs


def summarise(results: Results) -> dict[str, Any]:
    """Compute the numbers of the simple adapter."""
    return of_form(results, SIMPLE)


def of_form(results: Results, form: str) -> dict[str, Any]:
    """Return a form's learning rate, its endpoints after 1/4, 1/2 and all of the steps, and what is drawn at lambda 1 in the end."""
    level, last = results.study["level"], results.study["steps"]
    curves = {str(step): results.curve(form, step=step, few=step < last) for step in (last // 4, last // 2, last)}
    ends = {step: endpoint(curve, level) for step, curve in curves.items()}
    return {"rate": trainings(results)[form][0]["rate"], "endpoint": ends, "one": at_one(results, form)}


def table(results: Results, first: Results | None) -> pd.DataFrame:
    """Tabulate the simple adapter below the two forms of tier A, `first`, with what IP-Adapter leads by on the seeds that both have."""
    rows = [("IP-Adapter", first, of_form(first, IP_ADAPTER)), ("simple", first, of_form(first, SIMPLE))] if first else []
    bootstrap, read, lines = Bootstrap(results.study["resamples"]), at_level(results.study["level"]), []
    for name, source, numbers in [*rows, ("simple", results, results.data["summary"])]:
        line = {"form": name, "rate": f"{numbers['rate']:g}"}
        line |= {f"{int(step):,} steps": mark(spread(end["information"]), end) for step, end in numbers["endpoint"].items()}
        line["IP-Adapter minus it [95 %]"] = ""
        if first and name == "simple":
            lead = bootstrap.difference(first.curve(IP_ADAPTER), source.curve(SIMPLE), read)
            line["IP-Adapter minus it [95 %]"] = with_interval(asdict(lead))
        line |= {"λ = 1: follows": f"{numbers['one']['following']:.0%}", "λ = 1: information": f"{numbers['one']['information']:.1f}"}
        lines.append(line)
    return pd.DataFrame(lines)


def run(args: Namespace) -> None:
    """`python -m eval rates`"""
    check_options(args)
    results = Tier("rates", "rates", RateStudy(), jobs_of, summarise, {}).run(args, args.weights)
    print(markdown(table(results, earlier(results, args.out, "ablation"))))
