"""Picture-text pairs, encoded for the UNet and the adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.features import Features
from train.data import Data, ShuffledBatches, map_tensors
from train.randomness import draw_normal


@dataclass(frozen=True)
class Added:
    """What SDXL's added vector is made of (`sampling.micro.added_vector`).

    `pooled`: the pooled texts, `b p`. `empty`, `p`, replaces those of dropped texts. `sizes`: (height, width) of the file, (top, left) of
    the part that is trained on, and (height, width) of that part, `b 6`.
    """

    pooled: Tensor
    empty: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Batch:
    """Encoded picture-text pairs.

    `mean`, `std`: `b c h w`, the scaled parameters of q(z|x). `text`: the text tokens c_t, `b 77 c`. `empty`, `77 c`,
    replaces dropped texts. `features`: the adapter's input, one picture each, or None without an adapter. `added`: for SDXL only.
    """

    mean: Tensor
    std: Tensor
    text: Tensor
    empty: Tensor
    features: Features | None = None
    added: Added | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def images(self, drop: Tensor) -> Tensor:
        """Return the adapter's input, `b 1 m e`, with the null image where `drop`, `b`, is true."""
        assert self.features is not None
        return self.features.drop_pictures(drop)

    def to(self, device: str) -> Batch:
        """Move the batch to a device."""
        return replace(self, **map_tensors(lambda part: part.to(device), vars(self)))

    def latents(self, generator: torch.Generator) -> Tensor:
        """Sample q(z|x) for each picture, `b c h w`, on the generator's device."""
        return self.mean + self.std * draw_normal(self.mean, generator)


class EncodedPairs(ABC):
    """Encoded picture-text pairs. `width` is that of the adapter's input."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, rows: Tensor) -> Batch:
        """Return the pairs at `rows`, in float32."""

    @property
    @abstractmethod
    def width(self) -> int: ...

    def batches(self, size: int, seed: int) -> Data[Batch]:
        """Return endless shuffled batches."""
        return ShuffledBatches(self, size, seed)

    def parts(self, device: str = "cpu", size: int = 64) -> Iterator[Batch]:
        """Yield all pairs in order, on a device, in parts of nearly equal size, at most `size`."""
        for rows in torch.arange(len(self)).tensor_split(-(-len(self) // size)):
            yield self.at(rows).to(device)


@dataclass(frozen=True)
class Pairs(EncodedPairs):
    """Pairs in memory, in half precision.

    `texts`: `m 77 c`, the text tokens of the distinct captions, the empty caption first. `caption`: `n`, each picture's row in
    `texts`. `features`: the adapter's input, one picture each, or None if there is no adapter.
    """

    mean: Tensor
    std: Tensor
    caption: Tensor
    texts: Tensor
    features: Features | None

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: str) -> Pairs:
        """Move all pairs to a device."""
        return replace(self, **map_tensors(lambda part: part.to(device), vars(self)))

    def at(self, rows: Tensor) -> Batch:
        """Return the pairs at `rows`, in float32, on the device of the pairs."""
        rows = rows.to(self.mean.device)
        text, empty = self.texts[self.caption[rows]].float(), self.texts[0].float()
        features = self.features and Features(self.features.pictures[rows].float(), self.features.null.float())
        return Batch(self.mean[rows].float(), self.std[rows].float(), text, empty, features)

    @property
    def width(self) -> int:
        assert self.features is not None
        return self.features.pictures.shape[-1]
