"""Stable Diffusion: a folder of diffusers or of our own, or a single file; each of its networks alone; CLIP's image tower."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoints import configs
from checkpoints.base import Base
from checkpoints.cards import load, module_from_card
from checkpoints.files import naming, read_json, read_json_if_there, write_json, write_tensors
from checkpoints.fill import M, assemble, empty_module
from checkpoints.names import image_names, named, text_names, unet_rows, vae_rows
from checkpoints.reader import File
from checkpoints.single_file import LDM, load_single, open_single
from model.image_encoder import ImageConfig, ImageEncoder
from model.text_encoder import TextConfig, TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's config in the folder of a base model, {} where there is none."""
    return read_json_if_there(folder / "scheduler" / "scheduler_config.json")


def module_from_config(
    folder: Path, module: Callable[[Any], M], config: Callable[[dict[str, Any]], Any], what: str
) -> M:
    """The empty module that a folder's `config.json` describes."""
    with naming(folder / "config.json", f"is not the config of {what} that is read"):
        return empty_module(module, config(read_json(folder / "config.json")))


def weights_in(folder: Path) -> File:
    """The weights in a folder of diffusers or transformers."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    names = [f"{stem}{variant}{end}" for end in (".safetensors", ".bin") for variant in ("", ".fp16") for stem in stems]
    for name in names:
        if (folder / name).exists():
            return File(folder / name)
    raise FileNotFoundError(f"{folder} holds no weights, neither {names[0]} nor {names[1]} nor their .bin")


def _unet_from_config(folder: Path) -> UNet:
    prediction = scheduler_config(folder.parent).get("prediction_type", "epsilon")
    return module_from_config(folder, UNet, lambda config: configs.unet_config(config, prediction), "a UNet")


def unet_config(path: Path) -> UNetConfig:
    """The config of a base model's UNet, without its weights: from its card, its `config.json`, or a single file's header.

    Raises what `load_base` does where that does not describe one.
    """
    if path.is_file():
        with naming(path, "is not a complete Stable Diffusion 1.x checkpoint"):
            return configs.ldm_unet(open_single(path).part(LDM["unet"]).shapes)
    if (path / "unet").is_dir():
        return _unet_from_config(path / "unet").config
    return module_from_card(path / "unet.safetensors", UNet, UNetConfig).config


def load_unet(path: Path, dtype: torch.dtype | None = torch.float32) -> UNet:
    """A UNet: a file of our own, or a diffusers folder (whether it predicts v stands in the scheduler's folder beside it)."""
    if not path.is_dir():
        return load(path, UNet, UNetConfig, dtype)
    unet = _unet_from_config(path)
    names = named(unet.state_dict(), unet_rows(unet.config), 1)
    return assemble(unet, names, weights_in(path), "the UNet of its config.json", dtype)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_vae(path: Path, dtype: torch.dtype | None = torch.float32) -> VAE:
    """An autoencoder: a file of our own, or a diffusers folder, older names of its attention included."""
    if not path.is_dir():
        return load(path, VAE, VAEConfig, dtype)
    vae, file = module_from_config(path, VAE, configs.vae_config, "a VAE"), weights_in(path)
    old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")
    file = file.renamed({old.sub(lambda m: _OLD_ATTENTION[m[0]], name): name for name in file})
    names = named(vae.state_dict(), vae_rows(vae.config), 1)
    return assemble(vae, names, file, "the VAE of its config.json", dtype)


def load_text_encoder(path: Path, dtype: torch.dtype | None = torch.float32) -> TextEncoder:
    """A text tower: a file of our own, or a folder in transformers' layout with the tokenizer's folder beside it."""
    if not path.is_dir():
        return load(path, TextEncoder, TextConfig, dtype)
    tokenizer, words = path.parent / "tokenizer", None
    with naming(tokenizer, "is not a tokenizer that is read"):
        if (tokenizer / "vocab.json").exists():
            words = read_json(tokenizer / "vocab.json")
        elif (tokenizer / "tokenizer.json").exists():
            words = read_json(tokenizer / "tokenizer.json")["model"]["vocab"]
        pad = configs.pad_token(words, read_json_if_there(tokenizer / "tokenizer_config.json"))
    text = module_from_config(path, TextEncoder, lambda config: configs.text_config(config, pad), "a text encoder")
    file = weights_in(path)
    prefix = "text_model." if any(name.startswith("text_model.") for name in file) else ""
    names = text_names(text.state_dict(), text.config, prefix)
    return assemble(text, names, file, "the text encoder of its config.json", dtype)


def load_image_encoder(path: Path, dtype: torch.dtype | None = torch.float32) -> ImageEncoder:
    """An image tower: a file of our own, or a folder in transformers' layout."""
    if not path.is_dir():
        return load(path, ImageEncoder, ImageConfig, dtype)
    image = module_from_config(path, ImageEncoder, configs.image_config, "an image encoder")
    names = image_names(image.state_dict(), image.config)
    return assemble(image, names, weights_in(path), "the image encoder of its config.json", dtype)


def load_base(
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    prediction: Literal["epsilon", "v"] | None = None,
    vae: Path | None = None,
) -> Base:
    """A base model: Stable Diffusion 1.x as a single file, a diffusers folder, or a folder of our own.

    `prediction` says what the UNet predicts, whatever its files say; `vae` is taken in place of the model's own. Raises
    ValueError when its parts do not fit together.
    """
    end = "" if (path / "unet").is_dir() else ".safetensors"
    other = load_vae(vae, dtype) if vae else None
    if path.is_file():
        single = load_single(path, dtype)
        base = replace(single, vae=other or single.vae)
    else:
        unet = load_unet(path / f"unet{end}", dtype)
        own = other or load_vae(path / f"vae{end}", dtype)
        base = Base(unet, own, load_text_encoder(path / f"text_encoder{end}", dtype))
    if prediction:
        base.unet.config = replace(base.unet.config, prediction=prediction)
    _check_fit(base, path)
    return base


def _check_fit(base: Base, path: Path) -> None:
    unet, vae, text = base.unet.config, base.vae.config, base.text.config
    if unet.in_channels not in (vae.latent_channels, 2 * vae.latent_channels + 1):  # alone, or with a mask to inpaint
        raise ValueError(
            f"{path} has a UNet that reads {unet.in_channels} channels, where its VAE gives {vae.latent_channels}: "
            "only ordinary models and those for inpainting are read"
        )
    if unet.context_dim != text.width:
        raise ValueError(
            f"{path} has a UNet that reads a text of width {unet.context_dim}, where its text encoder gives {text.width}"
        )


_AROUND = re.compile(r"attn\.proj_(in|out)\.weight$")


def save_diffusers(unet: UNet, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a UNet, its `config.json` and weights, as a folder that diffusers' `UNet2DConditionModel.from_pretrained` loads.

    Whether it predicts epsilon or v is no part of such a folder: diffusers has that in the pipeline's scheduler.
    """
    config, state = configs.diffusers_config(unet.config), unet.state_dict()
    names = named(state, unet_rows(unet.config), 1)
    turn = not config["use_linear_projection"]
    tensors = {names[k][0]: v[:, :, None, None] if turn and _AROUND.search(k) else v for k, v in state.items()}
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, dtype)
    write_json(folder / "config.json", config)
