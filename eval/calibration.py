"""Can the judge be trusted on pictures that a model drew?  `python -m eval calibration`

results/labels.png holds 104 pictures that the mini weights drew for conflicting prompts, at lambda 0, 0.4, 0.8 and 1.2 in turn, and
results/labels.json what a person saw in each, by eye, without the prompts: a concept and a background, or null where none
can be told. The command prints how often the judge agrees; `--draw` draws new pictures, which want new labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoints.files import read_json
from eval import attributes, world
from eval.tasks import Prompts
from sampling.images import to_images
from sampling.pipeline import load
from train.vae import to_tensor
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, SIZE

COLUMNS, ROWS = 13, 8
LAMBDAS = (0.0, 0.4, 0.8, 1.2)


def draw(weights: Path, path: Path) -> None:
    """Writes the sheet."""
    pipeline, prompts = load(weights), Prompts.of_the_world(COLUMNS * ROWS)
    embedding = world.embedding(pipeline, prompts.images)
    lam = torch.tensor(LAMBDAS).repeat(COLUMNS * ROWS // len(LAMBDAS)).view(-1, 1, 1, 1)
    texts, sheet = prompts.other, Image.new("RGB", (COLUMNS * SIZE, ROWS * SIZE))
    for rows in torch.arange(len(texts)).split(COLUMNS):
        words, seeds = [texts[i] for i in rows], rows.tolist()
        drawn = pipeline.draw(words, seeds, embedding[rows], scale=lam[rows], guidance=4.0, steps=12)
        for i, image in zip(seeds, to_images(drawn), strict=True):
            sheet.paste(image, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def cut(path: Path) -> np.ndarray:
    """The pictures of a sheet, `n 64 64 3`."""
    sheet = np.array(Image.open(path).convert("RGB"))
    tiles = sheet.reshape(ROWS, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2)
    return tiles.reshape(-1, SIZE, SIZE, 3)


def agreement(judge: attributes.Judge, folder: Path) -> dict[str, float]:
    """In which share of the labelled pictures the judge sees what the person saw, and how many were labelled."""
    seen = attributes.read(judge, to_tensor(cut(folder / "labels.png")))
    labels = read_json(folder / "labels.json")
    found: dict[str, float] = {}
    for key, names, logits in (
        ("concept", CONCEPT_NAMES, seen.concept),
        ("background", BACKGROUND_NAMES, seen.background),
    ):
        told = [(i, names.index(label)) for i, label in enumerate(labels[key]) if label is not None]
        found |= {f"{key}_labelled": len(told)}
        found[key] = float(np.mean([int(logits[i].argmax()) == label for i, label in told]))
    return found
