"""Batches of training data as a function of the step: generated on the fly, read from files, or cached in memory."""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.album import Album
from train.randomness import Share, generator

FORK = "fork" in multiprocessing.get_all_start_methods()
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Apply `function` to all tensors in a batch: a tensor, None, or a tuple, dict or dataclass of these.

    Raises TypeError for anything else, because a tensor inside would be missed.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple):
        return tuple(map_tensors(function, part) for part in batch)
    if isinstance(batch, dict):
        return {name: map_tensors(function, part) for name, part in batch.items()}
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: map_tensors(function, getattr(batch, f.name)) for f in fields(batch)})
    if batch is None:
        return None
    raise TypeError(f"a batch may not hold {type(batch).__name__}")


def tensors(batch: Any) -> list[Tensor]:
    """List all tensors in a batch."""
    result = list[Tensor]()
    map_tensors(result.append, batch)
    return result


class Data(Protocol[T_co]):
    """An endless sequence of batches. Process `rank` of `world_size` reads its share of batch `step`.

    The shares have equal size. Their union is the same batch for any number of processes. If the batches differ in shape, `one_shape` is
    False: then a GPU cannot record a step.
    """

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T_co: ...


@dataclass(frozen=True)
class OnTheFly(Generic[T]):
    """Generate batch i as `make(i)`; a share of it is a part of its rows."""

    make: Callable[[int], T]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T:
        if world_size == 1:
            return self.make(step)
        rows = Share(rank, world_size).rows
        return cast(T, map_tensors(lambda x: x[rows(len(x))], self.make(step)))


@dataclass(frozen=True)
class Files:
    """Pictures, one per batch, in a cycle. `read` maps a picture to `3 h w`; a batch is `1 3 h w`, which processes cannot share."""

    files: Album
    read: Callable[[Image.Image], Tensor]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Read one file. Raises ValueError, naming the file, if it is not a picture."""
        return self.read(self.files[step % len(self.files)].open())[None]


class Pool(Protocol[T_co]):
    """Training data in memory; `at(rows)` is a batch of some of it."""

    def __len__(self) -> int: ...

    def at(self, rows: Tensor) -> T_co: ...


@dataclass(frozen=True)
class ShuffledBatches(Generic[T]):
    """Batches of `size` items of a pool, shuffled anew in every epoch. If there are fewer items, a batch repeats them."""

    pool: Pool[T]
    size: int
    seed: int

    def rows(self, index: int) -> Tensor:
        """Return the rows of the pool that form batch `index`."""
        n = len(self.pool)
        epoch, within = divmod(index, max(1, n // self.size))
        return _order(n, self.size, self.seed, epoch)[within * self.size :][: self.size]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T:
        rows = self.rows(step)
        return self.pool.at(rows[Share(rank, world_size).rows(len(rows))])


@dataclass(frozen=True)
class ProcessBatches(Generic[T]):
    """The batches that a process reads in turn: in each step, its shares of all `accumulate` batches of the step."""

    data: Data[T]
    shares: Sequence[Share]
    accumulate: int

    @property
    def each(self) -> int:
        """The number of batches of a step."""
        return len(self.shares) * self.accumulate

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> T:
        step, within = divmod(step, self.each)
        share, part = divmod(within, self.accumulate)
        return self.data.batch(step * self.accumulate + part, *self.shares[share])


@functools.lru_cache(maxsize=4)
def _order(n: int, size: int, seed: int, epoch: int) -> Tensor:
    """Return the rows of an epoch in order, repeated if there are fewer than `size`."""
    g = generator(seed + 1, epoch)
    return torch.cat([torch.randperm(n, generator=g) for _ in range(-(-size // n))])


class _StepDataset(Dataset[T | Exception]):
    def __init__(self, data: Data[T]) -> None:
        self.data = data

    def __getitem__(self, step: int) -> T | Exception:
        try:
            return self.data.batch(step)
        except (ValueError, OSError) as error:  # return it, since a DataLoader would wrap it in a traceback
            return error


def _identity(batch: T) -> T:
    """Keep a batch as it is: by default, a DataLoader would turn tuples into lists."""
    return batch


def stream(data: Data[T], steps: Iterable[int], workers: int) -> Iterator[T]:
    """Yield the batches of these steps in order. Worker processes prefetch them; errors in a worker are raised here.

    Workers are forked, since most data cannot be pickled. Where that is impossible (Windows), this process makes the batches.
    """
    workers = workers if FORK else 0

    def ignore_interrupt(_: int) -> None:  # the training loop handles Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    loader: DataLoader[T | Exception] = DataLoader(
        _StepDataset(data),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
        collate_fn=_identity,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # otherwise it draws from the global generator
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
