"""Measure how the time of a UNet step grows with the latents and with the batch.  `python -m eval scaling`

A step is one call of the UNet of SD 1.5 with the adapter, in float32. All networks are in one process and are measured alternately.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tqdm import tqdm

from checkpoints.files import check_output, replacing, write_json
from eval.device import machine
from eval.peers import official
from eval.peers.benchmark import kept
from eval.peers.step import network_of
from eval.peers.timing import seconds
from eval.tables import markdown

matplotlib.use("agg")

NETWORKS = {"theirs": "diffusers", "plain": "ours", "fast": "ours, --fast"}
COLOURS = {"theirs": "tab:gray", "plain": "tab:blue", "fast": "tab:orange"}
SIDES, BATCHES = (32, 48, 64, 96, 128), (1, 2, 4, 8, 16)
SMALL = 32  # side of the latents at which the batch grows
POINTS = sorted({*((side, 1) for side in SIDES), *((SMALL, batch) for batch in BATCHES)})  # (side, batch)


def evaluate(folder: Path, out: Path, rounds: int) -> dict[str, Any]:
    """Measure the points that `out` (JSON) lacks, and write it after each. Raises ValueError if it is from another machine."""
    check_output(out)
    results: dict[str, Any] = {"command": "python -m eval scaling", "machine": machine(), "torch": torch.__version__, "points": {}}
    if out.exists():
        results = kept(out, results)
    missing = [point for point in POINTS if f"{point[0]}, {point[1]}" not in results["points"]]
    if not missing:
        return results
    official.write(folder)
    with torch.no_grad():
        networks = {name: network_of(folder, name, torch.float32) for name in NETWORKS}
        for side, batch in tqdm(missing, desc="scaling", unit="point"):
            steps = {name: network(batch, side) for name, network in networks.items()}
            times = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]
            results["points"][f"{side}, {batch}"] = {name: [row[name] for row in times] for name in NETWORKS}
            write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/benchmark.md: median seconds at each point, and the median ratios to diffusers."""
    rows = []
    for point in (f"{side}, {batch}" for side, batch in POINTS):
        times = pd.DataFrame(results["points"][point])
        ratios = times[["plain", "fast"]].div(times["theirs"], axis=0).median()
        side, batch = point.split(", ")
        medians = [f"{times[name].median():.2f} s" for name in NETWORKS]
        rows.append([f"{side} x {side}", batch, *medians, *(f"{value:.2f}" for value in ratios)])
    columns = ["latents", "batch", *NETWORKS.values(), "ours / diffusers", "--fast / diffusers"]
    return f"Measured on {results['machine']}.\n\n{markdown(pd.DataFrame(rows, columns=columns))}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the median seconds, with the range over all rounds, against the side of the latents and against the batch."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    _panel(panels[0], results, {side: f"{side}, 1" for side in SIDES}, "side of the latents (batch 1)")
    _panel(panels[1], results, {batch: f"{SMALL}, {batch}" for batch in BATCHES}, f"batch (latents of {SMALL} x {SMALL})")
    panels[0].set_ylabel("seconds of a step")
    panels[0].legend()
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def _panel(axes: Axes, results: dict[str, Any], points: dict[int, str], label: str) -> None:
    """Draw a line for each network through `points`, {position: its name in the results}."""
    for name, title in NETWORKS.items():
        values = [results["points"][point][name] for point in points.values()]
        middle = [median(value) for value in values]
        spread = [[m - min(v) for m, v in zip(middle, values, strict=True)], [max(v) - m for m, v in zip(middle, values, strict=True)]]
        axes.errorbar([*points], middle, yerr=spread, color=COLOURS[name], label=title, marker="o", markersize=4, capsize=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([*points], [str(x) for x in points])
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def run(args: Namespace) -> None:
    """`python -m eval scaling`"""
    results = evaluate(args.state, args.out, args.rounds)
    plot(results, args.out.with_suffix(".png"))
    print(table(results))
