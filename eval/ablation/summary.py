"""All numbers of RESULTS.md, from the rows of a study (docs/ablation-protocol.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from eval.ablation.endpoint import RIGHT, count_ends, endpoint
from eval.ablation.forms import IP_ADAPTER, SIMPLE
from eval.ablation.names import rate_name
from eval.ablation.robustness import measured, robustness
from eval.ablation.rows import Results
from eval.ablation.statistics import (
    Curve,
    Read,
    at_index,
    at_level,
    best_constant,
    between,
    distances,
    holm,
    information,
)
from eval.scores import GREY

BAND = 0.70, 0.95  # the levels of the mean over the curve


def summarise(results: Results) -> dict[str, Any]:
    """Compute all numbers. Those of each form are lists over seeds; differences are `IP_ADAPTER` minus another form."""
    study, forms = results.study, list(results.study["forms"])
    full = {form: results.curve(form) for form in forms}
    summary: dict[str, Any] = {
        "endpoint": endpoints(results, full),
        "difference": differences(results, full, at_level(study["level"])),
        "ceilings": ceilings(results),
        "steps": by_step(results),
        "rates": by_rate(results),
        "paper": at_one(results),
        "secondary": secondary(results),
        "robustness": robustness(results),
        "losses": {form: [run["losses"][-1]["held_out"] for run in runs] for form, runs in trainings(results).items()},
    }
    if "confirm" in results.data["prompts"]:
        curves = {form: results.curve(form, split="confirm") for form in forms if form in (IP_ADAPTER, SIMPLE)}
        summary["confirmed"] = differences(results, curves, at_level(study["level"]))
        summary["confirmed_read"] = {form: count_ends(curve, study["level"]) for form, curve in curves.items()}
    return summary


def trainings(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return the sizes, rates and losses of the adapters of each form, in the order of their seeds."""
    runs = [unit.value for name, unit in results.units.items() if name.startswith("train-")]
    return {form: [run for run in runs if run["form"] == form] for form in results.study["forms"]}


def endpoints(results: Results, curves: dict[str, Curve]) -> dict[str, Any]:
    """Return for each form: the endpoint of each seed, where the seeds are read (`count_ends`), and what is right there (`RIGHT`)."""
    level, ends = results.study["level"], dict[str, dict[str, Any]]()
    for form, curve in curves.items():
        ends[form] = endpoint(curve, level)
        if results.truth():
            ends[form] |= {key: results.curve(form, key).seeds(at_level(level)).tolist() for key in RIGHT}
    return ends


def differences(results: Results, curves: dict[str, Curve], read: Read) -> dict[str, Any]:
    """Return `IP_ADAPTER` minus each other form. The primary p-value is not adjusted; the others are adjusted by Holm's method."""
    bootstrap = results.bootstrap
    intervals = {form: bootstrap.difference(curves[IP_ADAPTER], curve, read) for form, curve in curves.items() if form != IP_ADAPTER}
    p = {form: each.p for form, each in intervals.items()}
    p |= holm({form: p[form] for form in intervals if form != SIMPLE})
    return {form: asdict(each) | {"p": p[form]} for form, each in intervals.items()}


def ceilings(results: Results) -> dict[str, float]:
    """Return the information of the truth, of the truth through the VAE and of the text alone; and raw errors that need no model."""
    truth, through = results.measures("references")["information"].mean(axis=1).tolist()
    values = {"truth": truth, "vae": through, "alone": results.alone()["information"].mean()}
    if results.truth():
        palettes, error = results.palettes(), results.measures("references")["error"].mean(axis=1)
        guesses = {"grey": GREY.double().expand(2, 3).numpy(), "best constant": best_constant(palettes)}
        values |= {f"error, {name}": distances(guess[None], palettes).mean() for name, guess in guesses.items()}
        values |= {"error, another's": information(distances(palettes, palettes)).mean(), "error, vae": error[1]}
    return {name: float(value) for name, value in values.items()}


def by_step(results: Results) -> dict[str, Any]:
    """Return the endpoint of each form after each number of steps, from a few lambdas, and the primary difference and its trend."""
    study, read = results.study, at_level(results.study["level"])
    steps = [study["steps"] // 2**i for i in (4, 3, 2, 1, 0)]
    curves = {form: [results.curve(form, step=step, few=True) for step in steps] for form in study["forms"]}
    summary: dict[str, Any] = {"steps": steps, "endpoint": {form: [c.seeds(read).tolist() for c in each] for form, each in curves.items()}}
    summary["read"] = {form: [count_ends(c, study["level"]) for c in each] for form, each in curves.items()}
    if {IP_ADAPTER, SIMPLE} <= set(curves):
        bootstrap, pairs = results.bootstrap, list(zip(curves[IP_ADAPTER], curves[SIMPLE], strict=True))
        summary["difference"] = [asdict(bootstrap.difference(a, b, read)) for a, b in pairs]
        summary["trend"] = asdict(bootstrap.trend(steps, pairs, read))
    return summary


def by_rate(results: Results) -> dict[str, Any]:
    """Return for each form and rate: the held-out loss; the endpoint after the short training, None if it diverged; and `read`, where it is
    read (`count_ends`)."""
    study, summary = results.study, dict[str, dict[str, Any]]()
    for form in study["forms"]:
        summary[form] = {}
        for rate in study["rates"]:
            curve, row = results.rate_curve(form, rate), {"held_out": results.units[rate_name(form, rate)].value}
            row["endpoint"] = None if curve is None else float(curve.seeds(at_level(study["level"]))[0])
            summary[form][f"{rate:g}"] = row | {"read": {} if curve is None else count_ends(curve, study["level"])}
    return summary


def at_one(results: Results) -> dict[str, Any]:
    """Return the measures of each task and form at lambda 1, the paper's setting, as lists over seeds; and differences for `picture`."""
    keys = ("following", "concept", "information", "clip_i", "clip_t") if results.truth() else ("clip_i", "clip_t")
    forms = results.study["forms"]
    measures: dict[str, Any] = {
        task: {form: {key: curve_at_one(results, form, task, key).seeds(at_index(0)).tolist() for key in keys} for form in forms}
        for task in results.data["tasks"]
    }
    measures["difference"] = {
        key: differences(results, {form: curve_at_one(results, form, "picture", key) for form in forms}, at_index(0))
        for key in ("information", "clip_i")
    }
    return measures


def curve_at_one(results: Results, form: str, task: str = "", key: str = "information") -> Curve:
    """Return the curve of a form at lambda 1 only, by default on the first task."""
    curve, index = results.curve(form, key, task), results.grid(form).index(1.0)
    return Curve(curve.following[:, index : index + 1], curve.value[:, index : index + 1])


def secondary(results: Results) -> dict[str, Any]:
    """Return the secondary endpoints: name -> form -> list over seeds; where they are read; and the primary difference, None if all seeds
    of a form are read on the straight line from the text alone."""
    level, forms = results.study["level"], results.study["forms"]
    measures: dict[str, tuple[Callable[[str], Curve], float | None]] = {
        "mean over levels": (lambda form: results.curve(form), None),
        "finest layers": (lambda form: results.curve(form, layers="finest"), level),
        "CLIP-I": (lambda form: results.curve(form, "clip_i"), level),
    }
    if results.truth():
        measures["conflicting text"] = (lambda form: results.curve(form, task="conflict"), level)
        measures["conflicting text, at 20 %"] = (lambda form: results.curve(form, task="conflict"), 0.2)
        measures["retrieval AUC"] = (lambda form: results.curve(form, "auc"), level)
        measures["raw palette error"] = (lambda form: results.curve(form, "error"), level)
    bootstrap, summary = results.bootstrap, {}
    for name, (curve, at) in measures.items():
        curves, read = {form: curve(form) for form in forms}, between(*BAND) if at is None else at_level(at)
        ends = {form: count_ends(each, *(BAND if at is None else (at,))) for form, each in curves.items()}
        pair = [curves[form] for form in (IP_ADAPTER, SIMPLE) if form in forms and (at is None or measured(curves[form], at))]
        summary[name] = {
            "forms": {form: each.seeds(read).tolist() for form, each in curves.items()},
            "read": ends,
            "difference": asdict(bootstrap.difference(pair[0], pair[1], read)) if len(pair) == 2 else None,
        }
    return summary
