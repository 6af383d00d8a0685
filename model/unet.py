"""The denoising UNet of Stable Diffusion: a list of stages, run by two loops, one down (`encode`) and one up
(`forward`).

The UNet passes its Context on to the cross-attention layers, and does not depend on what is in it.
The architecture follows LDM's `openaimodel.py`. tests/test_unet.py compares it with diffusers' `UNet2DConditionModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import CrossAttention
from model.context import Context
from model.layers import Downsample, ResBlock, SpatialTransformer, Upsample, keep_channels_last, timestep_embedding
from model.words import Prediction

EMPTY = -1  # depth of a transformer without blocks, whose projections remain; only the small ControlNets of SDXL have it


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet, with widths, depths and heads per level. The default is SD 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks per residual block, at each level; 0: no transformer
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    res_blocks: int = 2
    context_dim: int = 768
    groups: int = 32
    added_dim: int = 0  # width of the added conditioning vector (SDXL: 2816); 0 = none
    added_time_dim: int = 256  # width of the embedding of each of SDXL's six size values, in that vector
    prediction: Prediction = "epsilon"
    sample_size: int = 64  # height and width of the latents in training


SD15 = UNetConfig()
SD21 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, prediction="v", sample_size=96)
SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    context_dim=2048,
    added_dim=2816,
    sample_size=128,
)
MINI = UNetConfig(channels=(64, 128, 192), depth=(1, 1, 0), heads=(4, 4, 4), res_blocks=1, context_dim=128, groups=8, sample_size=16)


@dataclass(frozen=True)
class Residuals:
    """Tensors that a structure control adds to the UNet's feature maps: ControlNet uses `skips` and `mid`, T2I-Adapter
    `hidden`.

    `skips`: one tensor for `conv_in` and for each down stage, added to the skips. `mid`: added to the output of the
    middle. `hidden`: {stage: tensor}, added to the output of a down stage. Stage 0 is `conv_in`, and stage i is
    `down[i - 1]`.
    """

    skips: Sequence[Tensor] = ()
    mid: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)


def join(sides: Sequence[Residuals]) -> Residuals:
    """Concatenate the residuals of the sides of a guidance batch, all of the same size.

    A side without residuals gets zeros.
    """

    def rows(tensors: list[Tensor | None]) -> Tensor:
        like = next(tensor for tensor in tensors if tensor is not None)
        return torch.cat([torch.zeros_like(like) if tensor is None else tensor for tensor in tensors])

    skips = max((side.skips for side in sides), key=len)
    stages = sorted({stage for side in sides for stage in side.hidden})
    return Residuals(
        [rows([side.skips[i] if side.skips else None for side in sides]) for i in range(len(skips))],
        rows([side.mid for side in sides]) if any(side.mid is not None for side in sides) else None,
        {stage: rows([side.hidden.get(stage) for side in sides]) for stage in stages},
    )


class Stage(nn.Module):
    """A residual block, a transformer and a change of size, in this order. Each of them is optional.

    `level`: 0 at the full size of the latents, 1 at half of it, and so on.
    """

    def __init__(
        self,
        level: int,
        res: ResBlock | None = None,
        attn: SpatialTransformer | None = None,
        resample: Downsample | Upsample | None = None,
    ) -> None:
        super().__init__()
        self.level, self.res, self.attn, self.resample = level, res, attn, resample

    def forward(self, x: Tensor, emb: Tensor, context: Context, size: torch.Size | None = None) -> Tensor:
        if self.res is not None:
            x = self.res(x, emb)
        if self.attn is not None:
            x = self.attn(x, context)
        if self.resample is not None:
            x = self.resample(x, size)
        return x


def _stage(config: UNetConfig, in_channels: int, level: int, depth: int, layer: int, resample: Upsample | None = None) -> Stage:
    """Build a stage at one level: a residual block and, if `depth` > 0, a transformer whose first cross-attention has index
    `layer`.
    """
    width, groups = config.channels[level], config.groups
    res = ResBlock(in_channels, width, 4 * config.channels[0], groups, eps=1e-5)
    attn = SpatialTransformer(width, config.context_dim, config.heads[level], depth, groups, layer) if depth else None
    return Stage(level, res, attn, resample)


class TimeMLP(nn.Sequential):
    """Linear, SiLU, linear: maps a timestep embedding, or SDXL's added vector, to the width that the residual blocks
    read.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class UNetEncoder(nn.Module):
    """The first half of the UNet: timestep embedding, `conv_in`, the down stages and the middle.

    A ControlNet is a copy of it.
    """

    def __init__(self, config: UNetConfig = SD15) -> None:
        super().__init__()
        self.config = config
        widths, levels = config.channels, len(config.channels)
        emb_dim, width, layer = 4 * widths[0], widths[0], 0
        self.time_embed = TimeMLP(widths[0], emb_dim)
        self.added_embed = TimeMLP(config.added_dim, emb_dim) if config.added_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.stage_channels = [widths[0]]  # widths of the skips: after conv_in and after each down stage
        for level, depth in enumerate(config.depth):
            for _ in range(config.res_blocks):
                self.down.append(_stage(config, width, level, depth, layer))
                layer, width = layer + depth, widths[level]
                self.stage_channels.append(width)
            if level < levels - 1:
                self.down.append(Stage(level, resample=Downsample(width)))
                self.stage_channels.append(width)
        last = levels - 1
        self.mid = nn.ModuleList([_stage(config, width, last, config.mid_depth, layer), _stage(config, width, last, 0, layer)])
        self.checkpointing = 0  # levels, from the largest, that recompute activations in the backward pass: slower, with less memory

    def cross_attentions(self) -> list[CrossAttention]:
        """Return the cross-attention layers in execution order: down, mid, up."""
        return sorted((m for m in self.modules() if isinstance(m, CrossAttention)), key=lambda m: m.layer)

    def embed(self, t: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embed timesteps `b` and, if the config has `added_dim`, the added vector `b a`. Returns their sum, `b e`.

        Raises ValueError when the config has `added_dim` and `added` is None.
        """
        emb = self.time_embed(timestep_embedding(t, self.config.channels[0]).to(dtype))
        if self.added_embed is None:
            return emb
        if added is None:
            raise ValueError(f"this UNet needs an added conditioning vector: set `added` in its Context, b x {self.config.added_dim}")
        return emb + self.added_embed(added)

    def run(self, stage: nn.Module, *args: Any) -> Tensor:
        """Run a stage. At the first `checkpointing` levels, its activations are recomputed in the backward pass."""
        assert isinstance(stage, Stage)
        again = stage.level < self.checkpointing
        out: Tensor = checkpoint(stage, *args, use_reentrant=False, preserve_rng_state=False) if again else stage(*args)
        return out

    def encode(self, x: Tensor, emb: Tensor, context: Context, hidden: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Run `conv_in`, the down stages and the middle on latents `b c h w`. Return the output of the middle, and the skips.

        `emb`: the result of `embed`. `hidden`: as in Residuals.
        """
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last)) + hidden.get(0, 0)
        skips = [x]
        for i, stage in enumerate(self.down, 1):
            x = self.run(stage, x, emb, context) + hidden.get(i, 0)
            skips.append(x)
        for stage in self.mid:
            x = self.run(stage, x, emb, context)
        return x, skips


class UNet(UNetEncoder):
    """eps_theta(x_t, c, t); v_theta(x_t, c, t) if `config.prediction` is "v"."""

    def __init__(self, config: UNetConfig = SD15) -> None:
        super().__init__(config)
        widths, layer, skips = list(config.channels), len(self.cross_attentions()), list(self.stage_channels)
        self.up, width = nn.ModuleList(), widths[-1]
        for level in reversed(range(len(widths))):
            for i in range(config.res_blocks + 1):
                resample = Upsample(widths[level]) if level and i == config.res_blocks else None
                depth = config.depth[level]
                self.up.append(_stage(config, width + skips.pop(), level, depth, layer, resample))
                layer, width = layer + depth, widths[level]
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        keep_channels_last(self)

    def forward(self, x: Tensor, t: Tensor | int, context: Context, residuals: Residuals | None = None) -> Tensor:
        """Predict the noise (or v), `b c h w`. `x`: latents `b c h w` of any size. `t`: timesteps `b`, or one number.

        Raises ValueError when the residuals do not match the stages, and when the config needs an added vector that the
        Context lacks.
        """
        residuals = residuals or Residuals()
        self._check(residuals)
        emb = self.embed(torch.as_tensor(t, device=x.device).expand(x.shape[0]), context.added, x.dtype)
        x, skips = self.encode(x, emb, context, residuals.hidden)
        if residuals.skips:
            skips = [skip + r for skip, r in zip(skips, residuals.skips, strict=True)]
        if residuals.mid is not None:
            x = x + residuals.mid
        for stage in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.run(stage, x, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _check(self, residuals: Residuals) -> None:
        stages = len(self.down)
        if residuals.skips and len(residuals.skips) != stages + 1:
            raise ValueError(f"this UNet has {stages + 1} skips, but the residuals are for {len(residuals.skips)}")
        if any(not 0 <= stage <= stages for stage in residuals.hidden):
            raise ValueError(f"this UNet has stages 0 to {stages}, but the residuals are for {sorted(residuals.hidden)}")
