"""ControlNet Shuffle, the rival that reads a shuffled picture: a copy of the encoder half whose residuals are averaged over all positions.

Source: ControlNet 1.1. So at one timestep the picture is one vector for each skip. The pixels are moved along a smooth random flow, so
that the network learns to keep colours and things, and not their places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.ablation.rival import Rival
from model.context import Context
from model.controlnet import HINT, ControlNet
from model.features import Features
from model.unet import Residuals, UNet
from sampling.control import total
from sampling.pipeline import Pipeline
from train.pairs import Pairs
from train.randomness import draw
from train.world import Scene, elsewhere, pictures

FACTOR = 4  # side of the pictures / side of the latents, in the mini world


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


def moved(x: Tensor, where: Tensor) -> Tensor:
    """Return x, `n c h w`, with the content of each position taken from `where`, `n 2 h w` in [0, 1], bilinearly."""
    return F.grid_sample(x, rearrange(2 * where - 1, "n xy h w -> n h w xy").to(x), align_corners=True)


def shuffled(pixels: Tensor, seed: int) -> Tensor:
    """Shuffle pictures, bytes `n 3 h w`, each along a flow of its own."""
    n, _, height, width = pixels.shape
    return moved(pixels.float(), flow(n, height, width, torch.Generator().manual_seed(seed))).round().byte()


def flat(pixels: Tensor) -> Tensor:
    """Return pictures, bytes `n 3 s s`, in the shape of embeddings, `n e`."""
    return rearrange(pixels, "n c h w -> n (c h w)")


class ShuffleUNet(UNet):
    """A frozen UNet with a ControlNet that reads `added` of the Context, the hint `b 3 h w`. A row whose hint is zeros has no control."""

    def __init__(self, unet: UNet) -> None:
        super().__init__(unet.config)
        self.load_state_dict(unet.state_dict())
        self.to(next(unet.parameters()).device).requires_grad_(False)
        self.control = ControlNet.of(unet, HINT[: FACTOR.bit_length()], pooled=True).requires_grad_(True)

    def forward(self, x: Tensor, t: Tensor | int, context: Context, residuals: Residuals | None = None) -> Tensor:
        """Predict the noise, as the UNet does."""
        assert context.added is not None
        own = self.control(x, t, Context(context.text), context.added)
        shown = context.added.flatten(1).any(dim=1)[:, None, None, None]
        assert own.mid is not None
        own = Residuals([skip * shown for skip in own.skips], own.mid * shown)
        return super().forward(x, t, Context(context.text), own if residuals is None else total([own, residuals]))


class ControlNetShuffle(Rival):
    """The rival that reads shuffled pictures, as bytes `b e` with e = 3 s s. In training, the picture is never dropped, and half of the
    texts are."""

    drop = 0.5, 0.0, 0.0

    def __init__(self, unet: UNet) -> None:
        controlled = ShuffleUNet(unet)
        super().__init__(controlled)
        self.control = controlled.control

    def see(self, pairs: Pairs, scenes: list[Scene], held_out: bool) -> Pairs:
        """Return the pairs with the bytes of the image prompts as their features; held-out ones are shuffled once and for all."""
        parts = [pictures(scenes[i : i + 500], elsewhere) for i in tqdm(range(0, len(scenes), 500), desc="image prompts", leave=False)]
        pixels = rearrange(torch.from_numpy(np.concatenate(parts)), "n h w c -> n c h w")
        rows = flat(shuffled(pixels, seed=1) if held_out else pixels)[:, None, None].to(pairs.mean.device)
        return replace(pairs, features=Features(rows, torch.zeros_like(rows[:1])))

    def look(self, pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
        """Return the bytes of shuffled pictures, `n e`."""
        pixels = rearrange(torch.from_numpy(np.stack([np.array(image) for image in images])), "n h w c -> n c h w")
        return flat(shuffled(pixels, seed=0)).float().to(pipeline.device)

    def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
        """Return the Context for text tokens `b m c` and the bytes of pictures, `b e`, which are shuffled in training."""
        pixels = rearrange(image / 255, "b (c h w) -> b c h w", c=3, h=math.isqrt(image.shape[1] // 3))
        if g is not None:
            pixels = moved(pixels, flow(len(pixels), pixels.shape[2], pixels.shape[3], g))
        return Context(text, added=pixels)
