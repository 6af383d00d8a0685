"""Draw fixed prompts at every validation, because the loss alone does not show the quality of the pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from sampling.images import to_images
from sampling.pipeline import Pipeline
from train.world import World, caption, pictures

ROWS, COLUMNS = 4, 8


def _grid(images: list[Image.Image], columns: int) -> Image.Image:
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def draw_captions(pipeline: Pipeline, path: Path) -> None:
    """Draw the captions of the first validation scenes; write the sheet and the captions."""
    prompts = [World("val")[i].caption for i in range(ROWS * COLUMNS)]
    drawn = pipeline.sample(prompts, list(range(len(prompts))), guidance=4.0, steps=12)
    _grid(to_images(drawn), COLUMNS).save(path)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


def draw_image_prompts(pipeline: Pipeline, path: Path) -> None:
    """Draw one row per image prompt: the prompt, two variations, and drawings with a text at lambda 0.4, 0.6, 0.8 and 1."""
    scales, cells = [1.0, 1.0, 0.4, 0.6, 0.8, 1.0], []
    for i in range(ROWS):
        prompt = Image.fromarray(pictures([World("val")[i]])[0])
        text = ["", "", *[caption("fox", None, "pink")] * 4]
        lam = torch.tensor(scales).view(-1, 1, 1, 1)
        drawn = pipeline.sample(text, [0, 1, 0, 0, 0, 0], pipeline.embed([prompt]), scale=lam, guidance=4.0, steps=12)
        cells += [prompt, *to_images(drawn)]
    _grid(cells, 1 + len(scales)).save(path)
