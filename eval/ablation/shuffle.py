"""ControlNet Shuffle, the rival that reads a shuffled picture: a copy of the encoder half whose residuals are averaged over all positions.

Source: ControlNet 1.1. So at one timestep the picture is one vector for each skip. The pixels are moved along a smooth random flow, so
that the network learns to keep colours and things, and not their places. Here the latents are shuffled, not the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from eval.ablation.rival import Rival, latents_of
from model.context import Context
from model.controlnet import ControlNet, ControlNetConfig, encoder_names
from model.unet import Residuals, UNet
from sampling.control import total
from sampling.pipeline import Pipeline
from train.loss import LossInputs
from train.randomness import draw

HINT = 64  # width of the hint network


def flow(n: int, height: int, width: int, g: torch.Generator) -> Tensor:
    """Draw for each new position the (x, y) where its content comes from, `n 2 h w` in [0, 1]: two smooth fields of noise.

    A field is uniform on a grid with cells of half the size, upsampled by cubic interpolation, and stretched to [0, 1].
    """
    grid = draw(lambda n: torch.rand(n, 2, 4, 4, generator=g, device=g.device), n, g)
    smooth = F.interpolate(grid, (2 * height, 2 * width), mode="bicubic", align_corners=False)
    top, left = height // 2, width // 2
    smooth = smooth[..., top : top + height, left : left + width]
    low, high = (limit(dim=(2, 3), keepdim=True) for limit in (smooth.amin, smooth.amax))
    return (smooth - low) / (high - low)


def shuffled(x: Tensor, where: Tensor) -> Tensor:
    """Return x, `n c h w`, with the content of each position taken from `where`, `n 2 h w` or `1 2 h w` in [0, 1], bilinearly."""
    grid = rearrange(2 * where - 1, "n xy h w -> n h w xy").expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid.to(x), align_corners=True)


class ShuffleUNet(UNet):
    """A frozen UNet with a ControlNet that reads `added` of the Context, the hint `b c h w`. A row whose hint is zeros has no control."""

    def __init__(self, unet: UNet) -> None:
        super().__init__(unet.config)
        self.load_state_dict(unet.state_dict())
        config = replace(ControlNetConfig.of(unet.config, hint=(HINT,), pooled=True), hint_channels=unet.config.in_channels)
        control = ControlNet(config)
        names = encoder_names(control)
        control.load_state_dict(control.state_dict() | {key: value for key, value in unet.state_dict().items() if key in names})
        self.requires_grad_(False)
        self.control = control
        self.to(next(unet.parameters()).device)

    def forward(self, x: Tensor, t: Tensor | int, context: Context, residuals: Residuals | None = None) -> Tensor:
        """Predict the noise, as the UNet does."""
        assert context.added is not None
        own = self.control(x, t, Context(context.text), context.added)
        shown = context.added.flatten(1).any(dim=1)[:, None, None, None]
        assert own.mid is not None
        own = Residuals([skip * shown for skip in own.skips], own.mid * shown)
        return super().forward(x, t, Context(context.text), own if residuals is None else total([own, residuals]))


class ControlNetShuffle(Rival):
    """The rival that reads shuffled latents. In training, the picture is never dropped, and half of the texts are."""

    drop = 0.5, 0.0, 0.0

    def __init__(self, unet: UNet) -> None:
        controlled = ShuffleUNet(unet)
        super().__init__(controlled)
        self.control = controlled.control

    def look(self, pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
        return latents_of(pipeline, images)

    def reads(self, x: LossInputs) -> Tensor:
        return x.x0

    def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
        """Return the Context for text tokens `b m c` and latents `b c h w`. Without a generator, all are shuffled by the same flow."""
        height, width = image.shape[2:]
        where = flow(len(image), height, width, g) if g else flow(1, height, width, torch.Generator().manual_seed(0))
        return Context(text, added=shuffled(image, where))
