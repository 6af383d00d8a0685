"""Features of pictures, and the two ways in which adapters read them with an image encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from model.image_encoder import ImageConfig, ImageEncoder


@dataclass(frozen=True)
class Features:
    """The features of image prompts, and those of the null image, which stands for a dropped picture (section 3.2.3).

    `pictures`: `b k m e`, for b prompts of k pictures, with m vectors of width e per picture. `null`: the same shape, or 1
    instead of b and k. It may hold the features of negative pictures instead of those of the null image.
    """

    pictures: Tensor
    null: Tensor

    def dropped(self, drop: Tensor) -> Tensor:
        """Return `pictures` with the null image in the rows where `drop`, `b`, is true."""
        return torch.where(drop.view(-1, 1, 1, 1), self.null, self.pictures)

    def expand(self, b: int) -> Features:
        """Repeat the features of a single prompt for b prompts, and the null image for all pictures."""
        pictures = self.pictures.expand(b, -1, -1, -1)
        return Features(pictures, self.null.expand_as(pictures))


def as_features(x: Tensor) -> Tensor:
    """Return `b k m e` as it is, and global embeddings `b e` as `b 1 1 e`. Raises ValueError for other shapes."""
    if x.ndim not in (2, 4):
        raise ValueError(f"features are `b k m e`, or `b e` for one embedding per prompt, not {tuple(x.shape)}")
    return x if x.ndim == 4 else x[:, None, None]


class Embedder(ABC):
    """A way to read a picture with an image encoder: m vectors for each picture.

    `name` and `per_picture`: how messages name the features, and the shape of those of one picture.
    """

    name: str
    per_picture: str

    @abstractmethod
    def __call__(self, encoder: ImageEncoder, pixels: Tensor) -> Tensor:
        """Map pixels `b 3 s s` to features `b m e`."""

    @abstractmethod
    def width(self, config: ImageConfig) -> int:
        """Return the width e of the features."""

    @abstractmethod
    def accepts(self, m: int) -> bool:
        """Return whether a picture can have m vectors."""

    @abstractmethod
    def null(self, encoder: ImageEncoder | None, width: int) -> Tensor:
        """Return the features of the null image, `1 1 m e`."""


@dataclass(frozen=True)
class Global(Embedder):
    """One vector: the image embedding. The null image is a zero embedding."""

    name = "image embeddings"
    per_picture = "a vector"

    def __call__(self, encoder: ImageEncoder, pixels: Tensor) -> Tensor:
        embedding: Tensor = encoder(pixels)
        return embedding[:, None]

    def width(self, config: ImageConfig) -> int:
        return config.output_dim

    def accepts(self, m: int) -> bool:
        return m == 1

    def null(self, encoder: ImageEncoder | None, width: int) -> Tensor:
        return torch.zeros(1, 1, 1, width)


@dataclass(frozen=True)
class Fine(Embedder):
    """A grid of vectors: `ImageEncoder.fine`. The null image is a picture of zero pixels, run through the encoder."""

    name = "fine features"
    per_picture = "a matrix"

    def __call__(self, encoder: ImageEncoder, pixels: Tensor) -> Tensor:
        return encoder.fine(pixels)

    def width(self, config: ImageConfig) -> int:
        return config.fine_dim

    def accepts(self, m: int) -> bool:
        return m > 1

    def null(self, encoder: ImageEncoder | None, width: int) -> Tensor:
        """Return the features of the null image, `1 1 m e`. Raises ValueError without an encoder."""
        if encoder is None:
            raise ValueError("the null image of this adapter is computed by the image encoder: load one")
        side = encoder.config.image_size
        return encoder.fine(torch.zeros(1, 3, side, side).to(next(encoder.parameters())))[None]


GLOBAL, FINE = Global(), Fine()
