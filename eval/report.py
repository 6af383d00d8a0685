"""results/ablation.json to RESULTS.md: tables and plots, nothing typed by hand.  `python -m eval ablation` writes both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weights_convert
from eval.ablation import FORMS, SHARES, SMOKE, Place, Study, evaluate
from eval.statistics import Array, Rows, difference, holm
from eval.tasks import TASKS, Row
from train.adapter import Source

Results = dict[str, Any]
FIRST = "ip_adapter"  # what the others are compared with


def select(rows: Sequence[Row], **where: Any) -> list[Row]:
    """The rows whose entries are these; None is an entry that is not there."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def right(results: Results, row: Row, key: str) -> Array:
    """1 where the drawn concept, background or drawing is the wanted one: the text's on `conflict`, else the picture's."""
    if key == "drawing":
        wanted = results["drawing"]
    else:
        wanted = results["wanted" if row["task"] == "conflict" else "own"][key]
    return (np.array(row[key]) == np.array(wanted)).astype(float)


def curves(results: Results, form: str, share: float = 1.0) -> Rows:
    """The conflict rows of a form, `seeds lambdas prompts`; the first lambda is 0, the text alone."""
    conflict = select(results["rows"], task="conflict", control=None)
    alone, seeds = select(conflict, form="text alone"), range(results["study"]["seeds"])
    mine = [select(conflict, form=form, seed=seed, share=share) for seed in seeds]
    rows = [alone + sorted(each, key=lambda row: float(row["lambda"])) for each in mine]
    return Rows(
        np.array([[right(results, row, "concept") for row in each] for each in rows]),
        np.array([[row["palette_error"] for row in each] for each in rows], dtype=float),
    )


def summary(results: Results) -> dict[str, Any]:
    """The primary endpoint of each form and seed, after each share of the training; differences from IP-Adapter's, by Holm."""
    study = results["study"]
    level, forms = study["level"], list(study["forms"])
    whole = {form: curves(results, form) for form in forms}
    found = {form: difference(whole[form], whole[FIRST], level, study["resamples"]) for form in forms if form != FIRST}
    adjusted = holm({form: each.p for form, each in found.items()})
    return {
        "endpoint": {form: rows.endpoints(level).tolist() for form, rows in whole.items()},
        "difference": {
            form: {"mean": d.mean, "low": d.low, "high": d.high, "p": adjusted[form]} for form, d in found.items()
        },
        "share": {
            form: {f"{s:g}": curves(results, form, s).endpoints(level).tolist() for s in SHARES} for form in forms
        },
    }


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def primary(results: Results) -> str:
    """The primary endpoint, form by form."""
    found, lines = results["summary"], []
    for form, ends in found["endpoint"].items():
        beside, p = "", ""
        if form in found["difference"]:
            d = found["difference"][form]
            beside, p = f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]", f"{d['p']:.3f}"
        rate, size = results["rates"][form]["chosen"], f"{results['parameters'][form]:,}"
        lines.append((FORMS[form].name, size, f"{rate:g}", _spread(ends), beside, p))
    return table(("form", "trained", "rate", "palette error", "minus IP-Adapter [95 %]", "p (Holm)"), lines)


def by_share(results: Results) -> str:
    """The endpoint as the training goes on."""
    found = results["summary"]["share"]
    head = ("form", *(f"{s:.0%} of the training" for s in SHARES))
    return table(head, [(FORMS[form].name, *(_spread(ends) for ends in each.values())) for form, each in found.items()])


def measures(results: Results, rows: Sequence[Row]) -> tuple[str, ...]:
    """Means over rows (seeds) and prompts: concept, background, drawing; palette and placement error; CLIP-I, CLIP-T."""
    shares = [
        f"{np.mean([right(results, row, key) for row in rows]):.0%}" if key in rows[0] else ""
        for key in ("concept", "background", "drawing")
    ]
    errors = [f"{np.mean([row[key] for row in rows]):.1f}" for key in ("palette_error", "placement_error")]
    clips = [f"{np.mean([row[key] for row in rows]):.3f}" if key in rows[0] else "" for key in ("clip_i", "clip_t")]
    return (*shares, *errors, *clips)


def task_table(results: Results, task: str) -> str:
    """Every form at every lambda of a task, and what anchors it."""
    rows, lines = select(results["rows"], task=task), []
    for row in select(rows, seed=None):
        lines.append((row["form"], "", *measures(results, [row])))
    for form in results["study"]["forms"]:
        mine = select(rows, form=form, share=1.0)
        for lam in sorted({row["lambda"] for row in mine if "lambda" in row}):
            lines.append((FORMS[form].name, f"{lam:g}", *measures(results, select(mine, **{"lambda": lam}))))
        for control, says in (("shuffled", "another's picture"), ("null", "no picture")):
            if found := select(mine, control=control):
                lines.append((FORMS[form].name, f"1, {says}", *measures(results, found)))
    head = ("form", "λ", "concept", "background", "drawing", "palette error", "placement error", "CLIP-I", "CLIP-T")
    return table(head, lines)


def best_lambda(results: Results, form: str) -> float:
    """The lambda with the lowest palette error among those that follow the text often enough, on the mean over seeds."""
    rows, conflict = curves(results, form), select(results["rows"], task="conflict", control=None)
    lambdas = sorted({float(row["lambda"]) for row in select(conflict, form=form, share=1.0)})
    follow, error = rows.following.mean(axis=(0, 2))[1:], rows.error.mean(axis=(0, 2))[1:]
    allowed = [i for i, f in enumerate(follow) if f >= results["study"]["level"]] or [int(follow.argmax())]
    return lambdas[min(allowed, key=error.__getitem__)]


def markdown(results: Results) -> str:
    """RESULTS.md."""
    study, forms = results["study"], results["study"]["forms"]
    size = f"{len(forms)} forms, {study['seeds']} seeds each, {study['steps']} steps of {study['batch']} pictures"
    return TEXT.format(
        size=size,
        level=f"{study['level']:.0%}",
        prompts=study["prompts"],
        steps=study["draw_steps"],
        guidance=f"{study['guidance']:g}",
        scorer=results["scorer"],
        rates=", ".join(f"{rate:g}" for rate in study["rates"]),
        primary=primary(results),
        shares=by_share(results),
        **{task: task_table(results, task) for task in TASKS},
    )


def cell(weights: Path, out: Path, name: str) -> str:
    """Draws and reads FORM:SEED:TASK again, from the shipped adapter; says whether every digit is that of the results.

    Raises ValueError for a cell that is none.
    """
    results = weights_convert.read_json(out / "results" / "ablation.json")
    study = Study(**{key: tuple(v) if isinstance(v, list) else v for key, v in results["study"].items()})
    form, seed, task = (*name.split(":"), "", "")[:3]
    if form not in study.forms or seed not in map(str, range(study.seeds)) or task not in TASKS:
        raise ValueError(
            f"{name} is no cell: give FORM:SEED:TASK, a form of {', '.join(study.forms)}, a seed below {study.seeds}, "
            f"a task of {', '.join(TASKS)}"
        )
    torch.set_num_threads(1)  # as the published run
    place = Place(Source(base=weights), weights / "ablation", out)
    bench, form_ = place.bench(study), FORMS[form]
    adapter = weights_convert.load_adapter(place.adapter(form, int(seed)), bench.pipeline.unet)
    lambdas = form_.lambdas if task == "conflict" else form_.few
    rows = bench.cell(task, adapter, form_.fuse, lambdas, form=form, seed=int(seed), share=1.0)
    before = select(results["rows"], form=form, seed=int(seed), share=1.0, task=task, control=None)
    same = "equal, digit by digit, to" if rows == before else "not equal to"
    return task_table(results | {"rows": rows}, task) + f"\n\n{same} results/ablation.json"


def run(weights: Path, state: Path, out: Path, jobs: int, smoke: bool) -> None:
    """Does what is missing of the study, and writes results/ablation.json, RESULTS.md and its plots into `out`."""
    from eval import plots  # matplotlib is an extra

    study = SMOKE if smoke else Study()
    shipped = out / "weights" if smoke else weights / "ablation"
    place = Place(Source(base=weights, pictures=64) if smoke else Source(base=weights), shipped, state)
    results = evaluate(place, study, jobs)
    results["summary"] = summary(results)
    weights_convert.write_json(out / "results" / "ablation.json", results)
    plots.draw(results, place, study, out / "results")
    (out / "RESULTS.md").write_text(markdown(results))


TEXT = """# Decoupled against concatenated

`python -m eval ablation` made this file and its pictures; [results/ablation.json](results/ablation.json) has every row. {size}; the
same data order, noise and initial projection for all forms of one seed, a rate for each from the grid {rates}. Pictures are
drawn in bfloat16 with {steps} DDIM steps and guidance {guidance}, one for each of {prompts} prompts,
seeds 0 .. {prompts} - 1, nothing picked.

## The primary endpoint

Named before the runs: **the palette error against the image prompt where {level} of the pictures follow a conflicting text**,
interpolated on the curve that a form draws as lambda grows. Lower is better. The interval comes from resampling seeds and prompts together,
paired by seed. It is conditional on one base model and one CLIP, those of the mini world. Plus reads other features than the
rest: it belongs to Figure 11, not to this comparison.

{primary}

![text-following against palette error](results/ablation_curves.png)

The first prompts of the conflict, in order, each form at the best of its lambdas, seed 0:

![the first prompts](results/ablation_pictures.png)

## As the training goes on

{shares}

![gain of the picture](results/ablation_gains.png)

## What the picture is left with in a joint softmax

1 - g, the share of the attention that image keys take (`eval/mass.py`):

![image mass](results/ablation_mass.png)

## Every task

Concept and background: the text's on the conflict, else the picture's. Drawing: which of its concept's drawings the picture
shows. Placement: distance from the image prompt's centre and size, in pixels. CLIP-I and CLIP-T: cosines by {scorer}.

### The picture alone

{picture}

### Picture and agreeing text

{agreeing}

### Picture and conflicting text

{conflict}
"""
