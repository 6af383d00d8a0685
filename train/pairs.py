"""Picture-text pairs, encoded for the UNet and the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.data import mapped


@dataclass(frozen=True)
class Batch:
    """Encoded picture-text pairs.

    `mean`, `std`: `b c h w`, the scaled parameters of q(z|x). `text`: the text tokens c_t, `b 77 c`. `image`: the adapter's input,
    embeddings `b e` or fine features `b m e`. `empty`, `77 c`: replaces dropped texts. `null`, `e` or `m e`: replaces dropped pictures.
    """

    mean: Tensor
    std: Tensor
    text: Tensor
    empty: Tensor
    image: Tensor | None = None
    null: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: str) -> Batch:
        """Move the batch to a device."""
        return mapped(lambda part: part.to(device), self)

    def latents(self, generator: torch.Generator) -> Tensor:
        """Sample q(z|x) for each picture, `b c h w`, on the generator's device."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Pairs:
    """All encoded pairs, in memory in half precision.

    `texts`: `m 77 c`, the text tokens of the distinct captions, the empty caption first. `caption`: `n`, each picture's row in
    `texts`. `images`, `n e` or `n m e`, and `null`, `e` or `m e`: the adapter's input, or None if there is no adapter.
    """

    mean: Tensor
    std: Tensor
    caption: Tensor
    texts: Tensor
    images: Tensor | None
    null: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: str) -> Pairs:
        """Move all pairs to a device."""
        return mapped(lambda part: part.to(device), self)

    def at(self, rows: Tensor) -> Batch:
        """Return the pairs at `rows`, in float32, on the device of the pairs."""
        rows = rows.to(self.mean.device)
        image, null = (None, None) if self.images is None else (self.images[rows].float(), self.null)
        text, empty = self.texts[self.caption[rows]].float(), self.texts[0].float()
        return Batch(
            self.mean[rows].float(), self.std[rows].float(), text, empty, image, None if null is None else null.float()
        )

    def parts(self, device: str = "cpu", size: int = 64) -> Iterator[Batch]:
        """Yield all pairs in order, on a device, in parts of nearly equal size, at most `size`."""
        for rows in torch.arange(len(self)).tensor_split(-(-len(self) // size)):
            yield self.at(rows).to(device)
