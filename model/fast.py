"""A faster form of the UNet for a CPU, for inference only: `fasten(unet)`. tests/test_fast.py holds it equal to the UNet.

- 3x3 convolutions in float32 are computed by Winograd's algorithm (`Winograd`).
- Other weights are stored in oneDNN's own layout, and products are fused with GEGLU and residuals (`PackedLinear`). If oneDNN does not
  support the dtype, the same classes call PyTorch's ordinary functions.
- The passes of a guidance batch are equal until the first cross-attention. `FastUNet` computes the layers before it only once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import CrossAttention, SelfAttention, attention
from model.context import Context
from model.kernels import PackedConv, PackedLinear, Pointwise, Winograd, packs
from model.layers import FeedForward, SpatialTransformer, TransformerBlock, Upsample
from model.source import Source
from model.unet import Residuals, Stage, UNet

LARGE = 32  # side of the feature maps from which F(4x4) is used
WIDE = 16  # number of channels from which Winograd's algorithm is used
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class FastFeedForward(FeedForward):
    """GEGLU from two products: `value` is the first half of W_in, and `gate` the second."""

    value: PackedLinear
    gate: PackedLinear
    proj_out: PackedLinear  # type: ignore[assignment]  # `fasten` puts it in the place of a Linear

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return self.proj_out(self.value.times(x, self.gate.gelu(x)), plus)


class FastSelfAttention(SelfAttention):
    to_out: PackedLinear  # type: ignore[assignment]

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        z = attention(self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x)))
        return self.to_out(rearrange(z, "b h n d -> b n (h d)"), plus)


class FastCrossAttention(CrossAttention):
    to_out: PackedLinear  # type: ignore[assignment]

    def forward(self, x: Tensor, context: Context, plus: Tensor | None = None) -> Tensor:
        text = Source(self.split(self.to_k(context.text)), self.split(self.to_v(context.text)))
        z = context.fuse(self.split(self.to_q(x)), text, context.at(self.layer))
        return self.to_out(rearrange(z, "b h n d -> b n (h d)"), plus)


class FastTransformerBlock(TransformerBlock):
    """`x` may have fewer rows than the Context. They are repeated after the self-attention."""

    attn1: FastSelfAttention
    attn2: FastCrossAttention
    ff: FastFeedForward

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = repeat_batch(self.attn1(self.norm1(x), x), len(context.text))
        x = self.attn2(self.norm2(x), context, plus=x)
        return self.ff(self.norm3(x), x)


class FastSpatialTransformer(SpatialTransformer):
    proj_out: PackedLinear  # type: ignore[assignment]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        height = x.shape[-2]
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c").contiguous())
        for block in self.blocks:
            h = block(h, context)
        x = rearrange(repeat_batch(x, len(h)), "b c h w -> b (h w) c").contiguous()
        return rearrange(self.proj_out(h, x), "b (h w) c -> b c h w", h=height)


def repeat_batch(x: Tensor, rows: int) -> Tensor:
    """Repeat the whole batch, `x_1 .. x_b, x_1 .. x_b, ...`, until it has `rows` rows. Returns `x` if it has that many already."""
    return x if len(x) >= rows else torch.cat([x] * (rows // len(x)))


class FastUNet(UNet):
    """The UNet that `fasten` returns. It computes no gradients.

    In a guidance batch, all k passes have the same latents. So `x` may have b rows where the Context has k b. The result equals that of a
    UNet with k copies of `x`, but the layers before the first cross-attention run only once.
    """

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor | int, context: Context, residuals: Residuals | None = None) -> Tensor:
        if len(context.text) % len(x) and len(context.text) != 1:
            raise ValueError(f"{len(x)} latents do not fit a Context of {len(context.text)} rows")
        t = torch.as_tensor(t)
        if t.ndim:  # timesteps may differ between rows, so nothing is shared
            x, t = repeat_batch(x, len(context.text)), repeat_batch(t, len(context.text))
        return super().forward(x, t, context, residuals)

    def embed(self, t: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embed the timesteps as UNet does; if all are equal, only once: `1 e`."""
        return super().embed(t[:1] if bool((t == t[0]).all()) else t, added, dtype)

    def encode(self, x: Tensor, emb: Tensor, context: Context, hidden: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run the encoder as UNet does. If `emb` or `hidden` differ between rows, `x` is repeated before the first layer."""
        rows = len(context.text)
        x, skips = super().encode(repeat_batch(x, rows) if len(emb) > 1 or hidden else x, emb, context, hidden)
        return repeat_batch(x, rows), [repeat_batch(skip, rows) for skip in skips]


def fasten(unet: UNet) -> FastUNet:
    """Build a fast form of a UNet for a CPU, in float32 or bfloat16, for inference only.

    `unet` does not change; release it to free its memory. The weights are laid out for latents of the config's `sample_size` and a batch of
    2, but any size works. Raises ValueError for another device or dtype.
    """
    like = unet.conv_in.weight
    if like.device.type != "cpu" or like.dtype not in DTYPES:
        raise ValueError(f"the fast UNet runs on a CPU in float32 or bfloat16, not on {like.device.type} in {like.dtype}")
    fast: UNet = copy.deepcopy(unet, {id(p): p for p in unet.parameters()})
    for stage, side in _stages(fast):
        for part in filter(None, (stage.res, stage.resample)):
            for name, conv in part.named_children():
                if isinstance(conv, nn.Conv2d):
                    out_side = 2 * side if isinstance(part, Upsample) else side
                    setattr(part, name, _convolution(conv, out_side))
        if stage.attn is not None:
            _fasten_transformer(stage.attn, 2 * side * side)
    fast.__class__ = FastUNet
    assert isinstance(fast, FastUNet)
    return fast


def _stages(unet: UNet) -> Iterator[tuple[Stage, int]]:
    """Yield each stage and the side of its feature maps, for latents of the config's `sample_size`."""
    side = unet.config.sample_size
    for stage in (*unet.down, *unet.mid, *unet.up):
        assert isinstance(stage, Stage)
        yield stage, side
        if stage.resample is not None:
            side = 2 * side if isinstance(stage.resample, Upsample) else (side + 1) // 2


def _convolution(conv: nn.Conv2d, side: int) -> nn.Module:
    """Return the fastest form of a convolution for feature maps of `side` x `side`."""
    dtype, narrow = conv.weight.dtype, min(conv.in_channels, conv.out_channels) < WIDE
    if conv.kernel_size == (1, 1):
        return Pointwise(conv.weight.flatten(1), conv.bias, 2 * side * side)
    if conv.stride == (1, 1) and dtype != torch.bfloat16 and not narrow:
        return Winograd(conv, 4 if side >= LARGE else 2)
    return PackedConv(conv, side) if packs(dtype) else conv


def _fasten_transformer(module: SpatialTransformer, rows: int) -> None:
    """Convert a transformer to its fast form, in place. The projections of the text do not change, because adapters copy them."""

    def pack(parent: nn.Module, *names: str) -> None:
        for name in names:
            linear = getattr(parent, name)
            setattr(parent, name, PackedLinear(linear.weight, linear.bias, rows))

    pack(module, "proj_in", "proj_out")
    module.__class__ = FastSpatialTransformer
    for block in module.blocks:
        assert isinstance(block, TransformerBlock)
        pack(block.attn1, "to_q", "to_k", "to_v", "to_out")
        pack(block.attn2, "to_q", "to_out")
        pack(block.ff, "proj_out")
        halves = zip(block.ff.proj_in.weight.chunk(2), block.ff.proj_in.bias.chunk(2), strict=True)
        value, gate = (PackedLinear(weight, bias, rows) for weight, bias in halves)
        del block.ff.proj_in
        block.ff.value, block.ff.gate = value, gate
        block.__class__, block.ff.__class__ = FastTransformerBlock, FastFeedForward
        block.attn1.__class__, block.attn2.__class__ = FastSelfAttention, FastCrossAttention
