"""Tier F of the ablation: the simple adapter trained to the end at lower learning rates.  `python -m eval rates`

docs/ablation-protocol.md, "Tier F", says why, and what is compared.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pandas as pd

from eval.ablation.appendix import mark
from eval.ablation.draws import Draw, draw
from eval.ablation.forms import FORMS, IP_ADAPTER, RATES, SIMPLE
from eval.ablation.report import spread
from eval.ablation.rows import Results
from eval.ablation.statistics import Bootstrap, at_level
from eval.ablation.study import Study, Workspace, source_hash
from eval.ablation.summary import endpoint, trainings
from eval.ablation.tier import CODE, ShortStudy, Tier, at_one, check_options, earlier
from eval.ablation.tier import jobs_of as jobs_at_the_end
from eval.ablation.work import Job
from eval.tables import markdown, with_interval


@dataclass(frozen=True)
class RateStudy(ShortStudy):
    """The size of tier F: as many steps as in tier A. `code`: a hash of the source files of the forms."""

    steps: int = 8000
    seeds: int = 1
    forms: tuple[str, ...] = RATES
    code: str = field(default_factory=lambda: source_hash(CODE))

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
    """Compute the numbers of each form, by its name."""
    return {form: of_form(results, form) for form in results.study["forms"]}


def of_form(results: Results, form: str) -> dict[str, Any]:
    """Return a form's learning rate, its endpoints after 1/4, 1/2 and all of the steps, and what is drawn at lambda 1 in the end."""
    level, last = results.study["level"], results.study["steps"]
    curves = {str(step): results.curve(form, step=step, few=step < last) for step in (last // 4, last // 2, last)}
    ends = {step: endpoint(curve, level) for step, curve in curves.items()}
    return {"rate": trainings(results)[form][0]["rate"], "endpoint": ends, "one": at_one(results, form)}


def table(results: Results, first: Results | None) -> pd.DataFrame:
    """Tabulate both rates below IP-Adapter and the simple adapter of tier A, `first`, with what IP-Adapter leads by."""
    rows = {form: (first, of_form(first, form)) for form in (IP_ADAPTER, SIMPLE)} if first else {}
    rows |= {form: (results, numbers) for form, numbers in results.data["summary"].items()}
    bootstrap, read, lines = Bootstrap(results.study["resamples"]), at_level(results.study["level"]), []
    for form, (source, numbers) in rows.items():
        line = {"form": FORMS[form].name.split(",")[0].split(":")[0], "rate": f"{numbers['rate']:g}"}
        line |= {f"{int(step):,} steps": mark(spread(end["information"]), end) for step, end in numbers["endpoint"].items()}
        lead = asdict(bootstrap.difference(first.curve(IP_ADAPTER), source.curve(form), read)) if first and form != IP_ADAPTER else None
        line["IP-Adapter minus it [95 %]"] = with_interval(lead) if lead else ""
        line |= {"λ = 1: follows": f"{numbers['one']['following']:.0%}", "λ = 1: information": f"{numbers['one']['information']:.1f}"}
        lines.append(line)
    return pd.DataFrame(lines)


def run(args: Namespace) -> None:
    """`python -m eval rates`"""
    check_options(args)
    results = Tier("rates", "rates", RateStudy(), jobs_of, summarise, {}).run(args, args.weights)
    print(markdown(table(results, earlier(results, args.out, "ablation"))))
