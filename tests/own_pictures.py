"""A tiny base model and pictures with captions, for tests that train on a user's pictures."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoints import cards
from model.image_encoder import ImageConfig, ImageEncoder
from model.text_encoder import TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from train.clip import MINI_TEXT

UNET = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=8, groups=4, sample_size=4)
VAE_CONFIG = VAEConfig(channels=(8, 8, 8), res_blocks=1, groups=4, scale=1.0)
TEXT = replace(MINI_TEXT, width=8, layers=1, heads=2, output_dim=8)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}  # of processes that tests start
IMAGE = ImageConfig(image_size=16, patch=8, width=8, layers=(2,), heads=2, output_dim=12)


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
