"""Load Stable Diffusion 1.x from a single file in the layout of LDM (CompVis's latent diffusion)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoints import ldm
from checkpoints.base import Base
from checkpoints.clip import assemble_text
from checkpoints.files import naming, short_list
from checkpoints.fill import assemble, check, empty_module
from checkpoints.names import named, unet_rows, vae_rows
from checkpoints.reader import File
from model.text_encoder import TextConfig, TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE

LDM = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}
_COMPLETE = "a complete Stable Diffusion 1.x checkpoint"
_T2I = re.compile(r"(adapter\.)?body\.0\.(block1|body\.0|resnets\.0)\.|style_embedding$")


def single_kind(file: File) -> str:
    """The kind of model in a single file, by the names of its tensors."""
    if any(name.startswith(("control_model.", "controlnet_", "input_hint_block.")) for name in file):
        return "a ControlNet"
    if any(_T2I.match(name) for name in file):
        return "a T2I-Adapter"
    if any(name.startswith("conditioner.embedders.") for name in file):
        return "Stable Diffusion XL"
    if any(name.startswith("cond_stage_model.model.") for name in file):
        return "Stable Diffusion 2.x"
    if 2 * sum("lora" in name.lower() for name in file) > len(file):
        return "a LoRA"
    return "Stable Diffusion 1.x" if any(name.startswith(LDM["unet"]) for name in file) else "not a base model"


def _with_ema(file: File) -> File:
    """Replace the UNet's weights with their EMA copy.

    LDM names it `model_ema.` plus the name without `model.` and without dots.
    """
    unet = [name for name in file if name.startswith(LDM["unet"])]
    ema = {name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in unet}
    if missing := ema.values() - file.keys():
        raise ValueError(f"{file.path} has no EMA copy of the UNet: it lacks {short_list(missing)}")
    return file.renamed({name: ema.get(name, name) for name in file})


def open_single(path: Path) -> File:
    """Open a single file. Raises ValueError when it is not Stable Diffusion 1.x."""
    file = File(path)
    if (kind := single_kind(file)) != "Stable Diffusion 1.x":
        raise ValueError(
            f"{path} is {kind}; as a single file only Stable Diffusion 1.x is supported: use a diffusers folder for other models"
        )
    return file


def load_single(
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    ema: bool = False,
    vae: VAE | None = None,
    build: Callable[[TextConfig], TextEncoder] = TextEncoder,
) -> Base:
    """Load Stable Diffusion 1.x from a single `.safetensors` or `.ckpt` file, with the settings of the `.yaml` beside
    it, if any.

    `ema` loads the EMA copy of the UNet. `vae` replaces the file's VAE, which may then be missing. `build` makes the
    text encoder from its config. Raises ValueError when a part is incomplete.
    """
    file, settings = open_single(path), ldm.settings_beside(path)
    file = _with_ema(file) if ema else file
    parts = file.part(LDM["unet"]), file.part(LDM["text"])
    with naming(path, f"is not {_COMPLETE}"):
        unet = empty_module(UNet, ldm.ldm_unet(parts[0].shapes, settings))
        text = empty_module(build, ldm.ldm_text(_without_prefix(parts[1]).shapes))
    names = named(unet.state_dict(), unet_rows(unet.config), 2)
    check(unet, names, parts[0], _COMPLETE)
    return Base(
        vae=vae or load_ldm_vae(file.part(LDM["vae"]), settings, _COMPLETE, dtype),
        text=assemble_text(text, parts[1], _COMPLETE, dtype),
        unet=assemble(unet, names, parts[0], _COMPLETE, dtype),
    )


def single_unet_config(path: Path) -> UNetConfig:
    """The config of the UNet in a single file, without loading its weights."""
    with naming(path, f"is not {_COMPLETE}"):
        return ldm.ldm_unet(open_single(path).part(LDM["unet"]).shapes, ldm.settings_beside(path))


def _without_prefix(text: File) -> File:
    return text.renamed({name.removeprefix("text_model."): name for name in text})


_ATTENTION_NAMES = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_ATTENTION = re.compile(rf"(?<=mid\.attn_1\.)({'|'.join(map(re.escape, _ATTENTION_NAMES))})(?=\.(weight|bias)$)")


def load_ldm_vae(file: File, settings: ldm.Settings, what: str, dtype: torch.dtype | None) -> VAE:
    """Load a VAE under LDM's names. Accepts diffusers' names in its attention, and ignores a loss and an EMA copy."""
    file = file.without(r"loss\.|model_ema\.")
    file = file.renamed({_ATTENTION.sub(lambda m: _ATTENTION_NAMES[m[1]], name): name for name in file})
    with naming(file.path, f"is not {what}"):
        vae = empty_module(VAE, ldm.ldm_vae(file.shapes, settings))
    return assemble(vae, named(vae.state_dict(), vae_rows(vae.config), 2), file, what, dtype)
