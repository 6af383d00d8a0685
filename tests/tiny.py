"""A folder of tiny random weights, and what the command line draws with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from checkpoints import cards
from checkpoints.adapters import save_adapter
from model.adapter import IPAdapter
from model.image_encoder import ImageConfig, ImageEncoder
from model.image_projection import ImageProjection
from model.text_encoder import TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from sampling import __main__ as cli
from train.clip import MINI_TEXT

UNET = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=8, groups=4, sample_size=4)
VAE_CONFIG = VAEConfig(channels=(8, 8, 8), res_blocks=1, groups=4, scale=1.0)
TEXT = replace(MINI_TEXT, width=8, layers=1, heads=2, output_dim=8)
IMAGE = ImageConfig(image_size=16, patch=8, width=8, layers=(1,), heads=2, output_dim=12)
PARTS = ("unet", "vae", "text_encoder", "image_encoder", "ip_adapter")


def loud(module: nn.Module) -> nn.Module:
    """Weights large enough for a prompt to show in 8-bit pixels."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.mul_(2.0)
    return module


def write_weights(folder: Path) -> None:
    """Writes a folder of this project's own layout."""
    torch.manual_seed(0)
    unet = UNet(UNET)
    adapter = IPAdapter(unet, ImageProjection(IMAGE.output_dim, UNET.context_dim, 4))
    modules = (unet, VAE(VAE_CONFIG), TextEncoder(TEXT), ImageEncoder(IMAGE))
    for part, module in zip(PARTS, modules, strict=False):
        cards.save(loud(module), folder / f"{part}.safetensors", {"command": "a test"})
    loud(adapter)
    save_adapter(adapter, unet, folder / "ip_adapter.safetensors", {"command": "a test"})


def draw(weights: Path, out: Path, *options: object) -> np.ndarray:
    """The pixels that the command draws."""
    steps = [] if "--steps" in options else ["--steps", "3"]
    cli.run(["--checkpoint", str(weights), "--out", str(out), *steps, *map(str, options)])
    return pixels_of(out) if out.exists() else np.empty(0)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    """Return the largest difference of two pictures, in grey levels."""
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def again(path: Path, out: Path) -> np.ndarray:
    cli.run(["--again", str(path), "--out", str(out)])
    return pixels_of(out)


def refuses(picture: Path, message: str) -> None:
    before = names(picture.parent)
    with pytest.raises(ValueError, match=message):
        again(picture, picture.parent / "b.png")
    assert names(picture.parent) == before
