"""Base: the networks of a base model, such as Stable Diffusion 1.5."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.text_encoder import Text, TextEncoderPair
from model.unet import UNet
from model.vae import VAE


@dataclass(frozen=True)
class Base:
    """The UNet, VAE and text encoder of a base model. SDXL has a pair of text encoders."""

    unet: UNet
    vae: VAE
    text: Text

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their files and folders."""
        texts: dict[str, nn.Module] = {"text_encoder": self.text}
        if isinstance(self.text, TextEncoderPair):
            texts = {"text_encoder": self.text.first, "text_encoder_2": self.text.second}
        return {"unet": self.unet, "vae": self.vae, **texts}
