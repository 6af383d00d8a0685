"""The denoising UNet of Stable Diffusion: a list of stages, and a forward of two loops.

It reads an opaque Context in its cross-attention layers and knows nothing of what is in it.
Sizes follow LDM's `openaimodel.py`; parity with diffusers' `UNet2DConditionModel` is in tests/test_unet.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Context, CrossAttention
from model.layers import Downsample, ResBlock, SpatialTransformer, Upsample, keep_channels_last, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Widths and depths, level by level; the default is SD 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks a level
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    res_blocks: int = 2
    context_dim: int = 768
    groups: int = 32
    added_dim: int = 0  # width of the added vector conditioning (SDXL: 2816)
    prediction: Literal["epsilon", "v"] = "epsilon"
    sample_size: int = 64  # side of the latents that it was trained on


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
MINI = UNetConfig(
    channels=(64, 128, 192), depth=(1, 1, 0), heads=(4, 4, 4), res_blocks=1, context_dim=128, groups=8, sample_size=16
)


@dataclass(frozen=True)
class Residuals:
    """What a structure control adds: to the skips and the middle (ControlNet), to the state after a stage (T2I-Adapter).

    `skips`: one tensor for each of `conv_in` and the down stages. `hidden`: {stage index, 0 = conv_in: tensor}.
    """

    skips: Sequence[Tensor] = ()
    mid: Tensor | None = None
    hidden: dict[int, Tensor] | None = None


class Stage(nn.Module):
    """One step down, across or up: perhaps a residual block, perhaps a transformer, perhaps a change of size."""

    def __init__(
        self,
        res: ResBlock | None = None,
        attn: SpatialTransformer | None = None,
        resample: Downsample | Upsample | None = None,
    ) -> None:
        super().__init__()
        self.res, self.attn, self.resample = res, attn, resample

    def forward(self, x: Tensor, emb: Tensor, context: Context, size: torch.Size | None = None) -> Tensor:
        if self.res is not None:
            x = self.res(x, emb)
        if self.attn is not None:
            x = self.attn(x, context)
        if self.resample is not None:
            x = self.resample(x, size)
        return x


class TimeMLP(nn.Sequential):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class UNet(nn.Module):
    """eps_theta(x_t, t, c), or v with a v-prediction config."""

    def __init__(self, config: UNetConfig = SD15) -> None:
        super().__init__()
        self.config = config
        widths, levels = config.channels, len(config.channels)
        emb_dim, layer, skips = 4 * widths[0], 0, [widths[0]]

        def res(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, emb_dim, config.groups, eps=1e-5)

        def transformer(level: int, depth: int) -> SpatialTransformer | None:
            nonlocal layer
            layer += depth
            return (
                SpatialTransformer(
                    widths[level], config.context_dim, config.heads[level], depth, config.groups, layer - depth
                )
                if depth
                else None
            )

        self.time_embed = TimeMLP(widths[0], emb_dim)
        self.added_embed = TimeMLP(config.added_dim, emb_dim) if config.added_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.down, width = nn.ModuleList(), widths[0]
        for level in range(levels):
            for _ in range(config.res_blocks):
                self.down.append(Stage(res(width, widths[level]), transformer(level, config.depth[level])))
                skips.append(width := widths[level])
            if level < levels - 1:
                self.down.append(Stage(resample=Downsample(width)))
                skips.append(width)

        self.mid = nn.ModuleList(
            [Stage(res(width, width), transformer(levels - 1, config.mid_depth)), Stage(res(width, width))]
        )

        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(config.res_blocks + 1):
                block = res(width + skips.pop(), width := widths[level])
                resample = Upsample(width) if level and i == config.res_blocks else None
                self.up.append(Stage(block, transformer(level, config.depth[level]), resample))

        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self.checkpointing = False  # recompute the stages in the backward pass: slower, far less memory
        keep_channels_last(self)

    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attention layers in execution order: down, mid, up."""
        return sorted((m for m in self.modules() if isinstance(m, CrossAttention)), key=lambda m: m.layer)

    def embed(self, t: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        emb: Tensor = self.time_embed(timestep_embedding(t, self.config.channels[0]).to(dtype))
        if self.added_embed is None:
            return emb
        if added is None:
            raise ValueError(f"this UNet needs its added vector conditioning, b x {self.config.added_dim}")
        out: Tensor = emb + self.added_embed(added)
        return out

    def _run(self, stage: nn.Module, *args: Any) -> Tensor:
        out: Tensor = checkpoint(stage, *args, use_reentrant=False) if self.checkpointing else stage(*args)
        return out

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        context: Context,
        residuals: Residuals | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """`x`: `b c h w` latents, any size. `t`: timesteps, `b` or one number. Returns the prediction, `b c h w`.

        Raises ValueError for residuals of the wrong number, and where `added` is missing.
        """
        residuals = residuals or Residuals()
        hidden = residuals.hidden or {}
        if residuals.skips and len(residuals.skips) != len(self.down) + 1:
            raise ValueError(f"this UNet has {len(self.down) + 1} skips, the residuals {len(residuals.skips)}")
        if any(not 0 <= stage <= len(self.down) for stage in hidden):
            raise ValueError(f"this UNet has the stages 0 to {len(self.down)}, the residuals name {sorted(hidden)}")
        emb = self.embed(torch.as_tensor(t, device=x.device).expand(x.shape[0]), added, x.dtype)

        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x := x + hidden.get(0, 0)]
        for i, stage in enumerate(self.down, 1):
            x = self._run(stage, x, emb, context) + hidden.get(i, 0)
            skips.append(x)
        if residuals.skips:
            skips = [skip + r for skip, r in zip(skips, residuals.skips, strict=True)]
        for stage in self.mid:
            x = self._run(stage, x, emb, context)
        if residuals.mid is not None:
            x = x + residuals.mid
        for stage in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(stage, x, emb, context, skips[-1].shape[-2:] if skips else None)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
