"""Small relatives of the base models, as files on disk and as pipelines of diffusers, and what diffusers draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from peers import clip_tokenizer, clip_words, randn, text_pair, unet_pair, vae_pair, vision_pair
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.image_encoder import ImageConfig
from model.text_encoder import TextConfig
from model.unet import UNetConfig
from model.vae import VAEConfig

# As Stable Diffusion 1.5 ships it.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


# As Stable Diffusion XL ships it.
EULER = SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class Small:
    """A small relative of a base model, the image encoder of its adapters, and the side of its pictures in latents."""

    unet: UNetConfig
    linear: bool
    text: TextConfig
    vae: VAEConfig
    image: ImageConfig
    pad: str = "<|endoftext|>"
    side: int = 8
    text_2: TextConfig | None = None  # SDXL's second text encoder


BASES = {
    "sd15": Small(
        UNetConfig(channels=(16, 32, 32), depth=(1, 1, 0), heads=(4, 4, 4), res_blocks=1, context_dim=24, groups=4),
        False,
        TextConfig(width=24, layers=2, heads=3),
        VAEConfig(channels=(8, 16), res_blocks=1, groups=4),
        ImageConfig(image_size=32, patch=8, width=24, layers=(2,), heads=3, mlp_ratio=3.0, output_dim=20),
    ),
    "wide": Small(
        UNetConfig(channels=(24, 48), depth=(1, 1), heads=(2, 2), context_dim=20, groups=8),
        False,
        TextConfig(width=20, layers=3, heads=5),
        VAEConfig(channels=(8, 8, 16), res_blocks=2, groups=2, scale=0.3),
        ImageConfig(image_size=28, patch=7, width=32, layers=(1,), heads=4, activation="quick_gelu", output_dim=12),
    ),
    "sd21": Small(
        UNetConfig(
            channels=(16, 32),
            depth=(1, 2),
            mid_depth=2,
            heads=(2, 4),
            res_blocks=1,
            context_dim=32,
            groups=4,
            prediction="v",
        ),
        True,
        TextConfig(width=32, layers=2, heads=2, activation="gelu"),
        VAEConfig(channels=(8, 16), res_blocks=1, groups=4),
        ImageConfig(image_size=32, patch=16, width=16, layers=(2,), heads=2, output_dim=24),
        pad="!",
    ),
    "sdxl": Small(
        UNetConfig(
            channels=(16, 32, 32),
            depth=(0, 1, 2),
            mid_depth=2,
            heads=(2, 4, 4),
            context_dim=44,
            groups=4,
            added_dim=6 * 8 + 10,
            added_time_dim=8,
        ),
        True,
        TextConfig(width=24, layers=3, heads=3),
        VAEConfig(channels=(8, 16), res_blocks=1, groups=4, scale=0.13025, force_upcast=True),
        ImageConfig(image_size=32, patch=16, width=16, layers=(2,), heads=2, output_dim=24),
        text_2=TextConfig(width=20, layers=2, heads=2, output_dim=10, activation="gelu", pad=0),
    ),
}


def save_tokenizer(folder: Path, pad: str, official: bool) -> None:
    """As the released models have it, or as transformers writes it today."""
    if official:
        words, merges = clip_words()
        settings = {"model_max_length": 77, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        clip_tokenizer(pad).save_pretrained(folder)


def adapter(unet: Any, image_dim: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """A random adapter in the official layout, counted over the peer's own processors."""
    width, n = unet.config.cross_attention_dim, 0

    def weight(*shape: int, size: float = 1.0) -> Tensor:
        nonlocal n
        n += 1
        return size * randn(*shape, seed=100 * seed + n, dtype=torch.float32)

    projection = {
        "proj.weight": weight(4 * width, image_dim, size=image_dim**-0.5),
        "proj.bias": weight(4 * width, size=0.3),
        "norm.weight": 1 + weight(width, size=0.3),
        "norm.bias": weight(width, size=0.3),
    }
    layers = {}
    for i, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            dim = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            layers[f"{i}.to_k_ip.weight"] = weight(dim, width, size=2 * width**-0.5)
            layers[f"{i}.to_v_ip.weight"] = weight(dim, width, size=width**-0.5)
    return {"image_proj": projection, "ip_adapter": layers}


def flat(nested: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, tensors in nested.items() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Model:
    """What lies on disk, and diffusers' pipelines of it: for text alone, with one adapter and with two."""

    base: Path
    adapters: tuple[Path, Path]
    encoder: Path
    peers: tuple[Any, Any, Any]


def build(root: Path, name: str) -> Model:
    small = BASES[name]
    base, models = root / "base", root / "IP-Adapter" / "models"
    unet = unet_pair(small.unet, small.linear, seed=1).peer.float()
    unet.register_to_config(sample_size=small.side)
    unet.save_pretrained(base / "unet")
    vae_pair(small.vae, seed=2)[0].float().save_pretrained(base / "vae")
    text_pair(small.text)[0].float().save_pretrained(base / "text_encoder")
    if small.text_2:
        text_pair(small.text_2)[0].float().save_pretrained(base / "text_encoder_2")
        save_tokenizer(base / "tokenizer_2", "!", official=True)
    vision_pair(small.image)[0].float().save_pretrained(models / "image_encoder")
    save_tokenizer(base / "tokenizer", small.pad, official=name == "sd15")
    v = {"prediction_type": "v_prediction"} if small.unet.prediction == "v" else {}
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps((EULER if small.text_2 else SCHEDULER) | v))
    parts = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "PNDMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    if small.text_2:
        parts |= {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
        parts |= {"scheduler": "EulerDiscreteScheduler"}
    library = {part: "transformers" if kind.startswith("CLIP") else "diffusers" for part, kind in parts.items()}
    whole = "StableDiffusionXLPipeline" if small.text_2 else "StableDiffusionPipeline"
    index = {"_class_name": whole} | {part: [library[part], kind] for part, kind in parts.items()}
    (base / "model_index.json").write_text(json.dumps(index))
    torch.save(adapter(unet, small.image.output_dim, 3), models / "a.bin")
    save_file(flat(adapter(unet, small.image.output_dim, 4)), models / "b.safetensors")

    def peer(*weights: str) -> Any:
        size = small.image.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        pipe: Any
        if small.text_2:
            pipe = StableDiffusionXLPipeline.from_pretrained(base, feature_extractor=processor, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, feature_extractor=processor)
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if weights:
            pipe.load_ip_adapter(models.parent, subfolder="models", weight_name=list(weights))
        return pipe

    peers = peer(), peer("a.bin"), peer("a.bin", "b.safetensors")
    return Model(base, (models / "a.bin", models / "b.safetensors"), models / "image_encoder", peers)


@dataclass(frozen=True)
class Ask:
    """What to draw. `images`: for each adapter the numbers of its pictures, and lambda in `scales`."""

    prompt: str = ""
    negative: str = ""
    images: Sequence[Sequence[int]] = ()
    scales: Sequence[float] = ()
    steps: int = 5
    guidance: float = 7.5
    eta: float = 0.0
    num: int = 1
    size: tuple[int | None, int | None] = (24, 40)  # without: what the base was trained at
    seed: int = 11


def theirs(model: Model, ask: Ask, pictures: list[Path]) -> np.ndarray:
    """What diffusers draws, picture i with a CPU generator of seed + i."""
    pipe, prompts = model.peers[len(ask.images)], {}
    if ask.images:
        pipe.set_ip_adapter_scale(list(ask.scales))
        opened = [[Image.open(pictures[i]).convert("RGB") for i in numbers] for numbers in ask.images]
        prompts = {"ip_adapter_image": opened}
    drawn = pipe(
        [ask.prompt] * ask.num,
        negative_prompt=[ask.negative] * ask.num,
        height=ask.size[0],
        width=ask.size[1],
        num_inference_steps=ask.steps,
        guidance_scale=ask.guidance,
        eta=ask.eta,
        generator=[torch.Generator().manual_seed(ask.seed + i) for i in range(ask.num)],
        **prompts,
    ).images
    return np.stack([np.asarray(image).astype(int) for image in drawn])
