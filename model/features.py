"""Features of pictures, and the ways in which adapters read them: with an image encoder, from a face embedding, or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    def drop_pictures(self, drop: Tensor) -> Tensor:
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
    """A way to read a picture: m vectors for each picture.

    `name` and `per_picture`: how messages name the features, and what there is for each picture. `needs_encoder`: whether the image
    encoder is used. `face`: whether a face embedding is read, so that a picture alone is not enough.
    """

    name: str
    per_picture: str
    needs_encoder = True
    face = False

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


FACE_DIM = 512  # of InsightFace's embeddings


@dataclass(frozen=True)
class Face(Embedder):
    """One vector: a face embedding, which a recognition network gives, not the image encoder. The null image is a zero embedding.

    `raw`: the embedding as it is; otherwise it is divided by its norm.
    """

    raw: bool = False
    name = "face embeddings"
    per_picture = "a vector"
    needs_encoder = False
    face = True

    def __call__(self, encoder: ImageEncoder, pixels: Tensor) -> Tensor:
        raise ValueError(NO_FACE)

    def width(self, config: ImageConfig) -> int:
        return FACE_DIM

    def accepts(self, m: int) -> bool:
        return m == 1

    def null(self, encoder: ImageEncoder | None, width: int) -> Tensor:
        return torch.zeros(1, 1, 1, width)

    def read(self, faces: Tensor, encoder: ImageEncoder | None = None, pixels: Tensor | None = None) -> Tensor:
        """k faces, `k f` -> features `1 k 1 f`. Raises ValueError if `raw` embeddings are needed, and these have norm 1."""
        norms = faces.norm(dim=-1, keepdim=True)
        if self.raw and bool(((norms - 1).abs() < 1e-2).any()):
            raise ValueError("this adapter reads the face embedding as InsightFace gives it, `embedding`, not `normed_embedding`")
        return (faces if self.raw else faces / norms)[None, :, None]


@dataclass(frozen=True)
class FaceAndFine(Face):
    """A face embedding, padded with zeros to the width e, above the fine features of a picture of the face: 1 + m vectors.

    The null image is a zero embedding above a picture of zero pixels.
    """

    name = "face embedding and its picture's fine features"
    per_picture = "a vector and a matrix"
    needs_encoder = True

    def width(self, config: ImageConfig) -> int:
        return config.fine_dim

    def accepts(self, m: int) -> bool:
        return m > 2

    def null(self, encoder: ImageEncoder | None, width: int) -> Tensor:
        fine = FINE.null(encoder, width)
        return torch.cat([torch.zeros_like(fine[:, :, :1]), fine], dim=2)

    def read(self, faces: Tensor, encoder: ImageEncoder | None = None, pixels: Tensor | None = None) -> Tensor:
        """k faces, `k f`, and their pixels `k 3 s s` -> features `1 k 1+m e`. Raises ValueError without pixels or an encoder."""
        if encoder is None or pixels is None:
            raise ValueError("this adapter reads a face and its picture: it needs the image encoder, and `picture` in the file of the face")
        fine = encoder.fine(pixels)
        if fine.shape[-1] < faces.shape[-1]:
            raise ValueError(f"a face embedding of {faces.shape[-1]} numbers needs fine features of at least this width")
        rows = F.pad(super().read(faces)[0], (0, fine.shape[-1] - faces.shape[-1]))
        return torch.cat([rows.to(fine), fine], dim=1)[None]


NO_FACE = (
    "a FaceID adapter reads a face embedding, not a photograph: make a file of it with InsightFace (docs/drawing.md shows how), "
    "and name that file with --image"
)
GLOBAL, FINE, FACE, RAW_FACE, FACE_AND_FINE = Global(), Fine(), Face(), Face(raw=True), FaceAndFine()
