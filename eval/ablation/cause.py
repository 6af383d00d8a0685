"""Tier B of the ablation: why does a joint softmax cost what it costs?  `python -m eval cause`

docs/ablation-protocol.md, "Tier B", says what is compared. Adapters of `OWN` and `SHARED` forms are trained alike and drawn at equal
following, as in tier A. Trained adapters are also drawn with the other softmax. And the share of a joint softmax that the image would
get, 1 - g, is measured for each layer and head, in drawings at lambda 1.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eval.ablation import tier
from eval.ablation.appendix import mark
from eval.ablation.draws import draw, draw_unit, find_grid
from eval.ablation.endpoint import endpoint
from eval.ablation.forms import FORMS, OWN, SHARED
from eval.ablation.fuses import MixedAdapter, gate
from eval.ablation.memo import Memo, Unit
from eval.ablation.names import Draw, training_name
from eval.ablation.plots import plot_cause
from eval.ablation.report import p_value, spread
from eval.ablation.rows import Results
from eval.ablation.statistics import Curve, at_level, holm
from eval.ablation.study import Workspace
from eval.ablation.tier import ShortStudy, Tier, check_options, means_at_one
from eval.ablation.training import plan_of, trained_adapter
from eval.ablation.work import Job
from eval.hooks import hooked
from eval.tables import markdown, with_interval
from model.attention import CrossAttention
from model.context import Context
from model.source import Source
from model.unet import UNet

CROSSED = ("ip_adapter", "concatenated"), ("concatenated", "ip_adapter"), ("shared", "simple"), ("simple", "shared")  # trained as, drawn as
WIDE_FORMS = {"image_yields": "ip_adapter", "shared_image_yields": "shared"}  # drawn with lambdas above their grid -> their sum
WIDE_SEEDS, WIDE = 3, (4.0, 8.0, 16.0)
CONTRASTS = [(forms[0], other) for forms in (OWN, SHARED) for other in forms[1:]]
CONTRASTS += [("text_yields", "image_yields"), ("shared_text_yields", "shared_image_yields")]


@dataclass(frozen=True)
class CauseStudy(ShortStudy):
    """The size of tier B. All forms have the same number of seeds."""

    other_seeds: int = 5
    forms: tuple[str, ...] = (*OWN, *SHARED)

    def hours(self) -> float:
        return self.estimate(grids=len(self.runs(*self.forms)) + len(CROSSED) * (self.seeds + 1) + len(self.forms))


@contextmanager
def image_shares(unet: UNet) -> Iterator[dict[int, list[Tensor]]]:
    """Record 1 - g of each layer and head, `h`, in every call of the UNet: averaged over positions and over the conditional rows."""
    shares: dict[int, list[Tensor]] = {}

    def look(layer: CrossAttention, args: tuple[Tensor, Context], _: Tensor) -> None:
        x, context = args
        (image,) = context.at(layer.layer)
        k = layer.split(layer.to_k(context.text))
        share = 1 - gate(layer.split(layer.to_q(x)), Source(k, k), image)
        shares.setdefault(layer.layer, []).append(share[len(share) // 2 :].mean(dim=(0, 2, 3)).cpu())

    with hooked(unet.cross_attentions(), look):
        yield shares


def measure_shares(workspace: Workspace, form: str, seed: int) -> Unit:
    """Measure 1 - g of each layer and head, `layers heads`, in drawings at lambda 1 of the first task; and mu of a `MixedAdapter`."""

    def make() -> Unit:
        bench = workspace.bench()
        adapter = trained_adapter(workspace, form, plan_of(workspace, form, seed), workspace.study.steps)
        mu = adapter.mu if isinstance(adapter, MixedAdapter) else []
        with image_shares(bench.pipeline.unet) as shares:
            bench.draw(bench.prompts.tasks[0], adapter, FORMS[form].fuse, mu or 1.0)
        value: dict[str, Any] = {"form": form, "seed": seed, "mu": [each.flatten().tolist() for each in mu]}
        value["shares"] = [torch.stack(each).mean(dim=0).tolist() for _, each in sorted(shares.items())]
        return Unit(value, workspace.made)

    return Memo(workspace.work)(f"shares-{form}-{seed}", make)


def draw_wide(workspace: Workspace, form: str, seed: int) -> Unit:
    """Draw the first task at the lambdas of `WIDE`."""
    what = Draw(form, seed, workspace.study.steps, workspace.bench().prompts.tasks[0])
    return Memo(workspace.work)(f"wide-{form}-{seed}", lambda: draw_unit(workspace, what, [*WIDE]))


def jobs_of(workspace: Workspace, tasks: Sequence[str]) -> list[Job]:
    """List all jobs: those of every tier, the shares, larger lambdas, and drawings with the other softmax."""
    jobs, study = tier.jobs_of(workspace, tasks), workspace.study
    for form, seed in study.runs(*study.forms):
        run = training_name(form, seed)
        jobs.append(Job(f"shares-{form}-{seed}", partial(measure_shares, workspace, form, seed), (run,)))
        if form in WIDE_FORMS and seed < WIDE_SEEDS:
            jobs.append(Job(f"wide-{form}-{seed}", partial(draw_wide, workspace, form, seed), (run,)))
        for what in [Draw(form, seed, study.steps, tasks[0], sampled=b) for a, b in CROSSED if a == form]:
            if seed == 0:
                jobs.append(Job(what.grid, partial(find_grid, workspace, form, what.sampled), (run,)))
            jobs.append(Job(what.name, partial(draw, workspace, what), (run, what.grid)))
    return jobs


def summarise(results: Results) -> dict[str, Any]:
    """Compute all numbers of the tables. Those of each form are lists over seeds."""
    study, bootstrap = results.study, results.bootstrap
    read = at_level(study["level"])
    curves = {form: results.curve(form) for form in study["forms"]}
    crossed = {f"{a} as {b}": results.curve(a, sampled=b) for a, b in CROSSED}
    intervals = {f"{a} minus {b}": bootstrap.difference(curves[a], curves[b], read) for a, b in CONTRASTS}
    wider = {form: bootstrap.difference(curves[total], wide_curve(results, form), read) for form, total in WIDE_FORMS.items()}
    p = holm({name: each.p for name, each in intervals.items()})
    return {
        "endpoint": {name: endpoint(curve, study["level"]) for name, curve in (curves | crossed).items()},
        "one": {form: means_at_one(results, form) for form in study["forms"]},
        "difference": {name: asdict(each) | {"p": p[name]} for name, each in intervals.items()},
        "wide": {form: at_wide(results, form) for form in WIDE_FORMS},
        "wide_difference": {form: asdict(each) for form, each in wider.items()},
        "shares": {form: mean_over_seeds(results, form, "shares") for form in study["forms"]},
        "mu": mean_over_seeds(results, "mixed", "mu"),
        "ceiling": float(results.measures("references")["information"][1].mean()),
    }


def wide_curve(results: Results, form: str, key: str = "information") -> Curve:
    """Return the curves of the first seeds of a form, from lambda 0 to the largest of `WIDE`."""
    curve, names = results.curve(form, key), [name for name in results.units if name.startswith(f"wide-{form}-")]
    wide = {part: np.stack([results.measures(name)[part] for name in names]) for part in ("following", key)}
    first = curve.first(len(names))
    return Curve(np.concatenate([first.following, wide["following"]], axis=1), np.concatenate([first.value, wide[key]], axis=1))


def at_wide(results: Results, form: str) -> dict[str, dict[str, float]]:
    """Return the means over the first seeds and over prompts, at each lambda of the grid from 1 on and of `WIDE`."""
    curves = {key: wide_curve(results, form, key).value.mean(axis=(0, 2)) for key in ("following", "concept", "information")}
    lambdas = [*results.grid(form), *WIDE]
    return {f"{lam:g}": {key: float(each[i]) for key, each in curves.items()} for i, lam in enumerate(lambdas) if lam >= 1}


def mean_over_seeds(results: Results, form: str, key: str) -> list[list[float]]:
    """Average a number of each layer and head over seeds."""
    units = [unit.value for name, unit in results.units.items() if name.startswith("shares-") and unit.value["form"] == form]
    return [[float(x) for x in layer] for layer in np.mean([value[key] for value in units], axis=0)]


def endpoint_table(results: Results) -> pd.DataFrame:
    """Tabulate each form: the endpoint, and what is drawn at lambda 1."""
    summary, lines = results.data["summary"], []
    for form in results.study["forms"]:
        end, one = summary["endpoint"][form], summary["one"][form]
        line = {"form": FORMS[form].name, "information at the level": mark(spread(end["information"]), end)}
        at = {"follows": f"{one['following']:.0%}", "concept": f"{one['concept']:.0%}", "information": f"{one['information']:.1f}"}
        lines.append(line | {f"λ = 1: {name}": value for name, value in at.items()})
    return pd.DataFrame(lines)


def difference_table(results: Results) -> pd.DataFrame:
    """Tabulate the contrasts, with their adjusted p-values."""
    lines = []
    for name, each in results.data["summary"]["difference"].items():
        a, b = (FORMS[form].name for form in name.split(" minus "))
        lines.append({"": a, "minus": b, "difference [95 %]": with_interval(each), "p, adjusted": p_value(each["p"])})
    return pd.DataFrame(lines)


def crossed_table(results: Results) -> pd.DataFrame:
    """Tabulate adapters that are drawn with their own softmax and with the other one."""
    ends, lines = results.data["summary"]["endpoint"], []
    for a, b in CROSSED:
        own, other = (mark(spread(end["information"]), end) for end in (ends[a], ends[f"{a} as {b}"]))
        softmax = "separate" if FORMS[a].scale == "sum" else "joint"
        projections = "own" if FORMS[a].own_projections else "the text's"
        line = {"projections": projections, "trained with": f"{softmax} softmax", "drawn as trained": own}
        lines.append(line | {"drawn with the other softmax": other})
    return pd.DataFrame(lines)


def wide_table(results: Results) -> pd.DataFrame:
    """Tabulate drawings at lambdas from 1 on, those of the grid and those of `WIDE`, and the loss where the level is reached."""
    lines, summary = [], results.data["summary"]
    for form, wide in summary["wide"].items():
        for lam, row in wide.items():
            line = {"form": FORMS[form].name, "λ": lam, "follows": f"{row['following']:.0%}", "concept": f"{row['concept']:.0%}"}
            lines.append(line | {"information": f"{row['information']:.1f}"})
        lines.append({"form": "the sum minus this form, at the level", "information": with_interval(summary["wide_difference"][form])})
    return pd.DataFrame(lines)


def share_table(results: Results) -> pd.DataFrame:
    """Tabulate 1 - g, and mu of `mixed`, as the mean of each layer and its range over heads."""
    summary = results.data["summary"]
    rows = {FORMS[form].name: layers for form, layers in summary["shares"].items()} | {f"{FORMS['mixed'].name}: μ": summary["mu"]}
    lines = [
        {"": name} | {f"layer {i}": f"{np.mean(each):.2f} ({min(each):.2f} to {max(each):.2f})" for i, each in enumerate(layers)}
        for name, layers in rows.items()
    ]
    return pd.DataFrame(lines)


TABLES = {
    "cause_forms": endpoint_table,
    "cause_differences": difference_table,
    "cause_wide": wide_table,
    "cause_crossed": crossed_table,
    "cause_shares": share_table,
}


def run(args: Namespace) -> None:
    """`python -m eval cause`"""
    check_options(args)
    more = {"shares": "shares-FORM-SEED: 1 - g, and mu, of each layer and head", "wide": "wide-FORM-SEED: drawn at larger lambdas"}
    results = Tier("cause", CauseStudy(), jobs_of, summarise, more).run(args, args.weights)
    plot_cause(results, args.out / "results" / "cause.png")
    print("\n\n".join(markdown(table(results)) for table in TABLES.values()))
