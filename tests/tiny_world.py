"""A folder of tiny random weights that draw pictures of the mini world's size, with a judge and the shipped second CLIP."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tiny import IMAGE, TEXT, UNET, VAE_CONFIG

from checkpoints import cards
from model.image_encoder import ImageEncoder
from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE
from train.judge import Judge


def write_world(folder: Path) -> Path:
    """A base without an adapter, whose pictures have 64 x 64 pixels, and a judge."""
    torch.manual_seed(0)
    parts = {
        "unet": UNet(replace(UNET, sample_size=16)),
        "vae": VAE(VAE_CONFIG),
        "text_encoder": TextEncoder(TEXT),
        "image_encoder": ImageEncoder(replace(IMAGE, image_size=64, patch=16)),
        "judge": Judge(),
    }
    for name, module in parts.items():
        cards.save(module, folder / f"{name}.safetensors", {"command": "a test"})
    for file in (Path(__file__).parent.parent / "weights").glob("score_*"):
        shutil.copy(file, folder)
    return folder
