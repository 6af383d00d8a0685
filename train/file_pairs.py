"""A user's pictures and captions, encoded for the UNet and the adapter.

Latents and features are encoded once and stay on disk (train/store.py). Captions are encoded when a batch is read: stored, their tokens
would take more space than everything else, and encoding them takes less than one percent of the time of a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model.features import GLOBAL, Embedder, Features
from model.image_encoder import ImageEncoder, centre_square
from model.text_encoder import Text
from model.vae import VAE
from train.album import Album
from train.data import Data, Files, ShuffledBatches
from train.encode import encode_texts, features, latents
from train.pairs import Added, Batch, EncodedPairs
from train.randomness import Share, generator
from train.store import Rows

Shape = tuple[int, int]  # (height, width)


def cover(picture: Image.Image, shape: Shape) -> Image.Image:
    """Resize a picture to cover a shape, and cut out its centre: for a square, the short side becomes `side`, as in the paper."""
    height, width = shape
    if height == width:
        return centre_square(picture, height, Image.Resampling.BILINEAR)
    return ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)


def corner_of(size: Shape, shape: Shape) -> Shape:
    """Return the (top, left) corner of the centre in a picture resized to cover `shape`, rounded as in the official trainer."""
    short = 0 if size[1] * shape[0] >= size[0] * shape[1] else 1  # the side that is resized to that of the shape
    resized = [int(shape[short] * n / size[short]) for n in size]
    return (resized[0] - shape[0]) // 2, (resized[1] - shape[1]) // 2


@dataclass(frozen=True)
class FilePairs(EncodedPairs):
    """Encoded pairs on disk.

    `shape`: of the pictures, in pixels. `mean`, `std`: `n c h w`. `inputs`: the adapter's input, `n m e`, and `null`: that of the null
    image, `1 1 m e`; or None without an adapter. `text` encodes the captions of `files`, on its device.
    """

    files: Album
    shape: Shape
    mean: Rows
    std: Rows
    inputs: Rows | None
    null: Tensor | None
    text: Text

    def __len__(self) -> int:
        return len(self.files)

    def at(self, rows: Tensor, picks: Sequence[int] = ()) -> Batch:
        """Return the pairs at `rows`, in float32. Of n captions, take number pick mod n, or the first without `picks`."""
        captions = [self.files[row].texts for row in rows.tolist()]
        sentences = [texts[pick % len(texts)] for texts, pick in zip(captions, picks or [0] * len(captions), strict=True)]
        with warnings.catch_warnings(action="ignore"):  # about words that the vocabulary lacks, in every batch
            texts = encode_texts(self.text, sentences)
        inputs = None
        if self.inputs is not None and self.null is not None:
            inputs = Features(self.inputs[rows][:, None].float(), self.null.float())
        added = None
        if texts.pooled is not None:
            added = Added(texts.pooled[texts.rows].float(), texts.pooled[0].float(), self.sizes(rows))
        tokens = texts.tokens.float()
        return Batch(self.mean[rows].float(), self.std[rows].float(), tokens[texts.rows], tokens[0], inputs, added)

    def sizes(self, rows: Tensor) -> Tensor:
        """Return what SDXL reads about the pictures at `rows`, `b 6`: the size of the file, and the corner and the size of the crop.

        Pictures are resized before they are cropped, so the corner counts pixels of the resized picture, as in the official trainer.
        """
        files = [self.files[row].size for row in rows.tolist()]
        return torch.tensor([[*size, *corner_of(size, self.shape), *self.shape] for size in files])

    @property
    def width(self) -> int:
        assert self.inputs is not None
        return self.inputs.shape[-1]

    def batches(self, size: int, seed: int) -> Data[Batch]:
        return CaptionBatches(self, size, seed)


@dataclass(frozen=True)
class CaptionBatches(ShuffledBatches[Batch]):
    """Shuffled batches. If a picture has several captions, one is drawn, from the seed, the step and the position in the batch."""

    pool: FilePairs

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        rows, g = self.rows(step), generator(self.seed + 2, step)
        share, picks = Share(rank, world_size).rows(len(rows)), torch.randint(1 << 32, (len(rows),), generator=g)
        return self.pool.at(rows[share], picks[share].tolist())


@dataclass(frozen=True)
class FilePictures:
    """A user's pictures, all in one shape."""

    files: Album
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size(self) -> str:
        return str(self.width) if self.width == self.height else f"{self.width}x{self.height}"

    def pairs(self, vae: VAE, text: Text, image: ImageEncoder | None, folder: Path, reads: Embedder = GLOBAL) -> FilePairs:
        """Encode the pictures that are not in the cache, one at a time. Without an `image` encoder, there are no features."""

        def crop(picture: Image.Image) -> Tensor:
            return torch.from_numpy(np.array(cover(picture, shape), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1

        keys, shape = self.files.keys, (self.height, self.width)
        mean, std = latents(vae, Files(self.files, crop), keys, folder, self.size)
        inputs, null = None, None
        if image is not None:
            inputs, null = features(image, Files(self.files, image.preprocess), keys, folder, reads)
        text.tokenize([self.files[i].text for i in range(min(1000, len(self)))])  # warns of words that the vocabulary lacks
        return FilePairs(self.files, shape, mean, std, inputs, null, text)

    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures and captions."""
        return {**self.files.made_from(), "side": self.size}
