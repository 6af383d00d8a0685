"""Stable Diffusion: a folder of diffusers or of our own, or a single file; its UNet and its VAE alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoints import configs, ldm
from checkpoints.base import Base
from checkpoints.cards import load, module_from_card
from checkpoints.clip import load_text_encoder
from checkpoints.files import read_json_if_there, replacing_in, write_json, write_tensors
from checkpoints.fill import assemble
from checkpoints.folders import folder_of, has_config, module_from_config, weights_in
from checkpoints.names import named, unet_rows, vae_rows
from checkpoints.reader import File
from checkpoints.single_file import LDM, load_ldm_vae, load_single, single_unet_config
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig


def scheduler_file(path: Path) -> Path:
    """Where the schedule of a base model is: in the scheduler's folder, or for a single file in the `.yaml` beside it."""
    return (ldm.yaml_beside(path) or path) if path.is_file() else path / "scheduler" / "scheduler_config.json"


def scheduler_config(path: Path) -> dict[str, Any]:
    """The schedule of a base model as diffusers writes it, {} where no file describes it."""
    return dict(ldm.settings_beside(path).scheduler) if path.is_file() else read_json_if_there(scheduler_file(path))


def _unet_from_config(folder: Path) -> UNet:
    prediction = scheduler_config(folder.parent).get("prediction_type", "epsilon")
    return module_from_config(folder, UNet, lambda config: configs.unet_config(config, prediction), "a UNet")


def unet_config(path: Path) -> UNetConfig:
    """The config of a base model's UNet, without its weights: from its card, its `config.json`, or a single file's header.

    Raises what `load_base` does where that does not describe one.
    """
    if path.is_file():
        return single_unet_config(path)
    if (path / "unet").is_dir():
        return _unet_from_config(path / "unet").config
    return module_from_card(path / "unet.safetensors", UNet, UNetConfig).config


def load_unet(path: Path, dtype: torch.dtype | None = torch.float32) -> UNet:
    """A UNet: a file of our own, or a diffusers folder or its file of weights. Whether it predicts v stands in the scheduler's
    folder beside it."""
    if not has_config(path):
        return load(path, UNet, UNetConfig, dtype)
    unet = _unet_from_config(folder_of(path))
    names = named(unet.state_dict(), unet_rows(unet.config), 1)
    return assemble(unet, names, weights_in(path), "the UNet of its config.json", dtype)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")


def load_vae(path: Path, dtype: torch.dtype | None = torch.float32) -> VAE:
    """An autoencoder: a file of our own; a diffusers folder or its file of weights, older names of its attention included; or a
    file in LDM's layout, of the autoencoder alone or of a whole base model."""
    if path.is_file() and not path.with_suffix(".json").is_file() and (file := as_ldm_vae(File(path))):
        return load_ldm_vae(file, ldm.settings_beside(path), "a VAE in LDM's layout", dtype)
    if not has_config(path):
        return load(path, VAE, VAEConfig, dtype)
    vae, file = module_from_config(folder_of(path), VAE, configs.vae_config, "a VAE"), weights_in(path)
    file = file.renamed({_OLD.sub(lambda m: _OLD_ATTENTION[m[0]], name): name for name in file})
    names = named(vae.state_dict(), vae_rows(vae.config), 1)
    return assemble(vae, names, file, "the VAE of its config.json", dtype)


def as_ldm_vae(file: File) -> File | None:
    """The autoencoder's tensors in a file of LDM's layout; None in another."""
    part = file.part(LDM["vae"]) or file
    return part if any(name.startswith("decoder.mid.block_1.") for name in part) else None


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
        base = load_single(path, dtype, vae=other)
    else:
        unet = load_unet(path / f"unet{end}", dtype)
        base = Base(
            unet, other or load_vae(path / f"vae{end}", dtype), load_text_encoder(path / f"text_encoder{end}", dtype)
        )
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
    with replacing_in(folder) as part:
        write_tensors(part / "diffusion_pytorch_model.safetensors", tensors, dtype)
        write_json(part / "config.json", config)
