"""Base: the networks of a base model, such as Stable Diffusion 1.5."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE


@dataclass(frozen=True)
class Base:
    """The UNet, VAE and text encoder of a base model."""

    unet: UNet
    vae: VAE
    text: TextEncoder

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their files and folders."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text}
