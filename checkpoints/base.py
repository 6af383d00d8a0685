"""A base model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE


@dataclass(frozen=True)
class Base:
    """A base model."""

    unet: UNet
    vae: VAE
    text: TextEncoder

    @property
    def parts(self) -> dict[str, nn.Module]:
        """By the names of their files and folders."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text}
