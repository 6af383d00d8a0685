"""T2I-Adapter: a small network that maps a hint to one feature map for each level of the UNet's encoder.

F_c = F_AD(C),   F_enc^i <- F_enc^i + F_c^i     (arXiv 2302.08453, section 3.3)

C is the hint and F_enc^i the output of the encoder's level i, which goes on to the next level and to the skip. F_c depends
neither on the latents nor on the timestep, so it is computed once for a picture. tests/test_t2i.py compares this file with
diffusers' `T2IAdapter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.unet import Residuals, UNetConfig


@dataclass(frozen=True)
class T2IConfig:
    """Sizes of a T2I-Adapter. The default is that of SD 1.5 for hints in colour.

    `form`: "full"; "light", whose blocks have a quarter of the width; or "xl", the full form for SDXL, which halves the size
    only at level 2. `unshuffle`: pixels of the hint that become one position of the first feature map, in each direction.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    hint_channels: int = 3
    blocks: int = 2
    unshuffle: int = 8
    form: Literal["full", "light", "xl"] = "full"

    @property
    def factor(self) -> int:
        """Side of the hint / side of the latents. SDXL's first feature map has half the size of its latents."""
        return self.unshuffle // 2 if self.form == "xl" else self.unshuffle


T2I_SD15 = T2IConfig()
T2I_SD15_GREY = T2IConfig(hint_channels=1)  # sketch and canny
T2I_LIGHT = T2IConfig(blocks=4, form="light")
T2I_SDXL = T2IConfig(unshuffle=16, form="xl")


class Block(nn.Module):
    """x + conv(relu(conv3x3(x))). There is no norm. The last convolution is 1x1, or 3x3 in the light form."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Level(nn.Module):
    """Halve the size, change the width, run the blocks, and in the light form go back to the full width."""

    def __init__(self, in_channels: int, channels: int, blocks: int, halve: bool, light: bool) -> None:
        super().__init__()
        inner = channels // 4 if light else channels
        self.halve = halve
        self.in_conv = nn.Conv2d(in_channels, inner, 1) if light or in_channels != inner else nn.Identity()
        self.blocks = nn.Sequential(*(Block(inner, 3 if light else 1) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(inner, channels, 1) if light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.halve:  # odd sizes round up, as in the UNet
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return self.out_conv(self.blocks(self.in_conv(x)))


class T2IAdapter(nn.Module):
    """Map a hint to feature maps, finest level first, and those to Residuals for a UNet."""

    def __init__(self, config: T2IConfig = T2I_SD15) -> None:
        super().__init__()
        self.config = config
        widths, light = config.channels, config.form == "light"
        dim = config.hint_channels * config.unshuffle**2
        self.unshuffle = nn.PixelUnshuffle(config.unshuffle)
        self.conv_in = nn.Identity() if light else nn.Conv2d(dim, widths[0], 3, padding=1)
        before = (dim if light else widths[0], *widths[:-1])
        halves = [level == 2 if config.form == "xl" else level > 0 for level in range(len(widths))]
        self.body = nn.ModuleList(Level(a, b, config.blocks, halve, light) for a, b, halve in zip(before, widths, halves, strict=True))

    def forward(self, hint: Tensor) -> list[Tensor]:
        """Compute F_c, a feature map `b c h w` for each level. `hint`: `b c H W` in [0, 1]; H and W are multiples of `unshuffle`."""
        x, features = self.conv_in(self.unshuffle(hint)), []
        for level in self.body:
            features.append(x := level(x))
        return features


def places(unet: UNetConfig) -> list[int]:
    """Return the stages whose output gets a feature map, counted as in `Residuals`: the last residual block of each level.

    At a level without cross-attention, unless it is the last, it is the downsampling after that block (SDXL's first level).
    """
    ends = [(level + 1) * (unet.res_blocks + 1) - 1 for level in range(len(unet.depth))]
    plain = [depth == 0 and level + 1 < len(ends) for level, depth in enumerate(unet.depth)]
    return [end + late for end, late in zip(ends, plain, strict=True)]


def residuals(features: list[Tensor], unet: UNetConfig) -> Residuals:
    """Return the feature maps as Residuals for this UNet. If there is one more than the UNet has levels, it goes to the middle (SDXL)."""
    stages = places(unet)
    mid = features[len(stages)] if len(features) > len(stages) else None
    return Residuals(mid=mid, hidden=dict(zip(stages, features, strict=False)))
