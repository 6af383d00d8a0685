"""The networks of `python -m eval.peers.gpu`, ours and diffusers', with random weights, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from checkpoints.configs import diffusers_config
from checkpoints.names import adapter_names
from eval.peers.official import attach_tensors, peer_autoencoder, peer_pipeline
from model.adapter import IPAdapter
from model.image_projection import ImageProjection
from model.unet import SD15, UNet, UNetConfig
from model.vae import SD_VAE, VAEConfig

IMAGE_DIM = 1024  # width of the image encoder's embedding


@dataclass(frozen=True)
class Setting:
    """The device and the sizes: of the networks, the latents, the batches of a step and of training, and the steps of a picture."""

    device: str
    unet: UNetConfig = SD15
    vae: VAEConfig = SD_VAE
    side: int = 64
    batches: tuple[int, int] = (2, 16)
    training: int = 8
    steps: int = 50
    seconds: float = 2.0  # to measure for


def tiny(device: str) -> Setting:
    """Sizes at which the script itself can be tried. The numbers mean nothing."""
    unet = UNetConfig(channels=(32, 64), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=16)
    return Setting(device, unet, VAEConfig(channels=(32, 32), res_blocks=1), 8, (2, 3), 2, 3, 0.0)


def inputs(setting: Setting, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random latents `b 4 h w`, text tokens `b 77 c` and image embeddings `b e`."""
    make = partial(torch.randn, device=setting.device, dtype=dtype)
    text = make(batch, 77, setting.unet.context_dim)
    return make(batch, 4, setting.side, setting.side), text, make(batch, IMAGE_DIM)


def our_networks(setting: Setting, dtype: torch.dtype) -> tuple[UNet, IPAdapter]:
    """Build our UNet and adapter with their initial weights, frozen."""
    with torch.device(setting.device):
        unet = UNet(setting.unet)
        adapter = IPAdapter(unet, ImageProjection(IMAGE_DIM, setting.unet.context_dim))
    return unet.to(dtype).eval().requires_grad_(False), adapter.to(dtype).requires_grad_(False)


def their_unet(setting: Setting, dtype: torch.dtype) -> Any:
    """Build diffusers' UNet with an adapter at lambda 1, with random weights, frozen."""
    from diffusers import UNet2DConditionModel

    ours, adapter = our_networks(setting, torch.float32)
    names = adapter_names(adapter.state_dict(), ours)
    tensors = {names[name][0]: tensor.cpu() for name, tensor in adapter.state_dict().items()}
    with torch.device(setting.device):
        peer: Any = UNet2DConditionModel.from_config(diffusers_config(setting.unet))
    return attach_tensors(peer, tensors).to(setting.device, dtype).eval().requires_grad_(False)


def peer_or_none(build: Callable[[], Any]) -> Any:
    """Call `build`, unless diffusers is not installed."""
    return build() if find_spec("diffusers") else None


def their_pipeline(setting: Setting, dtype: torch.dtype) -> Any:
    """Build diffusers' pipeline of `their_unet` and a VAE, without a text encoder."""
    return peer_pipeline(their_unet(setting, dtype), peer_autoencoder(setting.vae).to(setting.device, dtype))
