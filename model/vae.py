"""The autoencoder of latent diffusion: pictures in [-1, 1] to scaled latents and back.

Sizes follow LDM's `diffusionmodules/model.py`; parity with diffusers' `AutoencoderKL` is in tests/test_vae.py.
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
    """Widths level by level; the default is the VAE of SD 1.5, 2.1 (and, but for `scale`, SDXL)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215  # 1 / standard deviation of the latents

    @property
    def factor(self) -> int:
        """Pixels to a latent, along each side."""
        return int(2 ** (len(self.channels) - 1))


SD_VAE = VAEConfig()
MINI_VAE = VAEConfig(channels=(32, 64, 96), res_blocks=1, groups=8, scale=1.0)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels, added to its input."""

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
    """`b 3 H W` -> moments of q(z|x), `b 2c h w`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, groups = config.channels[0], config.groups
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, channels in enumerate(config.channels):
            for _ in range(config.res_blocks):
                self.down.append(ResBlock(width, width := channels, None, groups, EPS))
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
    """z, `b c h w` -> picture, `b 3 H W`. One residual block a level more than the encoder."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, groups = config.channels[-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = nn.ModuleList(_middle(width, groups))
        self.up = nn.ModuleList()
        for level in reversed(range(len(config.channels))):
            for _ in range(config.res_blocks + 1):
                self.up.append(ResBlock(width, width := config.channels[level], None, groups, EPS))
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
    """q(z|x) = N(mean, std) and p(x|z). `encode` and `decode` know the scale factor; nobody else does.

    In plain memory format: here channels-last is no faster, and its sums are several times less exact.
    """

    def __init__(self, config: VAEConfig = SD_VAE) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (clamped to [-30, 20]) of q(z|x), unscaled, for pictures `b 3 H W` in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(x.contiguous())).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures in [-1, 1] to latents of about unit variance, `b c h w`: the mean, or with `noise` a sample of q(z|x)."""
        mean, logvar = self.moments(x)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return z * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures `b 3 H W`, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents.contiguous() / self.config.scale))
