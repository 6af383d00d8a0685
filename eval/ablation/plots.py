"""The figures of RESULTS.md: the trade-off, the endpoint against steps, the image alone, and two contact sheets; and that of tier B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from checkpoints.files import replacing
from eval.ablation.endpoint import where_read
from eval.ablation.forms import FORMS, OWN, SHARED, fraction
from eval.ablation.points import SHOWN, drawn_at
from eval.ablation.rows import Results
from eval.ablation.statistics import at_level
from eval.ablation.study import Workspace
from sampling.sheets.layout import sheet

matplotlib.use("agg")


def plot_all(results: Results, workspace: Workspace, folder: Path) -> None:
    """Write all figures to `folder`."""
    figure, (curves, steps, alone) = plt.subplots(1, 3, figsize=(15, 4.5), width_ratios=(2, 1, 1))
    plot_curves(results, curves)
    plot_steps(results, steps)
    plot_alone(results, alone)
    if results.truth():
        for axes in (curves, steps):
            axes.set_ylim(-3, results.data["summary"]["ceilings"]["vae"] + 4)
    figure.tight_layout()
    with replacing(folder / "ablation.png") as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)
    lambdas = {form: matched_lambda(results, form) for form in workspace.study.forms}
    level = f"Each form at the lambda that keeps {workspace.study.level:.0%} of the following of the text alone"
    contact_sheet(workspace, lambdas, level, folder / "ablation_matched.png")
    contact_sheet(workspace, dict.fromkeys(workspace.study.forms, 1.0), "Lambda 1", folder / "ablation_one.png")


def axis_label(results: Results) -> str:
    """Name what is read at equal following."""
    return "palette information" if results.truth() else "100 CLIP-I"


def plot_curves(results: Results, axes: Axes) -> None:
    """Plot the trade-off of each form: seeds as thin lines, their mean, and a band of one standard deviation between seeds.

    The line from the text alone to the smallest lambda is dotted, and has neither mean nor band: nothing was drawn there.
    """
    for form, (colour, style) in looks(results).items():
        curve = results.curve(form)
        follow, value = curve.following.mean(axis=-1), curve.value.mean(axis=-1)
        share = 100 * follow / follow[:, :1].clip(1e-9)
        axes.plot(share[:, 1:].T, value[:, 1:].T, color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(share[:, :2].T, value[:, :2].T, ":", color=colour, linewidth=0.6, alpha=0.6)
        highest = share[:, 1:].max(axis=1).min() / 100  # the highest level that every seed reaches with a drawn lambda
        levels = np.linspace(max(share.min(axis=1).max() / 100, 0.0), highest, 41)
        each = np.stack([curve.seeds(at_level(level)) for level in levels])
        mean, spread = each.mean(axis=1), each.std(axis=1, ddof=1 if each.shape[1] > 1 else 0)
        axes.plot(100 * levels, mean, style, color=colour, linewidth=2, label=FORMS[form].short)
        axes.fill_between(100 * levels, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        one = results.grid(form).index(1.0)
        axes.plot(share[:, one].mean(), value[:, one].mean(), "o", color=colour)
    axes.plot([], [], "o", color="grey", label="lambda 1")
    lines(results, axes)
    level = 100 * results.study["level"]
    axes.axvline(level, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(f"{level:.0f} %", (level, 0.02), (3, 0), ("data", "axes fraction"), "offset points", color="grey")
    axes.annotate("better", (0.3, 0.45), (0.18, 0.3), "axes fraction", arrowprops={"arrowstyle": "->"}, color="grey")
    axes.set_xlabel("following the text, % of the text alone")
    axes.set_ylabel(f"{axis_label(results)}, {results.primary} task")
    axes.legend(fontsize=8, loc="lower left")


def plot_steps(results: Results, axes: Axes) -> None:
    """Plot the endpoint against the steps of training, on a log axis. An open marker: some seeds are read at an end of their curve."""
    summary = results.data["summary"]["steps"]
    for form, (colour, style) in looks(results).items():
        ends = np.array(summary["endpoint"][form])
        axes.plot(summary["steps"], ends, color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(summary["steps"], ends.mean(axis=1), style, color=colour, linewidth=2)
        for step, mean, where in zip(summary["steps"], ends.mean(axis=1), summary["read"][form], strict=True):
            axes.plot(step, mean, "o", color=colour, markersize=5, markerfacecolor="white" if any(where.values()) else colour)
    lines(results, axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(summary["steps"], [f"{step:,}" for step in summary["steps"]])
    axes.set_xlabel("training steps")
    axes.set_ylabel(f"{axis_label(results)} at {results.study['level']:.0%} following")


def plot_alone(results: Results, axes: Axes) -> None:
    """Plot the image prompt alone at lambda 1: CLIP-I against palette information, a point for each seed."""
    for form, (colour, _) in looks(results).items():
        measures = results.data["summary"]["paper"]["picture"][form]
        axes.plot(measures["clip_i"], measures.get("information", measures["clip_t"]), "o", color=colour)
    axes.set_xlabel("CLIP-I, image prompt alone, lambda 1")
    axes.set_ylabel(axis_label(results) if results.truth() else "CLIP-T with the caption")
    if results.truth():
        lines(results, axes, floor=False)


def plot_cause(results: Results, path: Path) -> None:
    """Plot the forms between a sum and a joint softmax, for tier B: a dot for each seed at the level, open if it is read at an end of its
    curve, and a ring for lambda 1."""
    sides = {"the text's projections": SHARED, "own projections": OWN}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, (title, (total, joint, image_yields, text_yields, *_)) in zip(panels, sides.items(), strict=True):
        for i, form in enumerate((total, text_yields, image_yields, joint)):
            ends, one = results.data["summary"]["endpoint"][form]["information"], results.data["summary"]["one"][form]["information"]
            following = results.curve(form).following.mean(axis=-1)
            for x, end, each in zip(i + 0.08 * (np.arange(len(ends)) - len(ends) / 2 + 0.5), ends, following, strict=True):
                between = where_read(each, results.study["level"]) == "between"
                axes.plot(x, end, "o", color=f"C{i}", markersize=5, markerfacecolor=f"C{i}" if between else "white")
            axes.plot(i, one, "o", color="black", markersize=11, markerfacecolor="none")
        axes.set_xticks(range(4), ["$A_t + λ A_i$", "$g A_t + λ A_i$", "$A_t + λ (1-g) A_i$", "joint softmax"])
        axes.axhline(results.data["summary"]["ceiling"], color="grey", linewidth=0.8, linestyle="--")
        axes.set_title(title)
    panels[0].set_ylabel("palette information")
    panels[0].set_ylim(bottom=0)
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def lines(results: Results, axes: Axes, floor: bool = True) -> None:
    """Draw the ceiling, the VAE, and the floor, where nothing is known."""
    if results.truth():
        axes.axhline(results.data["summary"]["ceilings"]["vae"], color="grey", linewidth=0.8, linestyle="--")
        if floor:
            axes.axhline(0, color="grey", linewidth=0.8)


def looks(results: Results) -> dict[str, tuple[str, str]]:
    """Choose the colour and line style of each form."""
    return {form: (f"C{i}", ("-", "--", "-.", ":")[i % 4]) for i, form in enumerate(results.study["forms"])}


def matched_lambda(results: Results, form: str) -> float:
    """Return the highest lambda at which seed 0 of a form is at the level, linear between the lambdas of the grid."""
    following = results.curve(form).following[0].mean(axis=-1)
    return float(at_level(results.study["level"])(following, np.array(results.grid(form))))


def contact_sheet(workspace: Workspace, lambdas: Mapping[str, float], title: str, path: Path) -> None:
    """Draw the first prompts of the first task with seed 0 of each form at its lambda, as in Figure 10."""
    bench = workspace.bench().first(SHOWN)
    task, columns = bench.prompts.tasks[0], [bench.prompts.images]
    for form, lam in lambdas.items():
        columns.append(drawn_at(bench, workspace.adapters / f"{form}-0.safetensors", form, lam))
    rows: list[tuple[Image.Image, ...]] = list(zip(*columns, strict=True))
    heads = [f"{FORMS[form].short}, {fraction(lam)}" for form, lam in lambdas.items()]
    drawing = sheet([["image prompt"], heads], rows, bench.prompts.texts(task), note_at=1, title=title)
    with replacing(path) as part:
        drawing.save(part, "PNG")
