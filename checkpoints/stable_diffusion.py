"""Load Stable Diffusion, or its UNet or VAE, from a diffusers folder, a single file, or this project's own format."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints import configs, ldm
from checkpoints.base import Base
from checkpoints.cards import load, module_from_card
from checkpoints.clip import load_text_encoder
from checkpoints.files import read_json_if_there
from checkpoints.fill import assemble
from checkpoints.folders import folder_of, has_config, module_from_config, weights_in
from checkpoints.names import map_names, unet_rows, vae_rows
from checkpoints.reader import File
from checkpoints.single_file import (
    LDM,
    load_ldm_vae,
    load_single,
    single_settings,
    single_unet_config,
    upcast,
)
from model.text_encoder import Text, TextEncoderPair
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from model.words import Prediction


def scheduler_file(path: Path) -> Path:
    """Return the file that describes a base model's noise schedule: for a single file the `.yaml` beside it."""
    return (ldm.yaml_beside(path) or path) if path.is_file() else path / "scheduler" / "scheduler_config.json"


_OTHERS = {"StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux", "StableCascade": "Stable Cascade", "PixArt": "PixArt"}


def check_folder(path: Path) -> None:
    """Raise ValueError if a diffusers folder holds a model that can't be drawn with, and say which one."""
    kind = str(read_json_if_there(path / "model_index.json").get("_class_name", ""))
    other = next((name for start, name in _OTHERS.items() if kind.startswith(start)), "")
    if kind.startswith("StableDiffusionXL") and not (path / "text_encoder").exists():
        other = "the refiner of Stable Diffusion XL"
    if other:
        raise ValueError(f"{path} is {other}; a base model can be Stable Diffusion 1.x, 2.x or XL: use one of these")


def scheduler_config(path: Path) -> dict[str, Any]:
    """Return the noise schedule of a base model in diffusers' format; {} if no file describes it."""
    check_folder(path)
    return dict(single_settings(path).scheduler) if path.is_file() else read_json_if_there(scheduler_file(path))


def _unet_from_config(folder: Path) -> UNet:
    prediction = scheduler_config(folder.parent).get("prediction_type", "epsilon")
    return module_from_config(folder, UNet, lambda config: configs.unet_config(config, prediction), "a UNet")


def unet_config(path: Path) -> UNetConfig:
    """Return the config of a base model's UNet, without loading its weights.

    It comes from a card, a `config.json` or the shapes in a single file. Raises ValueError or OSError, as `load_base`
    does.
    """
    if path.is_file():
        return single_unet_config(path)
    check_folder(path)
    if (path / "unet").is_dir():
        return _unet_from_config(path / "unet").config
    return module_from_card(path / "unet.safetensors", UNet, UNetConfig).config


def load_unet(path: Path, dtype: torch.dtype | None = torch.float32) -> UNet:
    """Load a UNet from a file in this project's own format, or from a diffusers folder or the file of weights in it.

    In a diffusers folder, the scheduler's folder beside it says whether the UNet predicts epsilon or v.
    """
    if not has_config(path):
        return load(path, UNet, UNetConfig, dtype)
    unet = _unet_from_config(folder_of(path))
    names = map_names(unet.state_dict(), unet_rows(unet.config), 1)
    return assemble(unet, names, weights_in(path), "the UNet of its config.json", dtype)


_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_NAMES)})(?=\.)")


def load_vae(path: Path, dtype: torch.dtype | None = torch.float32, settings: ldm.Settings = ldm.SD1) -> VAE:
    """Load a VAE. One whose activations exceed float16 is loaded in float32 in its place.

    `path`: a file in this project's own format, a diffusers folder or the file of weights in it, or a file in LDM's
    layout that holds a VAE or a whole base model. Accepts the names that older versions of diffusers gave the
    attention. `settings`: what a file in LDM's layout does not say, such as the scale of SDXL's latents.
    """
    if path.is_file() and not path.with_suffix(".json").is_file() and (file := as_ldm_vae(File(path))):
        return load_ldm_vae(file, ldm.settings_beside(path, settings), "a VAE in LDM's layout", dtype)
    if not has_config(path):
        return load(path, VAE, VAEConfig, upcast(module_from_card(path, VAE, VAEConfig).config, dtype))
    vae, file = module_from_config(folder_of(path), VAE, configs.vae_config, "a VAE"), weights_in(path)
    file = file.rename({_OLD_NAME.sub(lambda m: _OLD_NAMES[m[0]], name): name for name in file})
    names = map_names(vae.state_dict(), vae_rows(vae.config), 1)
    return assemble(vae, names, file, "the VAE of its config.json", upcast(vae.config, dtype))


def as_ldm_vae(file: File) -> File | None:
    """Return the tensors of the VAE in a file in LDM's layout; None for other files."""
    part = file.part(LDM["vae"]) or file
    return part if any(name.startswith("decoder.mid.block_1.") for name in part) else None


def load_base(
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    prediction: Prediction | None = None,
    vae: Path | None = None,
) -> Base:
    """Load Stable Diffusion 1.x, 2.x or XL from a single file, a diffusers folder, or a folder in this project's own format.

    `prediction` overrides what the files say the UNet predicts. `vae` replaces the model's own VAE. Raises
    FileNotFoundError, and ValueError when a file is not supported or the parts do not fit together.
    """
    check_folder(path)
    settings = ldm.SDXL if vae and unet_config(path).added_dim else ldm.SD1
    own_vae = load_vae(vae, dtype, settings) if vae else None
    if path.is_file():
        base = load_single(path, dtype, vae=own_vae, prediction=prediction)
    else:
        end = "" if (path / "unet").is_dir() else ".safetensors"
        unet = load_unet(path / f"unet{end}", dtype)
        base = Base(unet, own_vae or load_vae(path / f"vae{end}", dtype), _load_texts(path, end, dtype))
    if prediction:
        base.unet.config = replace(base.unet.config, prediction=prediction)
    _check_fit(base, path)
    return base


def _load_texts(path: Path, end: str, dtype: torch.dtype | None) -> Text:
    first = load_text_encoder(path / f"text_encoder{end}", dtype)
    second = path / f"text_encoder_2{end}"
    return TextEncoderPair(first, load_text_encoder(second, dtype)).eval() if second.exists() else first


def _check_fit(base: Base, path: Path) -> None:
    unet, vae, text = base.unet.config, base.vae.config, base.text
    if unet.in_channels not in (vae.latent_channels, 2 * vae.latent_channels + 1):  # latents, or latents, a mask and the masked latents
        raise ValueError(
            f"{path} has a UNet that reads {unet.in_channels} channels, but its VAE gives {vae.latent_channels}: "
            "only ordinary and inpainting models are supported"
        )
    if unet.context_dim != text.width:
        raise ValueError(
            f"{path} has a UNet that reads text tokens of width {unet.context_dim}, but its text encoder gives {text.width}"
        )
    if unet.added_dim:
        pooled = text.second.config.output_dim if isinstance(text, TextEncoderPair) else text.config.output_dim
        if not pooled or unet.added_dim != pooled + 6 * unet.added_time_dim:
            raise ValueError(
                f"{path} has a UNet with an added vector of width {unet.added_dim}, but its text encoder and six sizes give "
                f"{pooled} + {6 * unet.added_time_dim}: only the base model of Stable Diffusion XL is supported"
            )
