"""Batches of training data as a function of the step: generated on the fly, read from files, or cached in memory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sampling.images import open_image
from train.randomness import generator

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Data(Protocol[T_co]):
    """An endless sequence of batches. At a step, process `rank` of `world_size` takes batch `step * world_size + rank`.

    The processes take different batches: n processes read in one step what a single process reads in n.
    """

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T_co: ...


@dataclass(frozen=True)
class OnTheFly(Generic[T]):
    """Generate batch i as `make(i)`."""

    make: Callable[[int], T]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T:
        return self.make(step * world_size + rank)


@dataclass(frozen=True)
class Files:
    """Picture files, one per batch, in a cycle. `read` maps a picture to `3 h w`; a batch is `1 3 h w`."""

    files: Sequence[Path]
    read: Callable[[Image.Image], Tensor]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Read one file. Raises ValueError, naming the file, if it is not a picture."""
        return self.read(open_image(self.files[(step * world_size + rank) % len(self.files)]))[None]


@dataclass(frozen=True)
class Batch:
    """Encoded picture-text pairs.

    `mean`, `std`: `b c h w`, the scaled parameters of q(z|x). `text`: the text tokens c_t, `b 77 c`. `image`: the adapter's input,
    embeddings `b e` or fine features `b m e`. `empty`, `77 c`, replaces a dropped text; `null`, `e` or `m e`, a dropped picture.
    """

    mean: Tensor
    std: Tensor
    text: Tensor
    empty: Tensor
    image: Tensor | None = None
    null: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, generator: torch.Generator) -> Tensor:
        """Sample q(z|x) for each picture, `b c h w`."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class Pairs:
    """All encoded pairs, in memory in half precision.

    `texts`: `m 77 c`, the text tokens of the different captions, the empty caption first. `caption`: `n`, each picture's row of
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

    def at(self, rows: Tensor) -> Batch:
        """Return the pairs at `rows`, in float32."""
        image, null = (None, None) if self.images is None else (self.images[rows].float(), self.null)
        text, empty = self.texts[self.caption[rows]].float(), self.texts[0].float()
        return Batch(
            self.mean[rows].float(), self.std[rows].float(), text, empty, image, None if null is None else null.float()
        )

    def parts(self, size: int = 64) -> Iterator[Batch]:
        """Yield all pairs in order, in parts of nearly equal length of at most `size`."""
        for rows in torch.arange(len(self)).tensor_split(-(-len(self) // size)):
            yield self.at(rows)


@dataclass(frozen=True)
class Cached:
    """Batches of `size` pairs, shuffled anew in every epoch. If there are fewer pairs than `size`, a batch repeats them."""

    pairs: Pairs
    size: int
    seed: int

    def rows(self, index: int) -> Tensor:
        """Return the rows of `pairs` that form batch `index`."""
        n = len(self.pairs)
        epoch, within = divmod(index, max(1, n // self.size))
        g = generator(self.seed + 1, epoch)
        order = torch.cat([torch.randperm(n, generator=g) for _ in range(-(-self.size // n))])
        return order[within * self.size :][: self.size]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        return self.pairs.at(self.rows(step * world_size + rank))


class _StepDataset(Dataset[T | Exception]):
    def __init__(self, data: Data[T]) -> None:
        self.data = data

    def __getitem__(self, step: int) -> T | Exception:
        try:
            return self.data.batch(step)
        except (ValueError, OSError) as error:  # return it, since a DataLoader would wrap it in a traceback
            return error


def stream(data: Data[T], steps: Iterable[int], workers: int) -> Iterator[T]:
    """Yield the batches of these steps in order. Worker processes prefetch them; errors in a worker are raised here."""

    def ignore_interrupt(_: int) -> None:  # the training loop handles Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    loader: DataLoader[T | Exception] = DataLoader(
        _StepDataset(data),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # otherwise it draws from the global generator
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
