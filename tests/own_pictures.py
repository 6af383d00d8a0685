"""A tiny base model and pictures with captions, for tests that train on a user's pictures."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import TEXT, UNET, VAE_CONFIG

from checkpoints import cards
from model.image_encoder import ImageEncoder
from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE
from train import encode
from train.__main__ import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}  # of processes that tests start
IMAGE = replace(tiny.IMAGE, layers=(2,))


def write_base(folder: Path, seed: int = 0) -> Path:
    """A folder of random weights, without an adapter."""
    torch.manual_seed(seed)
    parts = {"unet": UNet(UNET), "vae": VAE(VAE_CONFIG), "text_encoder": TextEncoder(TEXT), "image_encoder": ImageEncoder(IMAGE)}
    for name, module in parts.items():
        cards.save(module, folder / f"{name}.safetensors", {"command": "a test"})
    return folder


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (18, 20, 3), np.uint8))


def write_pictures(folder: Path, n: int = 20, first: int = 0) -> Path:
    """A folder of n different pictures, with captions."""
    folder.mkdir(parents=True)
    for i in range(n):
        picture(first + i).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture {i}")
    return folder


def command(folder: Path, base: Path, *options: Any, stage: str = "adapter") -> list[str]:
    """A short training on the pictures in `folder`/data, as arguments of `python -m train`."""
    named = {"data": folder / "data", "state": folder / "state", "weights": folder / "out", "base": base}
    named |= {"steps": 2, "batch": 4, "side": 16}
    return [str(part) for part in (stage, *(part for k, v in named.items() for part in (f"--{k}", v)), *options)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and the state and result of a finished run on it. It is shared, so tests must use a copy."""
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "data")
    main(command(folder, base))
    return folder


def nothing_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "encode_rows", lambda *_: pytest.fail("pictures were encoded"))
