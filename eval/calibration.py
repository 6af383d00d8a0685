"""How often does the judge agree with a person about drawn pictures?  `python -m eval calibration`

results/labels.png holds 104 pictures that the mini weights drew for conflicting prompts, at lambda 0, 0.4, 0.8 and 1.2 in turn.
results/labels.json holds what a person saw in each, without knowing the prompts: a concept and a background, or null where the
person could not tell. `--draw` draws new pictures, which then need new labels.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoints.files import check_output, read_json, replacing
from eval.bench import embed
from eval.prompts import Prompts
from eval.tables import summary
from sampling.images import to_images
from sampling.pipeline import load
from train.judge import Judge, load_judge
from train.vae import to_tensor
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, SIZE

COLUMNS, ROWS = 13, 8
LAMBDAS = (0.0, 0.4, 0.8, 1.2)


def draw(weights: Path, path: Path) -> None:
    """Draw the sheet of pictures to label."""
    check_output(path)
    pipeline, prompts = load(weights), Prompts.of_the_world(COLUMNS * ROWS)
    embedding = embed(pipeline, prompts.images)
    lam = torch.tensor(LAMBDAS).repeat(COLUMNS * ROWS // len(LAMBDAS)).view(-1, 1, 1, 1)
    sheet = Image.new("RGB", (COLUMNS * SIZE, ROWS * SIZE))
    for rows in torch.arange(COLUMNS * ROWS).split(COLUMNS):
        texts, seeds = [prompts.other[i] for i in rows], rows.tolist()
        drawn = pipeline.sample(texts, seeds, embedding[rows], scale=lam[rows], guidance=4.0, steps=12)
        for i, image in zip(seeds, to_images(drawn), strict=True):
            sheet.paste(image, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    with replacing(path) as part:
        sheet.save(part, "PNG")


def cut(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pictures of a sheet, `n 64 64 3`."""
    sheet = np.array(Image.open(path).convert("RGB"))
    tiles = sheet.reshape(ROWS, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2)
    return tiles.reshape(-1, SIZE, SIZE, 3)


def agreement(judge: Judge, folder: Path) -> dict[str, float]:
    """For concept and background: how many pictures were labelled, and the share in which the judge sees the same."""
    seen = judge.read(to_tensor(cut(folder / "labels.png")))
    labels = read_json(folder / "labels.json")
    found: dict[str, float] = {}
    for key, names, logits in (
        ("concept", CONCEPT_NAMES, seen.concept),
        ("background", BACKGROUND_NAMES, seen.background),
    ):
        labelled = [(i, names.index(label)) for i, label in enumerate(labels[key]) if label is not None]
        found[f"{key}_labelled"] = len(labelled)
        found[key] = float(np.mean([int(logits[i].argmax()) == label for i, label in labelled]))
    return found


def run(args: Namespace) -> None:
    """`python -m eval calibration`"""
    if args.draw:
        draw(args.weights, args.out / "labels.png")
    print(summary(agreement(load_judge(args.weights / "judge.safetensors"), args.out)))
