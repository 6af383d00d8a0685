"""The figures of RESULTS.md, including a contact sheet like the paper's Figure 10."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from checkpoints.adapters import load_adapter
from checkpoints.files import replacing
from eval.ablation.endpoint import best_lambda, curves, grey_error
from eval.ablation.forms import FORMS
from eval.ablation.rows import Results, fraction
from eval.ablation.study import Study, Workspace
from sampling.images import to_images
from sampling.sheets.layout import sheet

matplotlib.use("agg")


def plot_all(results: Results, workspace: Workspace, study: Study, folder: Path) -> None:
    """Write all figures to `folder`."""
    plot_curves(results, folder / "ablation_curves.png")
    plot_gains(results, folder / "ablation_gains.png")
    plot_mass(results, folder / "ablation_mass.png")
    contact_sheet(results, workspace, study, folder / "ablation_pictures.png")


def plot_curves(results: Results, path: Path) -> None:
    """Plot text-following against error for each form, averaged over seeds; lambda grows to the left."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for form in results.study["forms"]:
        mine = curves(results.pictures, form)
        follow, error = mine.following.mean(axis=(0, 2)), mine.error.mean(axis=(0, 2))
        axes.plot(100 * follow, error, marker="o", markersize=3, label=FORMS[form].name)
    axes.axvline(100 * results.study["level"], color="grey", linewidth=0.8, linestyle=":")
    if results.truth is not None:
        axes.axhline(grey_error(results.truth["palette"]), color="grey", linewidth=0.8, label="a constant grey")
    axes.set_xlabel("text-following, %")
    axes.set_ylabel("error against the image prompt" + (", palette" if results.truth else ", 100 (1 - CLIP-I)"))
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_gains(results: Results, path: Path) -> None:
    """Plot the gain during training: the held-out loss with another picture minus that with the right one."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for form, logs in results.data["gains"].items():
        mean = pd.concat(pd.DataFrame(log) for log in logs).groupby("step")["gain_shuffled"].mean()
        axes.plot(mean.index, mean, label=FORMS[form].name)
    axes.set_xlabel("step")
    axes.set_ylabel("gain of the own picture over another")
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_mass(results: Results, path: Path) -> None:
    """Plot 1 - g by layer and by timestep, at the end of training, with all text keys."""
    masses = results.masses
    masses = masses[(masses["share"] == 1) & (masses["words"] == masses["words"].max())]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for key, axes in zip(("layer", "t"), panels, strict=True):
        for i, form in enumerate(masses["form"].unique()):
            for picture, line in (("own", "-"), ("null", ":")):
                mine = masses[(masses["form"] == form) & (masses["picture"] == picture)]
                mean = mine.groupby(key)["mass"].mean()
                label = f"{form}, {'its own picture' if picture == 'own' else 'no picture'}"
                axes.plot(mean.index, mean, marker="o", markersize=3, linestyle=line, color=f"C{i}", label=label)
        axes.set_xlabel({"layer": "layer, in execution order", "t": "timestep"}[key])
    panels[0].set_ylabel("share of the attention that goes to image keys")
    panels[1].legend(fontsize=7)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def contact_sheet(results: Results, workspace: Workspace, study: Study, path: Path) -> None:
    """Draw the first 8 prompts of `conflict` with each form at its `best_lambda`, seed 0, as in Figure 10."""
    bench = workspace.bench(study).first(8)
    lambdas, columns = {form: best_lambda(results, form) for form in study.forms}, [bench.prompts.images]
    for form, lam in lambdas.items():
        adapter = load_adapter(workspace.adapter(form, 0), bench.pipeline.unet).to(study.device)
        columns.append(to_images(bench.draw("conflict", adapter, FORMS[form].fuse, bench.embedding(adapter), lam)))
    rows, title = list(zip(*columns, strict=True)), f"At lambda {', '.join(map(fraction, lambdas.values()))}"
    texts = bench.prompts.texts("conflict")
    drawing = sheet([["image prompt"], list(lambdas)], rows, texts, note_at=1, title=title)
    with replacing(path) as part:
        drawing.save(part, "PNG")
