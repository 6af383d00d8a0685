"""Write random full-size weights of Stable Diffusion XL, and load the public networks from them, for `python -m eval parity --base sdxl`.

They form a diffusers folder, beside it OpenCLIP's ViT-bigG/14 as the image encoder, and an adapter in the layout of `ip-adapter_sdxl`. In
half precision they take 11 GB. In float64 the UNet alone would take 21 GB, so `in_float64` converts one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from checkpoints.adapters import save_adapter
from checkpoints.diffusers_folder import SCHEDULER, save_image, save_text, save_tokenizer, save_unet, save_vae
from checkpoints.files import write_json
from checkpoints.fill import empty_module
from eval.peers.official import ENCODER, attach_adapter, random_tensor
from model.adapter import IPAdapter
from model.image_encoder import VIT_BIGG, ImageEncoder
from model.image_projection import ImageProjection
from model.text_encoder import SD15_TEXT, SDXL_TEXT_2, TextEncoder
from model.unet import SDXL, UNet
from model.vae import SDXL_VAE, VAE

ADAPTER, SCHEDULER_FILE = "ip-adapter_sdxl.safetensors", "scheduler/scheduler_config.json"
UNET, IMAGE, TEXTS = SDXL, VIT_BIGG, {"text_encoder": SD15_TEXT, "text_encoder_2": SDXL_TEXT_2}
LARGEST = 60_000_000  # parameters of a block that is converted as a whole: 0.5 GB in float64
M = TypeVar("M", bound=nn.Module)


def _random(module: M, generator: torch.Generator) -> M:
    """Fill a module, which is on the meta device, with random tensors in half precision."""
    tensors = {name: random_tensor(name, like.shape, generator).half() for name, like in module.state_dict().items()}
    module.load_state_dict(tensors, assign=True)
    return module


def write(folder: Path, seed: int = 0) -> None:
    """Write all networks, unless they exist already."""
    if (folder / SCHEDULER_FILE).exists():
        return
    g = torch.Generator().manual_seed(seed)
    for name, config in TEXTS.items():
        save_text(_random(empty_module(TextEncoder, config), g), folder / name)
        save_tokenizer(config.pad, folder / name.replace("text_encoder", "tokenizer"))
    save_image(_random(empty_module(ImageEncoder, IMAGE), g), folder / ENCODER)
    save_unet(_random(empty_module(UNet, UNET), g), folder / "unet")
    unet = empty_module(UNet, UNET)
    with torch.device("meta"):
        adapter = IPAdapter(unet, ImageProjection(IMAGE.output_dim, UNET.context_dim))
    save_adapter(_random(adapter, g), unet, folder / ADAPTER, {})
    save_vae(_random(empty_module(VAE, SDXL_VAE), g), folder / "vae")
    write_json(folder / SCHEDULER_FILE, {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **SCHEDULER})


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules with at most `LARGEST` parameters. Lists are not called, so hooks on them would not run."""
    small = sum(p.numel() for p in module.parameters()) <= LARGEST and not isinstance(module, nn.ModuleList)
    if small or next(module.parameters(recurse=False), None) is not None:
        yield module
    else:
        for child in module.children():
            yield from _blocks(child)


def in_float64(module: Any) -> Any:
    """Make a network compute in float64 while it keeps its weights in half precision: convert each block before it runs, and back after."""

    def widen(block: nn.Module, _: Any) -> None:
        block.double()

    def narrow(block: nn.Module, *_: Any) -> None:
        block.half()

    for block in _blocks(module):
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(narrow)
    return module


def _load(kind: Any, folder: Path, dtype: torch.dtype, adapter: Path | None = None) -> Any:
    stored = torch.float16 if dtype == torch.float64 else dtype
    module = kind.from_pretrained(folder, torch_dtype=stored).eval()
    module = attach_adapter(module, adapter) if adapter else module
    return (in_float64(module) if dtype == torch.float64 else module).requires_grad_(False)


def peer_unet(folder: Path, dtype: torch.dtype) -> Any:
    """Load diffusers' UNet with the adapter at lambda 1."""
    from diffusers import UNet2DConditionModel

    return _load(UNet2DConditionModel, folder / "unet", dtype, folder / ADAPTER)


def peer_text(folder: Path, dtype: torch.dtype, name: str) -> Any:
    """Load transformers' text encoder, `text_encoder` or `text_encoder_2`."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return _load(CLIPTextModelWithProjection if TEXTS[name].output_dim else CLIPTextModel, folder / name, dtype)


def peer_image(folder: Path, dtype: torch.dtype) -> Any:
    """Load transformers' image encoder."""
    from transformers import CLIPVisionModelWithProjection

    return _load(CLIPVisionModelWithProjection, folder / ENCODER, dtype)
