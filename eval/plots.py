"""The plots of RESULTS.md, and the contact sheet of Figure 10."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from checkpoints.adapters import load_adapter
from eval.ablation import FORMS, Place, Study
from eval.report import Results, best_lambda, curves, fraction, mass, masses, select
from sampling.images import to_images
from sampling.sheets import sheet

matplotlib.use("agg")


def draw(results: Results, place: Place, study: Study, folder: Path) -> None:
    """Writes all of them into `folder`."""
    plot_curves(results, folder / "ablation_curves.png")
    plot_gains(results, folder / "ablation_gains.png")
    plot_mass(results, folder / "ablation_mass.png")
    contact_sheet(results, place, study, folder / "ablation_pictures.png")


def plot_curves(results: Results, path: Path) -> None:
    """Each form's curve: text-following against error, the mean over seeds; lambda grows to the left."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for form in results["study"]["forms"]:
        rows = curves(results, form)
        follow, error = rows.following.mean(axis=(0, 2)), rows.error.mean(axis=(0, 2))
        axes.plot(100 * follow, error, marker="o", markersize=3, label=FORMS[form].name)
    axes.axvline(100 * results["study"]["level"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("text-following, %")
    axes.set_ylabel("error against the image prompt" + (", palette" if "truth" in results else ", 100 (1 - CLIP-I)"))
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_gains(results: Results, path: Path) -> None:
    """What the picture tells as the training goes on: held-out loss with another's picture minus that with its own."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for form, logs in results["gains"].items():
        steps = [row["step"] for row in logs[0]]
        axes.plot(
            steps, np.mean([[row["gain_shuffled"] for row in log] for log in logs], axis=0), label=FORMS[form].name
        )
    axes.set_xlabel("step")
    axes.set_ylabel("gain of the picture over another's")
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_mass(results: Results, path: Path) -> None:
    """1 - g over layers and over timesteps, after the whole training, beside all text keys."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    rows = select(masses(results), share=1.0)
    for key, axes in zip(("layer", "t"), panels, strict=True):
        ticks = sorted({row[key] for row in rows})
        for i, form in enumerate(dict.fromkeys(row["form"] for row in rows)):
            for picture, line in (("own", "-"), ("null", ":")):
                where = {"form": form, "share": 1.0, "words": max(row["words"] for row in rows), "picture": picture}
                shares = [mass(results, **where, **{key: tick}) for tick in ticks]
                label = f"{form}, {'its picture' if picture == 'own' else 'no picture'}"
                axes.plot(ticks, shares, marker="o", markersize=3, linestyle=line, color=f"C{i}", label=label)
        axes.set_xlabel({"layer": "layer, in execution order", "t": "timestep"}[key])
    panels[0].set_ylabel("share of the attention that image keys take")
    panels[1].legend(fontsize=7)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def contact_sheet(results: Results, place: Place, study: Study, path: Path, n: int = 8) -> None:
    """Figure 10: the first n prompts of `conflict`, a column a form at its `best_lambda`, seed 0, nothing picked."""
    bench = place.bench(study).first(n)
    lambdas, columns = {form: best_lambda(results, form) for form in study.forms}, [bench.prompts.images]
    for form, lam in lambdas.items():
        adapter = load_adapter(place.adapter(form, 0), bench.pipeline.unet).to(study.device)
        columns.append(to_images(bench.draw("conflict", adapter, FORMS[form].fuse, bench.embedding(adapter), lam)))
    rows, title = list(zip(*columns, strict=True)), f"At lambda {', '.join(map(fraction, lambdas.values()))}"
    texts = bench.prompts.texts("conflict")
    sheet([["image prompt"], list(lambdas)], rows, texts, note_at=1, title=title).save(path)
