"""The figures of RESULTS.md: the trade-off, the endpoint against steps, the image alone, and two contact sheets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from checkpoints.files import replacing
from eval.ablation.forms import FORMS, fraction
from eval.ablation.points import SHOWN, drawn_at
from eval.ablation.rows import Results
from eval.ablation.statistics import at_level
from eval.ablation.study import Study, Workspace
from sampling.sheets.layout import sheet

matplotlib.use("agg")


def plot_all(results: Results, workspace: Workspace, study: Study, folder: Path) -> None:
    """Write all figures to `folder`."""
    figure, (curves, steps, alone) = plt.subplots(1, 3, figsize=(15, 4.5), width_ratios=(2, 1, 1))
    plot_curves(results, curves)
    plot_steps(results, steps)
    plot_alone(results, alone)
    figure.tight_layout()
    with replacing(folder / "ablation.png") as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)
    matched = {form: matched_lambda(results, form) for form in study.forms}
    level = f"where {study.level:.0%} of the text alone's following is kept"
    contact_sheet(workspace, study, matched, f"The lambda {level}", folder / "ablation_matched.png")
    contact_sheet(workspace, study, dict.fromkeys(study.forms, 1.0), "Lambda 1, the paper's setting", folder / "ablation_one.png")


def unit(results: Results) -> str:
    return "palette information" if results.truth() else "100 CLIP-I"


def plot_curves(results: Results, axes: Axes) -> None:
    """Plot the trade-off of each form: seeds as thin lines, their mean, and a band of one standard deviation between seeds."""
    for i, (form, colour) in enumerate(colours(results).items()):
        curve = results.curve(form)
        follow, value = curve.following.mean(axis=-1), curve.value.mean(axis=-1)
        share = 100 * follow / follow[:, :1].clip(1e-9)
        axes.plot(share.T, value.T, color=colour, linewidth=0.6, alpha=0.6)
        levels = np.linspace(max(share.min(axis=1).max() / 100, 0.0), 1, 41)
        each = np.stack([curve.seeds(at_level(level)) for level in levels])
        mean, spread = each.mean(axis=1), each.std(axis=1)
        axes.plot(100 * levels, mean, color=colour, linewidth=2, label=FORMS[form].short)
        axes.fill_between(100 * levels, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        one = results.grid(form).index(1.0)
        axes.plot(share[:, one].mean(), value[:, one].mean(), "o", color=colour, label="lambda 1" if i == 0 else None)
    lines(results, axes)
    axes.axvline(100 * results.study["level"], color="grey", linewidth=0.8, linestyle=":")
    axes.annotate("better", (0.98, 0.9), (0.84, 0.74), "axes fraction", arrowprops={"arrowstyle": "->"}, color="grey")
    axes.set_xlabel("following the text, % of the text alone")
    axes.set_ylabel(f"{unit(results)}, {results.primary} task")
    axes.legend(fontsize=8)


def plot_steps(results: Results, axes: Axes) -> None:
    """Plot the endpoint against the steps of training, on a log axis."""
    found = results.data["summary"]["steps"]
    for form, colour in colours(results).items():
        ends = np.array(found["endpoint"][form])
        axes.plot(found["steps"], ends, color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(found["steps"], ends.mean(axis=1), color=colour, linewidth=2, marker="o", markersize=3)
    lines(results, axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found["steps"], [str(step) for step in found["steps"]])
    axes.set_xlabel("training steps")
    axes.set_ylabel(f"{unit(results)} at the level")


def plot_alone(results: Results, axes: Axes) -> None:
    """Plot the image prompt alone at lambda 1: CLIP-I against palette information, a point for each seed."""
    for form, colour in colours(results).items():
        found = results.data["summary"]["paper"]["picture"][form]
        axes.plot(found["clip_i"], found.get("information", found["clip_t"]), "o", color=colour)
    axes.set_xlabel("CLIP-I, image prompt alone, lambda 1")
    axes.set_ylabel(unit(results) if results.truth() else "CLIP-T with the caption")
    if results.truth():
        lines(results, axes)


def lines(results: Results, axes: Axes) -> None:
    """Draw the floor, where nothing is known, and the ceiling, the VAE."""
    if results.truth():
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axhline(results.data["summary"]["ceilings"]["vae"], color="grey", linewidth=0.8, linestyle="--")


def colours(results: Results) -> dict[str, str]:
    return {form: f"C{i}" for i, form in enumerate(results.study["forms"])}


def matched_lambda(results: Results, form: str) -> float:
    """Return the highest lambda at which the mean following over seeds is at the level, linear between the lambdas of the grid."""
    following = results.curve(form).following.mean(axis=(0, 2))
    return float(at_level(results.study["level"])(following, np.array(results.grid(form))))


def contact_sheet(workspace: Workspace, study: Study, lambdas: Mapping[str, float], title: str, path: Path) -> None:
    """Draw the first prompts of the first task with seed 0 of each form at its lambda, as in Figure 10."""
    bench = workspace.bench(study).first(SHOWN)
    task, columns = bench.prompts.tasks[0], [bench.prompts.images]
    for form, lam in lambdas.items():
        columns.append(drawn_at(bench, workspace.shipped / f"{form}-0.safetensors", form, lam))
    rows: list[tuple[Image.Image, ...]] = list(zip(*columns, strict=True))
    heads = [f"{FORMS[form].short} {fraction(lam)}" for form, lam in lambdas.items()]
    drawing = sheet([["image prompt"], heads], rows, bench.prompts.texts(task), note_at=1, title=title)
    with replacing(path) as part:
        drawing.save(part, "PNG")
