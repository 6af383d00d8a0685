"""results/ablation.json to RESULTS.md: tables and plots, nothing typed by hand.  `python -m eval ablation` writes both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.adapters import load_adapter
from checkpoints.files import read_json, write_json
from eval.ablation import BASELINE, FORMS, PRIMARY, SHARES, Place, Study, evaluate, go_on, lambdas_of
from eval.clip_score import clip_score
from eval.statistics import Array, Rows, difference, holm
from eval.tasks import TASKS, Row

Results = dict[str, Any]
SCHEMA = {
    "made_from": "fingerprints of the base's weights, the data (how many pictures of the mini world, or a digest), the scorer",
    "study": "how much of everything was done",
    "scorer": "the CLIP of CLIP-I and CLIP-T, and its preprocessing",
    "prompts": "the texts of two tasks, a line a prompt, and the seeds of their noise; the third task has no text",
    "rates": "form -> the rate chosen, and gain_shuffled after a short run at each rate of the grid",
    "parameters": "form -> how many are trained",
    "gains": "form -> a list a seed: held-out losses as the training goes on (train/adapter.py::held_out_losses)",
    "truth": "in the mini world: the concept and background that the conflicting text wants, the picture's own, and which of its "
    "concept's drawings it shows, if there are several",
    "units": "name -> {key: what it was made from, value}; the value of rows-FORM-SEED, anchors and steps-FORM is a list of rows, "
    "that of mass-FORM of masses, that of FORM-rate-RATE a number",
    "row": "a form, seed, share of the training, task, lambda (or a control), and a list over prompts of each measure: concept, "
    "background and drawing (numbers), palette_error (CIE76), placement_error (pixels), clip_i and clip_t (cosines)",
    "mass": "a form, share, layer, timestep t, number of text keys (words), its own picture or the null one, and 1 - g of each head",
    "summary": "the primary endpoint of each form, seed and share, and the differences from IP-Adapter",
}


def rows_of(results: Results) -> list[Row]:
    """All rows of the forms and their anchors."""
    units = results["units"].items()
    return list(itertools.chain(*(unit["value"] for name, unit in units if name.startswith(("rows-", "anchors")))))


def masses(results: Results) -> list[Row]:
    """All masses of the joint softmaxes."""
    units = results["units"].items()
    return list(itertools.chain(*(unit["value"] for name, unit in units if name.startswith("mass-"))))


def mass(results: Results, **where: Any) -> float:
    """The mean of 1 - g over the heads of all masses whose entries are these."""
    return float(np.mean([row["heads"] for row in select(masses(results), **where)]))


def select(rows: Sequence[Row], **where: Any) -> list[Row]:
    """The rows whose entries are these; None is an entry that is not there."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def right(results: Results, row: Row, key: str, whose: str | None = None) -> Array:
    """1 where the drawn concept, background or drawing is the wanted one: the text's ("wanted") on `conflict`, else the picture's
    ("own"), or as `whose` says. Of drawings those prompts count whose concept has several."""
    truth, whose = results["truth"], whose or ("wanted" if row["task"] == "conflict" else "own")
    wanted = truth["drawing"] if key == "drawing" else truth[whose][key]
    return np.array([float(a == b) for a, b in zip(row[key], wanted, strict=True) if b is not None])


def following(results: Results, row: Row, alone: Row) -> Array:
    """How far each picture follows the text: whether it shows the text's concept; where no truth is known, its CLIP-T as a
    share of what the text alone gets."""
    if "truth" in results:
        return right(results, row, "concept")
    return np.array(row["clip_t"]) / np.mean(alone["clip_t"])


def error(row: Row) -> Array:
    """How far each picture is from its image prompt: the palette error; where no truth is known, 100 (1 - CLIP-I)."""
    return np.array(row["palette_error"]) if "palette_error" in row else 100 * (1 - np.array(row["clip_i"]))


def curves(results: Results, form: str, share: float = 1.0, few: bool = False) -> Rows:
    """The conflict rows of a form, `seeds lambdas prompts`; the first lambda is 0, the text alone. With `few` those of a form's
    `few` lambdas alone, which are there for every share."""
    conflict = select(rows_of(results), task="conflict", control=None)
    (alone,), mine = select(conflict, form="text alone"), select(conflict, form=form, share=share)
    seeds = sorted({row["seed"] for row in mine})
    mine = [row for row in mine if not few or row["lambda"] in FORMS[form].few]
    rows = [[alone, *sorted(select(mine, seed=seed), key=lambda row: float(row["lambda"]))] for seed in seeds]
    follow = np.array([[following(results, row, alone) for row in each] for each in rows])
    return Rows(follow, np.array([[error(row) for row in each] for each in rows]))


def summary(results: Results) -> dict[str, Any]:
    """The primary endpoint of each form and seed, after each share of the training; its differences from IP-Adapter's: the
    primary one, and the others adjusted by Holm."""
    study = results["study"]
    level, forms = study["level"], list(study["forms"])
    whole = {form: curves(results, form) for form in forms}
    found = {
        form: difference(whole[form], whole[BASELINE], level, study["resamples"]) for form in forms if form != BASELINE
    }
    p = {form: each.p for form, each in found.items()}
    p |= holm({form: p[form] for form in found if form != PRIMARY})
    return {
        "endpoint": {form: rows.endpoints(level).tolist() for form, rows in whole.items()},
        "difference": {form: {"mean": d.mean, "low": d.low, "high": d.high, "p": p[form]} for form, d in found.items()},
        "share": {
            form: {f"{s:g}": curves(results, form, s, few=True).endpoints(level).tolist() for s in SHARES}
            for form in forms
        },
    }


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def fraction(lam: float) -> str:
    """A lambda as people write it: 0.25, 1/512."""
    return f"1/{1 / lam:g}" if 0 < lam < 0.1 else f"{lam:g}"


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def primary(results: Results) -> str:
    """The primary endpoint, form by form."""
    found, lines = results["summary"], []
    through = select(rows_of(results), task="conflict", form="truth, through the VAE")
    (alone,) = select(rows_of(results), task="conflict", form="text alone")
    times = f"{np.mean(error(alone)) / np.mean(error(through[0])):.1f}" if through else ""
    lines.append(("the text alone", "", "", f"{np.mean(error(alone)):.1f}", times, "", ""))
    for form, ends in found["endpoint"].items():
        times = f"{np.mean(ends) / np.mean(error(through[0])):.1f}" if through else ""
        beside, p = "", ""
        if form in found["difference"]:
            d = found["difference"][form]
            beside = f"{d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"
            p = f"{d['p']:.3f}" + (", primary" if form == PRIMARY else "")
        rate, size = results["rates"][form]["chosen"], f"{results['parameters'][form]:,}"
        lines.append((FORMS[form].name, size, f"{rate:g}", _spread(ends), times, beside, p))
    head = ("form", "parameters", "rate", "error", "times the VAE's own", "minus IP-Adapter [95 %]", "p")
    return table(head, lines)


def by_share(results: Results) -> str:
    """The endpoint as the training goes on."""
    found = results["summary"]["share"]
    head = ("form", *(f"{s:.0%} of the training" for s in SHARES))
    return table(head, [(FORMS[form].name, *(_spread(ends) for ends in each.values())) for form, each in found.items()])


def measures(results: Results, rows: Sequence[Row]) -> tuple[str, ...]:
    """Means over rows (seeds) and prompts: concept, background, drawing; palette and placement error; CLIP-I, CLIP-T, CLIPScore."""

    def mean(key: str, form: str) -> str:
        return format(np.mean([row[key] for row in rows]), form) if key in rows[0] else ""

    def share(key: str, whose: str | None = None) -> str:
        hits = np.concatenate([right(results, row, key, whose) for row in rows]) if key in rows[0] else np.zeros(0)
        return f"{hits.mean():.0%}" if hits.size else ""

    shares = [share(key) for key in ("concept", "background", "drawing")]
    if "truth" in results and rows[0]["task"] == "conflict":
        shares = [f"{share(key)} / {share(key, 'own')}" for key in ("concept", "background")] + [""]
    scores = [clip_score(torch.tensor(row["clip_t"])).mean() for row in rows if "clip_t" in row]
    clips = [mean("clip_i", ".3f"), mean("clip_t", ".3f"), f"{float(sum(scores)) / len(scores):.2f}" if scores else ""]
    return (*shares, mean("palette_error", ".1f"), mean("placement_error", ".1f"), *clips)


def task_table(results: Results, task: str) -> str:
    """Every form at every lambda of a task, and what anchors it."""
    rows, lines = select(rows_of(results), task=task), []
    for row in select(rows, seed=None):
        lines.append((row["form"], "", *measures(results, [row])))
    for form in results["study"]["forms"]:
        mine = select(rows, form=form, share=1.0)
        for lam in sorted({row["lambda"] for row in mine if "lambda" in row}):
            lines.append((FORMS[form].name, fraction(lam), *measures(results, select(mine, **{"lambda": lam}))))
        for control, says in (("shuffled", "another's picture"), ("null", "no picture")):
            if found := select(mine, control=control):
                lines.append((FORMS[form].name, f"1, {says}", *measures(results, found)))
    judged = ("concept", "background", "drawing", "palette error", "placement error")
    return table(("form", "λ", *judged, "CLIP-I", "CLIP-T", "CLIPScore"), lines)


def rate_table(results: Results) -> str:
    """What a picture tells after a short run at each rate, in thousandths of the loss."""
    rates = [f"{rate:g}" for rate in results["study"]["rates"]]
    gains = {form: found["gains"] for form, found in results["rates"].items()}
    lines = [
        (FORMS[form].name, *("not finite" if each[rate] is None else f"{1000 * each[rate]:.2f}" for rate in rates))
        for form, each in gains.items()
    ]
    return table(("form", *rates), lines)


def mass_table(results: Results) -> str:
    """1 - g of each joint softmax, seed 0, before and after each part of the training; and of no picture, the null image."""
    counts, lines = sorted({row["words"] for row in masses(results)}, reverse=True), []
    for form in dict.fromkeys(row["form"] for row in masses(results)):
        for words, picture in itertools.product(counts, ("own", "null")):
            where = {"form": form, "words": words, "picture": picture}
            found = [f"{mass(results, share=share, **where):.1%}" for share in (0.0, *SHARES)]
            lines.append((FORMS[form].name, words, {"own": "its own", "null": "none"}[picture], *found))
    return table(("form", "text keys", "picture", "untrained", *(f"{share:.0%}" for share in SHARES)), lines)


def verdict(results: Results) -> str:
    """In words, what each difference says."""
    says = []
    for form, d in results["summary"]["difference"].items():
        sure = "is worse than" if d["low"] > 0 else "is better than" if d["high"] < 0 else "is not told apart from"
        says.append(f"- *{FORMS[form].name}* {sure} IP-Adapter: {d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}].")
    return "\n".join(says)


def best_lambda(results: Results, form: str) -> float:
    """The lambda with the lowest error among those that follow the text often enough, on the mean over seeds."""
    rows, conflict = curves(results, form), select(rows_of(results), task="conflict", control=None)
    lambdas = sorted({float(row["lambda"]) for row in select(conflict, form=form, share=1.0)})
    follow, error = rows.following.mean(axis=(0, 2))[1:], rows.error.mean(axis=(0, 2))[1:]
    allowed = [i for i, f in enumerate(follow) if f >= results["study"]["level"]] or [int(follow.argmax())]
    return lambdas[min(allowed, key=error.__getitem__)]


def checked(results: Results) -> str:
    """Pictures drawn in few and in many steps, seed 0."""
    lines = []
    for form in (BASELINE, PRIMARY):
        (many,) = results["units"][f"steps-{form}"]["value"]
        where = {key: many[key] for key in ("task", "form", "seed", "share", "lambda")}
        (few,) = select(rows_of(results), **where, control=None)
        (alone,) = select(rows_of(results), task="conflict", form="text alone")
        for row, steps in ((few, results["study"]["draw_steps"]), (many, many["steps"])):
            follows = f"{following(results, row, alone).mean():.0%}"
            lines.append((FORMS[form].name, fraction(row["lambda"]), steps, follows, f"{error(row).mean():.1f}"))
    return table(("form", "λ", "steps", "follows the text", "error"), lines)


def half_width(results: Results) -> float:
    """Of the primary difference's interval."""
    found = results["summary"]["difference"][PRIMARY]
    return float(found["high"] - found["low"]) / 2


def markdown(results: Results) -> str:
    """RESULTS.md."""
    study, forms = results["study"], results["study"]["forms"]
    size = f"{len(forms)} forms, {study['seeds']} seeds each, {study['steps']} steps of {study['batch']} pictures"
    return TEXT.format(
        size=size,
        level=f"{study['level']:.0%}",
        prompts=len(results["prompts"]["conflict"]),
        steps=study["draw_steps"],
        guidance=f"{study['guidance']:g}",
        measures=(WORLD if "truth" in results else FILES).format(scorer=results["scorer"]),
        rates=rate_table(results),
        mass=mass_table(results),
        verdict=verdict(results),
        first=FORMS[BASELINE].name,
        second=FORMS[PRIMARY].name,
        width=f"{half_width(results):.1f}",
        primary=primary(results),
        shares=by_share(results),
        checked=checked(results),
        **{task: task_table(results, task) for task in TASKS},
    )


def cell(place: Place, out: Path, name: str) -> tuple[str, bool]:
    """Draws and reads FORM:SEED:TASK again, from the shipped adapter: a table, and whether every digit is that of the results.

    Raises ValueError for a cell that is none.
    """
    results = read_json(out / "results" / "ablation.json")
    study = Study(**{key: tuple(v) if isinstance(v, list) else v for key, v in results["study"].items()})
    form, seed, task = (*name.split(":"), "", "")[:3]
    if form not in study.forms or seed not in map(str, range(study.seeds)) or task not in TASKS:
        raise ValueError(
            f"{name} is no cell: give FORM:SEED:TASK, a form of {', '.join(study.forms)}, a seed below {study.seeds}, "
            f"a task of {', '.join(TASKS)}"
        )
    torch.set_num_threads(1)  # as the published run
    bench, form_ = place.bench(study), FORMS[form]
    adapter = load_adapter(place.adapter(form, int(seed)), bench.pipeline.unet).to(study.device)
    rows = bench.cell(task, adapter, form_.fuse, lambdas_of(form_, task), form=form, seed=int(seed), share=1.0)
    before = select(rows_of(results), form=form, seed=int(seed), share=1.0, task=task, control=None)
    says = "equal, digit by digit, to" if rows == before else "not equal to"
    drawn = results | {"units": {"rows-": {"value": rows}}}
    return task_table(drawn, task) + f"\n\n{says} {out / 'results' / 'ablation.json'}", rows == before


def run(place: Place, study: Study, out: Path, jobs: int) -> None:
    """Does what is missing of the study, and writes results/ablation.json, RESULTS.md and its plots into `out`.

    Seeds are added one by one while the primary difference is not known well enough.
    """
    from eval import plots  # matplotlib is an extra

    path = out / "results" / "ablation.json"
    bench = place.bench(study)  # what reads the pictures must be there before hours of training
    place = place.found(bench)
    if path.exists():
        go_on(place, read_json(path))
    if study.device == "cpu":
        torch.set_num_threads(1)
    while True:
        results = evaluate(place, study, bench, jobs)
        results["summary"] = summary(results)
        if not half_width(results) > study.half_width or study.seeds >= study.most_seeds:  # it may be no number
            break
        study = replace(study, seeds=study.seeds + 1)
    write_json(path, {"schema": SCHEMA, **results})
    plots.draw(results, place, study, out / "results")
    (out / "RESULTS.md").write_text(markdown(results))


TEXT = """# Decoupled against concatenated

`python -m eval ablation` made this file and its pictures; [results/ablation.json](results/ablation.json) has every row, and says what
its entries are. {size}; the same data order, noise and initial projection for all forms of one seed (but for the
simple adapter with as many parameters, which has more tokens). Pictures are drawn in bfloat16 with {steps} DDIM steps and guidance
{guidance}, one for each of {prompts} prompts, seeds 0 .. {prompts} - 1, nothing picked.

## The primary endpoint

Named before the runs: **the error against the image prompt at {level} text-following on conflicting texts**, the lowest on the curve
that a form draws as lambda grows (straight between two lambdas) up to there; lower is better. The primary difference is the paper's:
{second}, minus {first}.
{measures}

Intervals come from resampling seeds and prompts together, paired by seed (the half-width of the primary difference: {width});
the p-values of the other differences are Holm's. All of it is conditional on one base model and one CLIP.

{primary}

{verdict}

![following the text against the error](results/ablation_curves.png)

The first prompts of the conflict, in order, each form at the best of its lambdas, seed 0:

![the first prompts](results/ablation_pictures.png)

## As the training goes on

The same error after parts of the training, read off fewer lambdas, the same two for every part:

{shares}

![gain of the picture](results/ablation_gains.png)

## What the picture is left with in a joint softmax

1 - g, the share of the attention that image keys take (`eval/mass.py`), the mean over layers, heads and timesteps; with all 77 text
keys and with as many as the longest text has. A dropped picture is the null image, which is not lambda 0: it still takes its share.

{mass}

![image mass](results/ablation_mass.png)

## The rates

`gain_shuffled` (train/adapter.py) after a short run of seed 1000, in thousandths; the highest was taken, before any picture was drawn:

{rates}

## Are so few steps enough?

{checked}

## Every task

`python -m eval ablation --cell simple:0:conflict` draws and reads one cell again.

### The picture alone

{picture}

### Picture and agreeing text

{agreeing}

### Picture and conflicting text

{conflict}
"""
WORLD = """
A picture follows the text when the judge (eval/attributes.py) sees the text's concept in it; the error is the CIELAB difference of
its palette from the image prompt's (CIE76, the mean over the pair). In the tables below concept and background are the picture's;
on the conflict the text's / the picture's. Drawing is which of its concept's drawings is shown, where there are several; placement
is the distance from the image prompt's centre and size, in pixels. CLIP-I and CLIP-T are cosines by {scorer};
CLIPScore is 2.5 max(cos, 0) of the latter."""
FILES = """
Of these pictures no truth is known. How far one follows the text is its CLIP-T as a share of what the text alone gets; the error
is 100 (1 - CLIP-I); the conflicting text is another picture's caption. CLIP-I and CLIP-T are cosines by {scorer};
CLIPScore is 2.5 max(cos, 0) of the latter."""
