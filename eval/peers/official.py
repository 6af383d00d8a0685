"""Write random full-size weights in the official layouts, and load the public networks from them, for parity and benchmark.

Our loaders read our networks; diffusers' conversion functions (`convert_ldm_unet_checkpoint` and so on) and transformers read the public
networks from the same files. The weights have peaky attention and are stored in half precision, 3.4 GB in all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints import configs
from checkpoints.diffusers_folder import text_settings, vae_settings, vision_settings
from checkpoints.files import write_json, write_tensors
from checkpoints.names import TRANSPOSED, Names, adapter_names, image_names, map_names, text_names, unet_rows, vae_rows
from checkpoints.single_file import LDM
from model.adapter import IPAdapter
from model.image_encoder import VIT_H, ImageEncoder
from model.image_projection import ImageProjection
from model.text_encoder import SD15_TEXT, TextEncoder
from model.unet import SD15, UNet
from model.vae import SD_VAE, VAE, VAEConfig

SINGLE, ADAPTER, ENCODER = "sd15.safetensors", "ip-adapter_sd15.safetensors", "image_encoder"
_NORM = re.compile(r"(norm\w*|ln_\w+)\.weight$")
_PEAKY = re.compile(r"(to_q|to_k(\.\d+)?|in_proj)[._]weight$")
_CONV = re.compile(r"(attn\.proj_(in|out)|mid\.1\.attn\.\w+)\.weight$")  # 1 x 1 convolutions in a single file


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw a random tensor, scaled to keep activations near 1. Query and key weights are doubled, to make attention peaky."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return (1.0 if _NORM.search(name) else 0.0) + 0.3 * noise
    return noise * (2.0 if _PEAKY.search(name) else 1.0) / math.sqrt(noise[0].numel())


def random_tensors(module: nn.Module, names: Names, prefix: str, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yield random tensors for a module, with the names and shapes of the official file."""
    for name, like in module.state_dict().items():
        value = random_tensor(name, like.shape, generator).half()
        value = value.T if names[name][0] in TRANSPOSED else value
        value = value[:, :, None, None] if _CONV.search(name) else value
        yield from zip((f"{prefix}{n}" for n in names[name]), value.chunk(len(names[name])), strict=True)


def write(folder: Path, seed: int = 0) -> None:
    """Write the base model, the adapter and the image encoder, unless they exist already."""
    if (folder / ENCODER / "config.json").exists():
        return
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        unet, vae, text, image = UNet(SD15), VAE(SD_VAE), TextEncoder(SD15_TEXT), ImageEncoder(VIT_H)
        adapter = IPAdapter(unet, ImageProjection(VIT_H.output_dim, SD15.context_dim))
    tables = (
        map_names(unet.state_dict(), unet_rows(SD15), 2),
        map_names(vae.state_dict(), vae_rows(SD_VAE), 2),
        text_names(text.state_dict(), SD15_TEXT),
    )
    single: dict[str, Tensor] = {}
    for module, names, prefix in zip((unet, vae, text), tables, LDM.values(), strict=True):
        single |= random_tensors(module, names, prefix, g)
    write_tensors(folder / SINGLE, single, None)
    write_tensors(folder / ADAPTER, dict(random_tensors(adapter, adapter_names(adapter.state_dict(), unet), "", g)), None)
    encoder = dict(random_tensors(image, image_names(image.state_dict(), VIT_H), "", g))
    write_tensors(folder / ENCODER / "model.safetensors", encoder, None)
    kind = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}
    write_json(folder / ENCODER / "config.json", kind | vision_settings(VIT_H))


def fill(module: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    module.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _part(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors of the single file whose names start with `prefix`."""
    with safe_open(folder / SINGLE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def peer_unet(folder: Path, dtype: torch.dtype, adapter: bool = True) -> Any:
    """Load diffusers' UNet, with the adapter at lambda 1 unless `adapter` is False."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = configs.diffusers_config(SD15)
    unet = UNet2DConditionModel.from_config(config)
    tensors = convert_ldm_unet_checkpoint(_part(folder, LDM["unet"]), dict(unet.config))
    unet = fill(unet, tensors, dtype)
    return attach_adapter(unet, folder / ADAPTER) if adapter else unet


def attach_adapter(unet: Any, path: Path) -> Any:
    """Load an adapter file into diffusers' UNet, in the dtype of the UNet."""
    return attach_tensors(unet, load_file(path))


def attach_tensors(unet: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Load an adapter, by its official names, into diffusers' UNet, in the dtype of the UNet."""
    groups = ("image_proj", "ip_adapter")
    unet._load_ip_adapter_weights([{g: {n.removeprefix(f"{g}."): t for n, t in tensors.items() if n.startswith(f"{g}.")} for g in groups}])
    return unet.to(unet.dtype)


def peer_autoencoder(config: VAEConfig) -> Any:
    """Build diffusers' autoencoder with these sizes and its default initial weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**vae_settings(config))


def peer_vae(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = peer_autoencoder(SD_VAE)
    tensors = convert_ldm_vae_checkpoint(_part(folder, LDM["vae"]), dict(vae.config))
    return fill(vae, tensors, dtype)


def peer_text(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**text_settings(SD15_TEXT))
    prefix = f"{LDM['text']}text_model."
    tensors = {k.removeprefix(prefix): v for k, v in _part(folder, prefix).items()}
    return fill(CLIPTextModel(config), tensors, dtype)


def peer_image(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection.from_pretrained(folder / ENCODER, dtype=dtype).eval().requires_grad_(False)


def adapter_parameters(unet: Any) -> list[Tensor]:
    """Return the parameters of the adapter in diffusers' UNet, with gradients enabled."""
    parameters = unet.named_parameters()
    return [p.requires_grad_(True) for name, p in parameters if "_ip" in name or name.startswith("encoder_hid_proj")]


def peer_pipeline(unet: Any, vae: Any, text: Any = None) -> Any:
    """Build diffusers' pipeline of these networks, with DDIM and without a tokenizer."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    theirs: Any = StableDiffusionPipeline(vae, text, None, unet, scheduler, None, None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    return theirs
