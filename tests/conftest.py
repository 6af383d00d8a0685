"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from peers import SMALL_UNETS, UNetPair, unet_pair
from PIL import Image


@pytest.fixture(scope="session")
def pair() -> Callable[[str], UNetPair]:
    """A small UNet and diffusers' with the same weights, by name. Both are shared: a test that changes one makes its own."""
    made: dict[str, UNetPair] = {}

    def get(name: str) -> UNetPair:
        if name not in made:
            made[name] = unet_pair(*SMALL_UNETS[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Image prompts that are not square."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate([(61, 40), (33, 70), (50, 50)]):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return sorted(folder.iterdir())
