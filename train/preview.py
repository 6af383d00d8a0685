"""Draw fixed prompts during training, because the loss alone does not show the quality of the pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn

from checkpoints.files import replacing
from model.adapter import IPAdapter
from sampling.images import to_images
from sampling.pipeline import Pipeline
from train.album import Album
from train.display import Draw
from train.world import World, caption, pictures

ROWS, COLUMNS = 4, 8


def _grid(images: list[Image.Image], columns: int) -> Image.Image:
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def _write(image: Image.Image, path: Path) -> None:
    with replacing(path) as part:
        image.save(part, "PNG")


def draw_captions(pipeline: Pipeline, path: Path) -> None:
    """Draw the captions of the first validation scenes; write the sheet and the captions."""
    prompts = [World("val")[i].caption for i in range(ROWS * COLUMNS)]
    drawings = pipeline.sample(prompts, list(range(len(prompts))), guidance=4.0, steps=12)
    _write(_grid(to_images(drawings), COLUMNS), path)
    with replacing(path.with_suffix(".txt")) as part:
        part.write_text("\n".join(prompts) + "\n")


def draw_image_prompts(pipeline: Pipeline, path: Path) -> None:
    """Draw one row per image prompt: the prompt, two variations, and drawings with a text at lambda 0.4, 0.6, 0.8 and 1."""
    scales, cells = [1.0, 1.0, 0.4, 0.6, 0.8, 1.0], []
    for i in range(ROWS):
        prompt = Image.fromarray(pictures([World("val")[i]])[0])
        text = ["", "", *[caption("fox", None, "pink")] * 4]
        lam = torch.tensor(scales).view(-1, 1, 1, 1)
        drawings = pipeline.sample(text, [0, 1, 0, 0, 0, 0], pipeline.embed([prompt]), scale=lam, guidance=4.0, steps=12)
        cells += [prompt, *to_images(drawings)]
    _write(_grid(cells, 1 + len(scales)), path)


def own_pictures(pipeline: Pipeline, files: Album, precision: Callable[[], AbstractContextManager[Any]]) -> Draw:
    """Return a function that draws a sheet with an adapter, in this precision.

    A row shows one of the first pictures: the image prompt, two variations, and a drawing with its caption at lambda 0.6.
    """

    def draw(adapter: nn.Module, path: Path) -> None:
        assert isinstance(adapter, IPAdapter)
        cells, (height, width), own = list[Image.Image](), pipeline.native_size, replace(pipeline, adapters=(adapter,))
        for i in range(min(ROWS, len(files))):
            prompt, lam = files[i].open(), torch.tensor([1.0, 1.0, 0.6]).view(-1, 1, 1, 1)
            with precision():
                drawings = own.sample(["", "", files[i].text], [0, 1, 0], own.embed([prompt]), scale=lam, steps=20)
            cells += [ImageOps.fit(prompt, (width, height)), *to_images(drawings)]
        with replacing(path) as part:
            _grid(cells, 4).save(part, "PNG")

    return draw
