"""Aspect buckets: train on pictures in several shapes of nearly the same area, instead of squares cut out of them.

Each picture goes to the shape that is nearest to its own. It is resized to cover that shape, and its centre is cut out. All pictures of
a batch have one shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from model.features import GLOBAL, Embedder
from model.image_encoder import ImageEncoder
from model.text_encoder import Text
from model.vae import VAE
from train.album import Album
from train.data import Data
from train.file_pairs import CaptionBatches, FilePairs, FilePictures, Shape
from train.pairs import Batch, EncodedPairs
from train.randomness import generator

LONGEST = 2  # largest ratio of two sides


def shapes(side: int, multiple: int) -> list[Shape]:
    """List shapes (height, width) of at most side x side pixels, whose sides are multiples of `multiple`, from flat to tall.

    Raises ValueError unless `side` is a multiple.
    """
    if side % multiple:
        raise ValueError(f"with --buckets, --side must be a multiple of {multiple}, not {side}")
    pairs = [(height, side * side // height // multiple * multiple) for height in range(multiple, 2 * side, multiple)]
    return [(height, width) for height, width in pairs if width and max(height, width) <= LONGEST * min(height, width)]


def nearest(size: Shape, choices: Sequence[Shape]) -> int:
    """Return the index of the shape whose ratio of height to width is nearest to that of a picture, on a log scale."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(choices)), key=lambda i: abs(math.log(choices[i][0] / choices[i][1]) - ratio))


@dataclass(frozen=True)
class BucketPairs(EncodedPairs):
    """Encoded pairs, `pools` of one shape each. Rows are counted through all pools."""

    files: Album
    pools: tuple[FilePairs, ...]

    def __len__(self) -> int:
        return sum(map(len, self.pools))

    def at(self, rows: Tensor) -> Batch:
        """Return the pairs at `rows`. Raises ValueError if they have several shapes."""
        first = 0
        for pool in self.pools:
            if bool(((rows >= first) & (rows < first + len(pool))).all()):
                return pool.at(rows - first)
            first += len(pool)
        raise ValueError("a batch has pictures of one shape")

    @property
    def width(self) -> int:
        return self.pools[0].width

    def batches(self, size: int, seed: int) -> Data[Batch]:
        return BucketBatches(self.pools, size, seed)

    def parts(self, device: str = "cpu", size: int = 64) -> Iterator[Batch]:
        for pool in self.pools:
            yield from pool.parts(device, size)


@dataclass(frozen=True)
class BucketBatches:
    """Endless batches, each from one pool. An epoch shuffles each pool, and then the batches of all pools.

    A pool of n pictures gives n e // size batches in the first e epochs, so that pictures of rare shapes are not seen more often than
    others. A batch of a pool with fewer pictures than `size` repeats them.
    """

    pools: tuple[FilePairs, ...]
    size: int
    seed: int
    one_shape: ClassVar[bool] = False

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        bucket, index = self.place(step)
        return CaptionBatches(self.pools[bucket], self.size, self.seed + 10 * bucket).batch(index, rank, world_size)

    def place(self, step: int) -> tuple[int, int]:
        """Return the pool of a step's batch, and its number among the batches of that pool."""
        sizes = torch.tensor([len(pool) for pool in self.pools])
        epoch = step * self.size // int(sizes.sum())  # or a later one, since batches are whole
        while int((after := sizes * (epoch + 1) // self.size).sum()) <= step:
            epoch += 1
        before = sizes * epoch // self.size
        last = (after - before).cumsum(0)
        chosen = int(_order(int(last[-1]), self.seed, epoch)[step - int(before.sum())])
        bucket = int((last <= chosen).sum())
        return bucket, chosen - int(last[bucket]) + int(after[bucket])


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the n batches of an epoch."""
    return torch.randperm(n, generator=generator(seed + 3, epoch))


@dataclass(frozen=True)
class BucketPictures:
    """A user's pictures in the shapes that `shapes(side, multiple)` lists."""

    files: Album
    side: int
    multiple: int

    def __len__(self) -> int:
        return len(self.files)

    def pairs(self, vae: VAE, text: Text, image: ImageEncoder | None, folder: Path, reads: Embedder = GLOBAL) -> BucketPairs:
        """Encode the pictures that are not in the cache, shape by shape."""
        choices = shapes(self.side, self.multiple)
        bucket = torch.tensor([nearest(file.size, choices) for file in tqdm(self.files, desc="shapes of pictures")])
        parts = [(self.files.select((bucket == i).nonzero()[:, 0]), choices[i]) for i in bucket.unique().tolist()]
        return BucketPairs(self.files, tuple(FilePictures(files, *shape).pairs(vae, text, image, folder, reads) for files, shape in parts))

    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures and captions."""
        return {**self.files.made_from(), "side": f"buckets of {self.side}, {self.multiple}"}
