"""Write networks and whole base models as folders that diffusers and transformers load with `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints import configs
from checkpoints.base import Base
from checkpoints.files import replacing_in, write_json
from checkpoints.folders import write_diffusers
from checkpoints.names import image_names, map_names, text_names, unet_rows, vae_rows
from model.image_encoder import ImageConfig, ImageEncoder
from model.text_encoder import END, START, TextConfig, TextEncoder, TextEncoderPair, merges, vocabulary
from model.unet import UNet
from model.vae import VAE, VAEConfig

SCHEDULER = {  # what a base model without a scheduler file is drawn with: DDIM on the schedule of SD 1.5
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def vae_settings(config: VAEConfig) -> dict[str, Any]:
    """Convert the config of a VAE to the entries of diffusers' `AutoencoderKL`. Inverse of `configs.vae_config`."""
    levels = len(config.channels)
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": config.channels,
        "layers_per_block": config.res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
        "force_upcast": config.force_upcast,
    }


def text_settings(config: TextConfig) -> dict[str, Any]:
    """Convert the config of a text encoder to the entries of transformers' `CLIPTextConfig`, without the vocabulary."""
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.output_dim or 512,
        "hidden_act": config.activation,
    }


def vision_settings(config: ImageConfig) -> dict[str, Any]:
    """Convert the config of an image encoder to the entries of transformers' `CLIPVisionConfig`."""
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers[0],
        "num_attention_heads": config.heads,
        "patch_size": config.patch,
        "image_size": config.image_size,
        "projection_dim": config.output_dim,
        "hidden_act": config.activation,
    }


def save_unet(unet: UNet, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a UNet's config and weights to a folder that diffusers' `UNet2DConditionModel.from_pretrained` can load.

    Such a folder does not say whether the UNet predicts epsilon or v; in diffusers, the pipeline's scheduler does.
    Raises OSError when a file can't be written, and ValueError when a value is too large for `dtype` or diffusers has
    no such UNet. So do the other functions here.
    """
    names = map_names(unet.state_dict(), unet_rows(unet.config), 1)
    write_diffusers(unet, names, configs.diffusers_config(unet.config), folder, dtype)


def save_vae(vae: VAE, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a VAE to a folder for diffusers' `AutoencoderKL`."""
    names = map_names(vae.state_dict(), vae_rows(vae.config), 1)
    write_diffusers(vae, names, {"_class_name": "AutoencoderKL"} | vae_settings(vae.config), folder, dtype)


def save_text(text: TextEncoder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a text encoder to a folder for transformers' `CLIPTextModel`, or `CLIPTextModelWithProjection` if it has a projection."""
    config = text.config
    if config.vocabulary or config.skip or not config.final_norm:
        raise ValueError(
            "transformers has no text encoder with a reduced vocabulary, or that leaves out its last layers, so diffusers can't use it"
        )
    kind = "CLIPTextModelWithProjection" if config.output_dim else "CLIPTextModel"
    rest = {"vocab_size": config.vocab_size, "max_position_embeddings": config.context_length, "bos_token_id": START, "eos_token_id": END}
    settings = {"architectures": [kind], "model_type": "clip_text_model", "pad_token_id": config.pad} | rest | text_settings(config)
    write_diffusers(text, text_names(text.state_dict(), config), settings, folder, dtype, "model")


def save_image(image: ImageEncoder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save an image encoder, a ViT, to a folder for transformers' `CLIPVisionModelWithProjection`."""
    if image.config.kind != "vit":
        raise ValueError("transformers has no CLIP image encoder that is a ResNet: convert it without --diffusers")
    settings = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"} | vision_settings(image.config)
    write_diffusers(image, image_names(image.state_dict(), image.config), settings, folder, dtype, "model")


def save_tokenizer(pad: int, folder: Path) -> None:
    """Write CLIP's tokenizer with this padding token, for transformers' `CLIPTokenizer`."""
    words = {word: token for word, token in vocabulary().items() if token < START} | {"<|startoftext|>": START, "<|endoftext|>": END}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = next(word for word, token in words.items() if token == pad)
    with replacing_in(folder) as part:
        write_json(part / "vocab.json", words)
        (part / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges()), ""]), encoding="utf-8")
        write_json(part / "special_tokens_map.json", special)
        write_json(part / "tokenizer_config.json", special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})


def save_pipeline(base: Base, scheduler: Mapping[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a base model to a folder for diffusers' `StableDiffusionPipeline`, or the one for SDXL or inpainting.

    `scheduler`: the contents of its `scheduler_config.json`; an empty one becomes DDIM, our default, on the schedule of SD 1.5.
    The folder names no safety checker.
    """
    v = base.unet.config.prediction == "v"
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False, **(scheduler or SCHEDULER)}
    xl = isinstance(base.text, TextEncoderPair)
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": scheduler["_class_name"]}
    texts = {"": base.text.first, "_2": base.text.second} if isinstance(base.text, TextEncoderPair) else {"": base.text}
    with replacing_in(folder) as part:
        save_unet(base.unet, part / "unet", dtype)
        save_vae(base.vae, part / "vae", dtype)
        for end, text in texts.items():
            save_text(text, part / f"text_encoder{end}", dtype)
            save_tokenizer(text.config.pad, part / f"tokenizer{end}")
            suffix = "WithProjection" if text.config.output_dim else ""
            parts |= {f"text_encoder{end}": f"CLIPTextModel{suffix}", f"tokenizer{end}": "CLIPTokenizer"}
        write_json(part / "scheduler" / "scheduler_config.json", scheduler | {"prediction_type": "v_prediction" if v else "epsilon"})
        library = {name: "transformers" if kind.startswith("CLIP") else "diffusers" for name, kind in parts.items()}
        inpaints = "Inpaint" if base.unet.config.in_channels > base.vae.config.latent_channels else ""
        index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' if xl else ''}{inpaints}Pipeline", "_diffusers_version": "0.30.0"}
        none = {name: [None, None] for name in ("feature_extractor", "image_encoder", *([] if xl else ["safety_checker"]))}
        other = {"force_zeros_for_empty_prompt": True} if xl else {"requires_safety_checker": False}
        write_json(part / "model_index.json", index | other | none | {name: [library[name], kind] for name, kind in parts.items()})
