"""Tier C of the ablation: IP-Adapter beside its rivals, Table 1 of the paper in miniature.  `python -m eval rivals`

docs/ablation-protocol.md, "Tier C", says what is compared.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pandas as pd
import torch

from eval.ablation import rival_sheets
from eval.ablation.names import alone_name
from eval.ablation.reference import REFERENCE
from eval.ablation.rival_draws import DRAWN, SCENES, RivalStudy, jobs_of
from eval.ablation.rivals import TRAINED
from eval.ablation.rows import Results
from eval.ablation.statistics import Array
from eval.ablation.tier import Tier, check_options
from eval.clip_score import clip_score
from eval.scores import bootstrap
from eval.tables import markdown

MEASURES = "clip_i", "clip_t", "concept", "right background", "information", "following", "both"
PAPER = {  # Table 1 of the paper: CLIP-I, CLIP-T
    "ip_adapter": (0.828, 0.588),
    "uni_controlnet": (0.736, 0.506),
    "shuffle": (0.616, 0.421),
    "unclip": (0.810, 0.584),
    "variations": (0.760, 0.548),
}
NAMES = {
    "none": "the base alone, without a picture",
    "ip_adapter": "IP-Adapter",
    "simple_mlp": "the simple adapter, with an MLP of as many parameters",
    "uni_controlnet": "Uni-ControlNet's global adapter: tokens appended to the text",
    "shuffle": "ControlNet Shuffle: residuals of a shuffled picture, averaged over positions",
    "unclip": "SD unCLIP: added to the timestep embedding, whole UNet trained",
    "variations": "SD Image Variations: in place of the text, whole UNet trained",
    REFERENCE: "reference-only: self-attention reads the picture, nothing trained",
    "truth": "the image prompts themselves, through the VAE",
}


def summarise(results: Results) -> dict[str, Any]:
    """Compute the numbers of the table, with 95 % intervals over prompts, for the rows of `NAMES`, each task and each of `MEASURES`."""
    rows: dict[str, Any] = {}
    for name in ["none", *results.study["forms"], "truth"]:
        runs = [unit.value for unit in results.units.values() if unit.value.get("rival") == name]
        sizes, choices = ([run for run in runs if key in run] for key in ("parameters", "chosen"))
        units = {"none": {task: alone_name(task) for task in DRAWN}, "truth": {"picture": "references"}}
        rows[name] = {"parameters": sizes[0]["parameters"] if sizes else 0}
        rows[name] |= {key: choices[0][key] for key in ("chosen", "at_edge", "losses")} if choices else {}
        for task, unit in units.get(name, {task: f"drawn-{name}-{task}" for task in DRAWN}).items():
            values = _values(results, unit)
            rows[name][task] = {key: bootstrap(torch.from_numpy(values[key])) for key in MEASURES}
    return rows


def _values(results: Results, unit: str) -> dict[str, Array]:
    """Return each measure of a unit, averaged over noises: one number for each prompt. Of the references, keep those through the VAE.

    `both`: the drawing follows the text, and shows the image prompt's concept.
    """
    measures = {key: each[1:] if unit == "references" else each for key, each in results.measures(unit).items()}
    measures["clip_t"] = clip_score(torch.from_numpy(measures["clip_t"])).numpy()
    measures["both"] = measures["following"] * measures["concept"]
    return {key: each.mean(axis=0) for key, each in measures.items()}


def table(results: Results) -> pd.DataFrame:
    """Tabulate the image prompt alone as in Table 1, with 95 % intervals over prompts and the paper's own numbers."""
    lines = []
    for name, row in results.data["summary"].items():
        picture = row["picture"]
        line = {"": NAMES[name], "trained parameters": f"{row['parameters']:,}" if name in TRAINED else ""}
        line |= {title: _within(picture[key], ".3f") for key, title in (("clip_i", "CLIP-I"), ("clip_t", "CLIP-T"))}
        line["the paper's CLIP-I, CLIP-T"] = "{:.3f}, {:.3f}".format(*PAPER[name]) if name in PAPER else ""
        line |= {title: _within(picture[key], ".0%") for key, title in (("concept", "concept"), ("right background", "background"))}
        lines.append(line | {"information": _within(picture["information"], ".1f")})
    return pd.DataFrame(lines)


def scene_table(results: Results) -> pd.DataFrame:
    """Tabulate the complementary prompts, with 95 % intervals over prompts."""
    titles = {"following": "follows the text", "concept": "concept", "both": "both", "information": "information"}
    return pd.DataFrame(
        {"": NAMES[name]} | {title: _within(row[SCENES][key], ".1f" if key == "information" else ".0%") for key, title in titles.items()}
        for name, row in results.data["summary"].items()
        if SCENES in row
    )


def loss_table(results: Results) -> pd.DataFrame:
    """Tabulate the held-out loss at each learning rate. "*" marks the lowest, which was drawn with, and "**" one at the edge."""
    lines = []
    for name, row in results.data["summary"].items():
        if "losses" in row:
            mark = {f"{row['chosen']:.3g}": " \\*\\*" if row["at_edge"] else " \\*"}
            losses = (f"{rate}: " + (f"{loss:.5f}" if loss else "diverged") + mark.get(rate, "") for rate, loss in row["losses"].items())
            lines.append({"": NAMES[name], "learning rate: held-out loss": ", ".join(losses)})
    return pd.DataFrame(lines)


def _within(numbers: list[float], form: str) -> str:
    """Format a mean and its interval."""
    mean, low, high = numbers
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def run(args: Namespace) -> None:
    """`python -m eval rivals`"""
    check_options(args)
    more = {
        "train-RIVAL-RATE": "parameters, learning rate, held-out loss",
        "chosen-RIVAL": "its learning rate, whether that is at the edge of those that were tried, and the held-out loss at each",
        "drawn-RIVAL-TASK": "4 noises of the picture alone, else one",
    }
    tier = Tier("rivals", RivalStudy(), jobs_of, summarise, more)
    results = tier.run(args, args.weights)
    rival_sheets.write(tier.place(args, args.weights), args.out / "results" / "figures")
    print("\n\n".join(markdown(each(results)) for each in (table, scene_table, loss_table)))
