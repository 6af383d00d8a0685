"""SDXL's micro-conditioning (arXiv 2307.01952, section 2.2): sizes that its UNet reads beside the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.layers import timestep_embedding
from model.unet import UNetConfig


def added_vector(pooled: Tensor, sizes: Tensor, config: UNetConfig) -> Tensor:
    """Compute SDXL's added vector, `b a`, from the pooled text, `b p`, and sizes in pixels, `b 6`:

    [pooled, e(h_original), e(w_original), e(top), e(left), e(h_target), e(w_target)], with e the timestep embedding.

    The embedding is computed in float32: in bfloat16, 1021 would be 1020. (diffusers rounds to the dtype of the model first.)
    """
    embedded = timestep_embedding(sizes.flatten(), config.added_time_dim).view(len(sizes), -1)
    return torch.cat([pooled, embedded.to(pooled)], dim=1)


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
        """Compute the added vector, `b a`, from the pooled text, `b p`, for drawings of `size` (height, width)."""
        sizes = torch.tensor([*(self.original or size), *self.crop, *(self.target or size)], device=pooled.device)
        return added_vector(pooled, sizes.expand(len(pooled), -1), config)


DRAWING = Micro()  # the drawing as it is: its own size, nothing cut off
