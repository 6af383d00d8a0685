"""A rival of IP-Adapter: another way to show a picture to the same base model (tier C of the ablation).

A rival turns text tokens and what it reads of a picture into the Context of a UNet. Some train only what they add to the frozen base,
and some train the whole UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eval.bench import embed
from eval.device import batch_size, device_of
from model.adapter import IPAdapter
from model.context import Context
from model.features import GLOBAL
from model.image_projection import ImageProjection
from model.unet import UNet
from sampling.micro import DRAWING
from sampling.pipeline import Pipeline
from train.pairs import Pairs
from train.vae import bytes_to_tensor
from train.world import Scene


class Rival(nn.Module):
    """A way to condition a UNet on a picture. `drop`: the probabilities, in training, that (only the text, only the picture, both) are
    dropped; by default, those of IP-Adapter."""

    drop = 0.05, 0.05, 0.05

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self._base = (unet,)  # in a tuple, because it is frozen and not a part of the rival

    @property
    def unet(self) -> UNet:
        return self._base[0]

    def learn_scale(self, embeddings: Tensor) -> None:
        """Look at the image embeddings of all training pictures, `n e`, before the training."""

    def look(self, pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
        """Return what `forward` reads of pictures: their embeddings, `n e`."""
        adapter = IPAdapter(pipeline.unet, ImageProjection(width(pipeline), pipeline.unet.config.context_dim))
        return embed(replace(pipeline, adapters=(adapter,)), images)[:, 0, 0]

    def see(self, pairs: Pairs, scenes: list[Scene], held_out: bool) -> Pairs:
        """Return the pairs with what `forward` reads of the image prompts of these scenes as their features."""
        return pairs

    def drop_picture(self, image: Tensor) -> Tensor:
        """Return what `forward` reads in place of pictures on the unconditional side."""
        return torch.zeros_like(image)

    def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
        """Return the Context for text tokens `b m c` and what `look` returns, such as image embeddings `b e`; zeros are a dropped picture.

        `g`: the random numbers of training, for rivals that change what they read.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RivalPipeline(Pipeline):
    """A pipeline whose Contexts come from a rival. An `embedding` is what the rival reads."""

    rival: Rival | None = None

    @classmethod
    def of(cls, pipeline: Pipeline, rival: Rival) -> RivalPipeline:
        """Return a pipeline that draws with a rival in place of adapters."""
        return cls(**vars(replace(pipeline, unet=rival.unet, adapters=())), rival=rival)

    @torch.no_grad()
    def contexts(
        self, prompts: Sequence[str], negatives: Sequence[str], embedding: Any = None, *_: Any, **more: Any
    ) -> tuple[Context, Context]:
        assert self.rival is not None
        size = self.unet.config.sample_size
        uncond, cond = self.texts(prompts, negatives, (size, size), DRAWING)
        return self.rival(uncond.text, self.rival.drop_picture(embedding)), self.rival(cond.text, embedding)


def parameters_of(rival: nn.Module) -> int:
    """Count the parameters that are trained."""
    return sum(p.numel() for p in rival.parameters() if p.requires_grad)


def width(pipeline: Pipeline) -> int:
    """Return the width of the image embeddings."""
    assert pipeline.image is not None
    return GLOBAL.width(pipeline.image.config)


@torch.no_grad()
def latents_of(pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
    """Return the latents of pictures, `n c h w`."""
    pixels, device = bytes_to_tensor(np.stack([np.array(image) for image in images])), device_of(pipeline.vae)
    return torch.cat([pipeline.vae.encode(part.to(device)) for part in pixels.split(batch_size(device))])
