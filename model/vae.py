"""The autoencoder of latent diffusion. It maps images in [-1, 1] to scaled latents, and back.

The architecture follows LDM's `diffusionmodules/model.py`. tests/test_vae.py compares it with diffusers'
`AutoencoderKL`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.attention import SelfAttention
from model.layers import Downsample, ResBlock, Upsample

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE, with widths per level. The default is that of SD 1.5 and 2.1."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215  # 1 / standard deviation of the latents
    force_upcast: bool = False  # activations exceed float16, so use float32 in its place (SDXL)

    @property
    def factor(self) -> int:
        """The downsampling factor: side of the image / side of the latents."""
        return int(2 ** (len(self.channels) - 1))


SD_VAE = VAEConfig()
SDXL_VAE = VAEConfig(scale=0.13025, force_upcast=True)
MINI_VAE = VAEConfig(channels=(32, 64, 96), res_blocks=1, groups=8, scale=1.0)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.attn = SelfAttention(channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attn(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[-2])


def _middle(width: int, groups: int) -> list[nn.Module]:
    return [
        ResBlock(width, width, None, groups, EPS),
        AttentionBlock(width, groups),
        ResBlock(width, width, None, groups, EPS),
    ]


class Encoder(nn.Module):
    """Maps images `b 3 H W` to the mean and log variance of q(z|x), `b 2c h w`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, groups = config.channels[0], config.groups
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, channels in enumerate(config.channels):
            for _ in range(config.res_blocks):
                self.down.append(ResBlock(width, channels, None, groups, EPS))
                width = channels
            if level < len(config.channels) - 1:
                self.down.append(Downsample(width, asymmetric=True))
        self.mid = nn.ModuleList(_middle(width, groups))
        self.norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [*self.down, *self.mid]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Maps z, `b c h w`, to images `b 3 H W`. Each level has one residual block more than in the encoder."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, groups = config.channels[-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = nn.ModuleList(_middle(width, groups))
        self.up = nn.ModuleList()
        for level in reversed(range(len(config.channels))):
            for _ in range(config.res_blocks + 1):
                self.up.append(ResBlock(width, config.channels[level], None, groups, EPS))
                width = config.channels[level]
            if level:
                self.up.append(Upsample(width))
        self.norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in [*self.mid, *self.up]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The encoder q(z|x) = N(mean, std) and the decoder p(x|z).

    `encode` and `decode` apply the scale factor; no other code does. Tensors have the default memory format, because
    channels-last is no faster here and its rounding errors are several times larger.
    """

    def __init__(self, config: VAEConfig = SD_VAE) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean and log variance (clamped to [-30, 20]) of q(z|x), unscaled, for images `b 3 H W` in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(x.contiguous())).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images in [-1, 1] to latents `b c h w` of about unit variance.

        Return the mean of q(z|x), or a sample if N(0, 1) `noise` is given.
        """
        mean, logvar = self.moments(x)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return z * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images `b 3 H W`, approximately in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents.contiguous() / self.config.scale))
