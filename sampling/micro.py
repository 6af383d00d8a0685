"""SDXL's micro-conditioning (arXiv 2307.01952, section 2.2): sizes that its UNet reads beside the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers import timestep_embedding
from model.unet import UNetConfig


@dataclass(frozen=True)
class Micro:
    """What SDXL is told about the training picture to imitate, and how the unconditional pass reads an empty text.

    `original`: (height, width) of the file before it was resized; None is the size of the drawing. `crop`: (top, left) of the part
    that was cut out. `target`: (height, width) of that part; None is the size of the drawing. `zero_negative`: the unconditional
    pass reads zeros, as SDXL itself was trained, instead of the encoded empty text, as IP-Adapter was.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    zero_negative: bool = False

    def check(self, config: UNetConfig) -> None:
        """Raise ValueError if anything is set, and the UNet does not read it."""
        if self != DRAWING and not config.added_dim:
            names = "--original-size, --crop-corner, --target-size and --zero-negative"
            raise ValueError(f"{names} are for Stable Diffusion XL: leave them out for other base models")

    def vector(self, pooled: Tensor, size: tuple[int, int], config: UNetConfig) -> Tensor:
        """Compute the added vector `b a` from the pooled text `b e`, for drawings of `size` (height, width):

        [pooled, e(h_original), e(w_original), e(top), e(left), e(h_target), e(w_target)], with e the timestep embedding.

        The embedding is computed in float32: in bfloat16, 1021 would be 1020. (diffusers rounds to the dtype of the model first.)
        """
        numbers = [*(self.original or size), *self.crop, *(self.target or size)]
        sizes = timestep_embedding(torch.tensor(numbers, device=pooled.device), config.added_time_dim).flatten()
        return torch.cat([pooled, sizes.to(pooled).expand(len(pooled), -1)], dim=1)


DRAWING = Micro()  # the drawing as it is: its own size, nothing cut off
