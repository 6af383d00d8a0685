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
from eval.ablation.draws import draw
from eval.ablation.endpoint import endpoint
from eval.ablation.equal_rates import curves, leads
from eval.ablation.forms import IP_ADAPTER, SIMPLE, TIER_A
from eval.ablation.names import Draw
from eval.ablation.report import spread, square
from eval.ablation.rows import Results
from eval.ablation.statistics import at_index, at_level
from eval.ablation.study import Workspace
from eval.ablation.summary import curve_at_one, trainings
from eval.ablation.tier import ShortStudy, Tier, check_options, earlier, means_at_one
from eval.ablation.tier import jobs_of as jobs_at_the_end
from eval.ablation.work import Job
from eval.tables import markdown, seeds_interval


@dataclass(frozen=True)
class RateStudy(ShortStudy):
    """The size of tier F: as many steps as in tier A."""

    steps: int = 8000
    seeds: int = 3
    forms: tuple[str, ...] = (SIMPLE,)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        return self.steps // 4, self.steps // 2, self.steps


def jobs_of(workspace: Workspace, tasks: Sequence[str]) -> list[Job]:
    """List all jobs: those of a tier that compares forms, the drawings of earlier checkpoints, and those of the image prompt alone."""
    jobs, study = jobs_at_the_end(workspace, tasks), workspace.study
    for form, seed in study.runs(*study.forms):
        more = [Draw(form, seed, step, tasks[0]) for step in study.checkpoints[:-1]] + [Draw(form, seed, study.steps, "picture")]
        jobs += [Job(what.name, partial(draw, workspace, what), (what.run, what.grid)) for what in more]
    return jobs


def summarise(results: Results) -> dict[str, Any]:
    """Compute the numbers of the simple adapter."""
    return of_form(results, SIMPLE)


def of_form(results: Results, form: str) -> dict[str, Any]:
    """Return a form's learning rate, its endpoints after 1/4, 1/2 and all of the steps, and what is drawn at lambda 1 in the end."""
    ends = {str(step): endpoint(curve, results.study["level"]) for step, curve in curves(results, form, RateStudy.seeds).items()}
    picture = curve_at_one(results, form, "picture").first(RateStudy.seeds).seeds(at_index(0)).mean()
    one = means_at_one(results, form, RateStudy.seeds) | {"picture": float(picture)}
    return {"rate": trainings(results)[form][0]["rate"], "endpoint": ends, "one": one}


def table(results: Results, first: Results | None, short: Results | None) -> pd.DataFrame:
    """Tabulate the simple adapter below the two forms of tier A, `first`, and its short training of tier B, `short`. All have the
    seeds of tier F."""
    rows = {"IP-Adapter, tier A": of_form(first, IP_ADAPTER), "simple, tier A": of_form(first, SIMPLE)} if first else {}
    lines = []
    for name, numbers in (rows | {"simple, tier F": results.data["summary"]}).items():
        line = {"form": name, "rate": f"{numbers['rate']:g}"}
        line |= {f"{int(step):,} steps": mark(spread(end["information"]), end) for step, end in numbers["endpoint"].items()}
        line |= {"λ = 1: follows": f"{numbers['one']['following']:.0%}", "λ = 1: information": f"{numbers['one']['information']:.1f}"}
        lines.append(line | {"image prompt alone": f"{numbers['one']['picture']:.1f}"})
    if short:
        end, rate = endpoint(short.curve(SIMPLE).first(RateStudy.seeds), short.study["level"]), trainings(short)[SIMPLE][0]["rate"]
        steps = f"{short.study['steps']:,} steps"
        lines.append({"form": "simple, tier B", "rate": f"{rate:g}", steps: mark(spread(end["information"]), end)})
    return pd.DataFrame(lines)


def difference_table(results: Results, first: Results) -> pd.DataFrame:
    """Tabulate IP-Adapter minus the simple adapter at both rates, on the same seeds; for tier F also with intervals over seeds alone."""
    (old, new), rate = (leads(each, first, RateStudy.seeds) for each in (first, results)), f"tier F, {results.data['summary']['rate']:g}"
    heads = f"tier A, {of_form(first, SIMPLE)['rate']:g}", rate, f"{rate}, over seeds alone"
    rows = {name: (str(old[name]), str(new[name]), seeds_interval(asdict(new[name].difference))) for name in new}
    return pd.DataFrame([{"IP-Adapter minus simple": name} | dict(zip(heads, row, strict=True)) for name, row in rows.items()])


def one_rate(results: Results, first: Results) -> pd.DataFrame:
    """Tabulate the endpoint of the four forms at the learning rate of tier F, on its seeds.

    Raises ValueError if a form has another rate.
    """
    ends = {}
    for form, source in {form: results if form == SIMPLE else first for form in TIER_A}.items():
        if (rate := trainings(source)[form][0]["rate"]) != results.data["summary"]["rate"]:
            raise ValueError(f"{form} was trained at {rate:g}, and not at the rate of tier F")
        level, seeds = source.study["level"], RateStudy.seeds
        concept = source.curve(form, "concept").first(seeds).seeds(at_level(level)).tolist()
        ends[form] = endpoint(source.curve(form).first(seeds), level) | {"concept": concept}
    return square(ends)


def run(args: Namespace) -> None:
    """`python -m eval rates`"""
    check_options(args)
    results = Tier("rates", RateStudy(), jobs_of, summarise).run(args, args.weights)
    first, short = (earlier(results, args.out, command) for command in ("ablation", "cause"))
    print(markdown(table(results, first, short)))
    if first:
        print(f"\nAll have {RateStudy.seeds} seeds.")
        print(*("\n" + markdown(each(results, first)) for each in (difference_table, one_rate)), sep="\n")
