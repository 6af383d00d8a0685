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
from PIL import Image
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


@dataclass(frozen=True)
class FilePairs(EncodedPairs):
    """Encoded pairs on disk.

    `side`: of the pictures, in pixels. `mean`, `std`: `n c h w`. `inputs`: the adapter's input, `n m e`, and `null`: that of the null
    image, `1 1 m e`; or None without an adapter. `text` encodes the captions of `files`, on its device.
    """

    files: Album
    side: int
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
        side = self.side
        files = [self.files[row].size for row in rows.tolist()]
        corners = [[(int(side * n / min(size)) - side) // 2 for n in size] for size in files]
        return torch.tensor([[*size, *corner, side, side] for size, corner in zip(files, corners, strict=True)])

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
    """A user's pictures: resize the short side to `side`, then crop the centre, as in the paper."""

    files: Album
    side: int

    def __len__(self) -> int:
        return len(self.files)

    def pairs(self, vae: VAE, text: Text, image: ImageEncoder | None, folder: Path, reads: Embedder = GLOBAL) -> FilePairs:
        """Encode the pictures that are not in the cache, one at a time. Without an `image` encoder, there are no features."""

        def square(picture: Image.Image) -> Tensor:
            crop = centre_square(picture, self.side, Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(crop, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1

        keys = self.files.keys
        mean, std = latents(vae, Files(self.files, square), keys, folder, str(self.side))
        inputs, null = None, None
        if image is not None:
            inputs, null = features(image, Files(self.files, image.preprocess), keys, folder, reads)
        text.tokenize([self.files[i].text for i in range(min(1000, len(self)))])  # warns of words that the vocabulary lacks
        return FilePairs(self.files, self.side, mean, std, inputs, null, text)

    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures and captions."""
        return {**self.files.made_from(), "side": str(self.side)}
