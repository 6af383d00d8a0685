"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from base_files import base, folder, own_folder, single
from peers import SMALL_UNETS, UNetPair, unet_pair
from PIL import Image
from tiny import write_weights

__all__ = ["base", "folder", "own_folder", "single"]  # fixtures

# Small networks are fastest on one thread, and `make test` has a process for each core.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start


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


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny weights. Shared: a test that changes it makes its own copy."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is not square: red on the left, then a gradient."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :12, 0] = 255
    pixels[:, 12:] = np.linspace(0, 255, 36)[None, :, None]
    path = tmp_path_factory.mktemp("images") / "wide.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "blue.png"
    Image.new("RGB", (20, 20), "blue").save(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, Path]:
    """A picture of 24 x 16 pixels, and its mask: black on the left, white on the right."""
    folder = tmp_path / "photo"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.zeros((16, 24), np.uint8)
    mask[:, 12:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "photo.png", folder / "mask.png"
