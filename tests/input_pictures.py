"""Pictures that the tests of whole pipelines read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth blobs of colour, `size` (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)


def mask(size: tuple[int, int], seed: int = 9) -> Image.Image:
    """White, black and every grey in between, different from pixel to pixel."""
    levels = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    levels[:, : size[1] // 3], levels[: size[0] // 3] = 0, 255
    return Image.fromarray(levels)


def write_inputs(folder: Path, size: tuple[int, int], width: int) -> None:
    """Write a hint, an image prompt, and for pictures of `size` one to draw again, its mask, and a mask of attention, white on the left.

    `width`: of the white part. It is made of blocks of the coarsest query, and large enough that diffusers' bicubic filter stays inside.
    """
    picture((33, 70), 1).save(folder / "hint.png")
    picture((30, 44), 5).save(folder / "prompt.png")
    picture(size, 0).save(folder / "init.png")
    mask(size).save(folder / "mask.png")
    left = np.zeros((4 * size[0], 4 * size[1]), np.uint8)
    left[:, :width] = 255
    Image.fromarray(left).save(folder / "left.png")
