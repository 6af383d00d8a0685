"""The building blocks of the UNet and the VAE. Feature maps are `b c h w`, timestep embeddings `b c`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.attention import CrossAttention, SelfAttention
from model.context import Context


def keep_channels_last(module: nn.Module) -> None:
    """Store convolution weights in channels-last order: about 25 % faster on a CPU.

    If weights are loaded later in another order, each convolution reorders its own in its first call.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_pre_hook(_lay_out)
            if not conv.weight.is_meta:
                conv.to(memory_format=torch.channels_last)


def _lay_out(conv: nn.Module, _: object) -> None:
    assert isinstance(conv, nn.Conv2d)
    if not conv.weight.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling():
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos(t w_i), sin(t w_i)] with w_i = max_period^(-i / (dim / 2)), cosines first as in LDM.

    `b` -> `b dim`, float32.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + W silu(emb)))). The VAE has no `emb_dim`, and so no embedding term."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels) if emb_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.emb is not None and emb is not None:
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class FeedForward(nn.Module):
    """GEGLU: W_out (a * gelu(b)) with [a, b] = W_in x. The hidden width is 4 dim, and gelu is exact."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(a * F.gelu(b))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each with a LayerNorm before it and a residual around
    it.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, layer)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with one residual around all of them.

    `proj_in` and `proj_out` are linear layers, as in SD 2 and SDXL. SD 1.5 stores them as the equivalent 1x1
    convolutions. `layer` is the index of the first block's cross-attention.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, depth: int, groups: int, layer: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, context_dim, heads, layer + i) for i in range(depth))
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        height = x.shape[-2]
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.blocks:
            h = block(h, context)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=height)


class Downsample(nn.Module):
    """Halve the size with a strided 3x3 convolution.

    The VAE's encoder pads only the right and bottom edges (`asymmetric`).
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution.

    Doubles the size, or resizes to `size`: the size of the next skip, which is not exactly double when it is odd.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        target = (2 * x.shape[-2], 2 * x.shape[-1]) if size is None else (size[0], size[1])
        return self.conv(F.interpolate(x, size=target, mode="nearest"))
