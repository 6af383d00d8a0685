"""Measure how often the judge agrees with a person about generated pictures.  `python -m eval calibration`

results/labels.png holds 104 pictures drawn by the mini weights for conflicting prompts, at lambda 0, 0.4, 0.8 and 1.2 in turn.
results/labels.json holds a person's labels, given without knowledge of the prompts: a concept and a background, or null where the person
could not tell. `--draw` draws new pictures, which must then be labelled again.
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
from train.vae import bytes_to_tensor
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, SIZE

COLUMNS, ROWS = 13, 8
LAMBDAS = (0.0, 0.4, 0.8, 1.2)


def draw_sheet(weights: Path, path: Path) -> None:
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


def tiles_of(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Cut a sheet into its pictures, `n 64 64 3`."""
    sheet = np.array(Image.open(path).convert("RGB"))
    tiles = sheet.reshape(ROWS, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2)
    return tiles.reshape(-1, SIZE, SIZE, 3)


def agreement(judge: Judge, folder: Path) -> dict[str, float]:
    """For concept and background, return the number of labelled pictures and the share on which the judge agrees."""
    reading = judge.read(bytes_to_tensor(tiles_of(folder / "labels.png")))
    labels = read_json(folder / "labels.json")
    scores: dict[str, float] = {}
    for key, names, logits in (
        ("concept", CONCEPT_NAMES, reading.concept),
        ("background", BACKGROUND_NAMES, reading.background),
    ):
        labelled = [(i, names.index(label)) for i, label in enumerate(labels[key]) if label is not None]
        scores[f"{key}_labelled"] = len(labelled)
        scores[key] = float(np.mean([int(logits[i].argmax()) == label for i, label in labelled]))
    return scores


def run(args: Namespace) -> None:
    """`python -m eval calibration`"""
    if args.draw:
        draw_sheet(args.weights, args.out / "labels.png")
    print(summary(agreement(load_judge(args.weights / "judge.safetensors"), args.out)))
