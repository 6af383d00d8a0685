"""Stable Diffusion 1.x in one file, in the layout of LDM (CompVis's latent diffusion)."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoints import configs
from checkpoints.base import Base
from checkpoints.files import naming, short_list
from checkpoints.fill import assemble, check, empty_module
from checkpoints.names import named, text_names, unet_rows, vae_rows
from checkpoints.reader import File
from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE

LDM = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}


def single_kind(file: File) -> str:
    """What a single file is, by the names in it."""
    if any(name.startswith("conditioner.embedders.") for name in file):
        return "Stable Diffusion XL"
    if any(name.startswith("cond_stage_model.model.") for name in file):
        return "Stable Diffusion 2.x"
    if any(name.startswith(("control_model.", "controlnet_")) for name in file):
        return "a ControlNet"
    if any("lora" in name for name in file):
        return "a LoRA"
    return "Stable Diffusion 1.x" if any(name.startswith(LDM["unet"]) for name in file) else "not a base model"


def _ema(file: File) -> File:
    """The slow copy in the place of the weights: LDM names it `model_ema.` and the name without its first part and dots."""
    fast = [name for name in file if name.startswith(LDM["unet"])]
    slow = {name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in fast}
    if absent := slow.values() - file.keys():
        raise ValueError(f"{file.path} has no EMA copy of the UNet (it lacks {short_list(absent)})")
    return file.renamed({name: slow.get(name, name) for name in file})


def open_single(path: Path) -> File:
    file = File(path)
    if (kind := single_kind(file)) != "Stable Diffusion 1.x":
        raise ValueError(
            f"{path} is {kind}; of single files only Stable Diffusion 1.x is read (others as diffusers folders)"
        )
    return file


def load_single(path: Path, dtype: torch.dtype | None = torch.float32, ema: bool = False) -> Base:
    """Stable Diffusion 1.x from one file in LDM's layout, `.safetensors` or `.ckpt`; with `ema` the UNet's slow copy."""
    file = _ema(open_single(path)) if ema else open_single(path)
    unet, vae, text = (file.part(prefix) for prefix in LDM.values())
    with naming(path, "is not a complete Stable Diffusion 1.x checkpoint"):
        sizes = configs.ldm_unet(unet.shapes), configs.ldm_vae(vae.shapes), configs.ldm_text(text.shapes)
        empty = empty_module(UNet, sizes[0]), empty_module(VAE, sizes[1]), empty_module(TextEncoder, sizes[2])
    tables = (
        named(empty[0].state_dict(), unet_rows(sizes[0]), 2),
        named(empty[1].state_dict(), vae_rows(sizes[1]), 2),
        text_names(empty[2].state_dict(), sizes[2]),
    )
    what = "a complete Stable Diffusion 1.x checkpoint"
    for module, names, part in zip(empty, tables, (unet, vae, text), strict=True):
        check(module, names, part, what)
    return Base(
        assemble(empty[0], tables[0], unet, what, dtype),
        assemble(empty[1], tables[1], vae, what, dtype),
        assemble(empty[2], tables[2], text, what, dtype),
    )
