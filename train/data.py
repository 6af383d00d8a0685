"""Batches of training data, as a pure function of the step: made on the fly, read from files, or computed once and kept."""

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
    """One endless stream of batches. Process `rank` of `world_size` takes batch `step * world_size + rank` of it.

    The processes of a step see different batches; n processes see in one step what one process sees in n.
    """

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T_co: ...


@dataclass(frozen=True)
class OnTheFly(Generic[T]):
    """`make(i)` is batch i."""

    make: Callable[[int], T]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T:
        return self.make(step * world_size + rank)


@dataclass(frozen=True)
class Files:
    """Picture files, one a batch, again from the start after the last: `read` turns a picture into `3 h w`; a batch is `1 3 h w`."""

    files: Sequence[Path]
    read: Callable[[Image.Image], Tensor]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Raises ValueError, naming the file, when it is not a picture."""
        return self.read(open_image(self.files[(step * world_size + rank) % len(self.files)]))[None]


@dataclass(frozen=True)
class Batch:
    """Picture-text pairs, encoded. `mean`, `std`: `b c h w` of q(z|x), scaled; `text`: tokens c_t, `b 77 c`; `image`: what an
    adapter reads, embeddings `b e` or fine features `b m e`. `empty`, `77 c`, and `null` stand for a dropped text or picture."""

    mean: Tensor
    std: Tensor
    text: Tensor
    empty: Tensor
    image: Tensor | None = None
    null: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, generator: torch.Generator) -> Tensor:
        """A sample of q(z|x) for each picture, `b c h w`."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class Pairs:
    """All pairs, in memory, in half precision. `caption`: row of `texts` for each picture; `texts`: `m 77 c`, the different
    captions' text tokens, the empty one first. `images`: `n e` or `n m e`, and `null`, `e` or `m e`, if an adapter is to read them."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    texts: Tensor
    images: Tensor | None
    null: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)

    def at(self, rows: Tensor) -> Batch:
        """These pairs, in float32."""
        image, null = (None, None) if self.images is None else (self.images[rows].float(), self.null)
        text, empty = self.texts[self.caption[rows]].float(), self.texts[0].float()
        return Batch(
            self.mean[rows].float(), self.std[rows].float(), text, empty, image, None if null is None else null.float()
        )

    def parts(self, size: int = 64) -> Iterator[Batch]:
        """All pairs in order, in parts of about equal length, at most `size`."""
        for rows in torch.arange(len(self)).tensor_split(-(-len(self) // size)):
            yield self.at(rows)


@dataclass(frozen=True)
class Cached:
    """Batches of `size` pairs. Every epoch is another permutation; fewer pairs than a batch are repeated in it."""

    pairs: Pairs
    size: int
    seed: int

    def rows(self, index: int) -> Tensor:
        """The pairs of batch `index`."""
        n = len(self.pairs)
        epoch, within = divmod(index, max(1, n // self.size))
        g = generator(self.seed + 1, epoch)
        order = torch.cat([torch.randperm(n, generator=g) for _ in range(-(-self.size // n))])
        return order[within * self.size :][: self.size]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        return self.pairs.at(self.rows(step * world_size + rank))


class _Steps(Dataset[T | Exception]):
    def __init__(self, data: Data[T]) -> None:
        self.data = data

    def __getitem__(self, step: int) -> T | Exception:
        try:
            return self.data.batch(step)
        except (ValueError, OSError) as error:  # a DataLoader would wrap it in a traceback
            return error


def stream(data: Data[T], steps: Iterable[int], workers: int) -> Iterator[T]:
    """The batches of these steps, in order, made ahead of time in worker processes, whose errors are raised here."""

    def ignore_interrupt(_: int) -> None:  # Ctrl-C reaches the workers too, but the loop decides when to stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    loader: DataLoader[T | Exception] = DataLoader(
        _Steps(data),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # it would take a number from the global one
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
