"""Tier C of the ablation: IP-Adapter beside its rivals, Table 1 of the paper in miniature.  `python -m eval rivals`

docs/ablation-protocol.md, "Tier C", says what is compared.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pandas as pd
import torch

from eval.ablation.reference import REFERENCE
from eval.ablation.rival_draws import DRAWN, RivalStudy, jobs_of
from eval.ablation.rows import Results
from eval.ablation.statistics import Array
from eval.ablation.tier import Tier
from eval.clip_score import clip_score
from eval.scores import bootstrap
from eval.tables import markdown
from sampling.device import check_device

MEASURES = "clip_i", "clip_t", "concept", "information", "following"
PAPER = {  # Table 1 of the paper: CLIP-I, CLIP-T
    "ip_adapter": (0.828, 0.588),
    "uni_controlnet": (0.736, 0.506),
    "unclip": (0.810, 0.584),
    "variations": (0.760, 0.548),
}
NAMES = {
    "ip_adapter": "IP-Adapter",
    "simple_mlp": "the simple adapter, with an MLP of as many parameters",
    "uni_controlnet": "Uni-ControlNet's global adapter: tokens appended to the text",
    "unclip": "SD unCLIP: added to the timestep embedding, whole UNet trained",
    "variations": "SD Image Variations: in place of the text, whole UNet trained",
    REFERENCE: "reference-only: self-attention reads the picture, nothing trained",
    "truth": "the image prompts themselves, through the VAE",
}


def summarise(results: Results) -> dict[str, Any]:
    """Compute the numbers of the tables, with 95 % intervals over prompts, for each rival and each of `MEASURES`."""
    rows: dict[str, Any] = {}
    for name in [*results.study["forms"], "truth"]:
        unit = results.units.get(f"train-{name}")
        rows[name] = {"parameters": unit.value["parameters"] if unit else 0}
        for task in DRAWN:
            values = _values(results, "references" if name == "truth" else f"drawn-{name}-{task}")
            rows[name][task] = {key: bootstrap(torch.from_numpy(values[key])) for key in MEASURES if name != "truth" or task == "picture"}
    return rows


def _values(results: Results, unit: str) -> dict[str, Array]:
    """Return each measure of a unit, averaged over noises: one number for each prompt. Of the references, keep those through the VAE."""
    measures = {key: each[1:] if unit == "references" else each for key, each in results.measures(unit).items()}
    measures["clip_t"] = clip_score(torch.from_numpy(measures["clip_t"])).numpy()
    return {key: each.mean(axis=0) for key, each in measures.items()}


def table(results: Results) -> pd.DataFrame:
    """Tabulate the picture alone as in Table 1, with the paper's own numbers, and the complementary prompts beside it."""
    lines = []
    for name, row in results.data["summary"].items():
        picture, scene = row["picture"], row["complementary"]

        def cell(values: dict[str, list[float]], key: str, digits: int) -> str:
            return f"{values[key][0]:.{digits}f}" if key in values else ""

        paper = PAPER.get(name)
        line = {"": NAMES[name], "trained parameters": f"{row['parameters']:,}" if name != "truth" else ""}
        line |= {"CLIP-I": cell(picture, "clip_i", 3), "CLIP-T": cell(picture, "clip_t", 3)}
        line |= {"the paper's CLIP-I, CLIP-T": "{:.3f}, {:.3f}".format(*paper) if paper else ""}
        line |= {"concept": cell(picture, "concept", 2), "information": cell(picture, "information", 1)}
        line |= {"scene: follows": cell(scene, "following", 2), "scene: information": cell(scene, "information", 1)}
        lines.append(line)
    return pd.DataFrame(lines)


def run(args: Namespace) -> None:
    """`python -m eval rivals`"""
    check_device(args.device)
    more = {"train-RIVAL": "parameters, learning rate, held-out loss", "drawn-RIVAL-TASK": "4 noises of the picture alone, else one"}
    print(markdown(table(Tier("rivals", "rivals", RivalStudy(), jobs_of, summarise, more).run(args, args.weights))))
