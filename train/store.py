"""Encoded rows on disk: found by a key, written once, and read at random through memory maps.

A store is a folder of packs. A pack is a safetensors file of some rows: their `keys`, `n`, and named tensors, `n ...`, in half precision.
The folder is named after the encoder's weights and the picture size, and a key is a hash of the picture. So a change of pictures,
encoder or size never reads a stale row, and an interrupted run loses at most the last `SECONDS` of work. Memory holds 8 bytes per row.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import replacing
from train import processes
from train.album import first_rows
from train.data import Data, stream
from train.fingerprint import digest

SIZE, SECONDS = 1 << 26, 30.0  # a pack is written when it has this many bytes, or is this old
FEW = 32  # pictures for each worker that reads them
Encode = Callable[[Tensor], dict[str, Tensor]]
Pack = dict[str, Tensor]


class Rows:
    """Tensors `n ...` on disk. Row i is at `places[i]` of the packs, whose rows are counted on from one to the next."""

    def __init__(self, packs: list[Tensor], places: Tensor) -> None:
        self.packs, self.places = packs, places
        self.starts = torch.tensor([0, *(len(pack) for pack in packs)]).cumsum(0)
        self.shape = torch.Size([len(places), *packs[0].shape[1:]])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read the rows `b`: `b ...`, in half precision."""
        places = self.places[rows]
        pack = torch.bucketize(places, self.starts, right=True) - 1
        values = torch.empty(len(rows), *self.shape[1:], dtype=self.packs[0].dtype)
        for i in pack.unique().tolist():
            here = pack == i
            values[here] = self.packs[i][places[here] - self.starts[i]]
        return values

    def all(self) -> Tensor:
        """Read all rows into memory."""
        return self[torch.arange(len(self))]


class Store:
    """The packs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read()

    def read(self) -> None:
        """Open all packs. Remove damaged ones, and report them on stderr."""
        files = sorted(self.folder.glob("pack-*.safetensors"))
        self.packs = [pack for file in files if (pack := _open_pack(file)) is not None]

    def places(self, keys: Tensor) -> Tensor:
        """Return where the rows with these keys are, `n`, and -1 for those that are missing."""
        if not self.packs:
            return torch.full_like(keys, -1)
        stored_keys, order = torch.cat([pack["keys"] for pack in self.packs]).sort()
        at = torch.searchsorted(stored_keys, keys).clamp(max=len(stored_keys) - 1)
        return torch.where(stored_keys[at] == keys, order[at], -1)

    def rows(self, keys: Tensor) -> dict[str, Rows]:
        """Return the named rows with these keys. Raises FileNotFoundError if some are missing."""
        places = self.places(keys)
        if (places < 0).any():
            raise FileNotFoundError(f"{self.folder} lacks what another process wrote: keep --state on a disk that all processes share")
        return {name: Rows([pack[name] for pack in self.packs], places) for name in self.packs[0] if name != "keys"}

    @contextmanager
    def writing(self) -> Iterator[Callable[[Tensor, dict[str, Tensor]], None]]:
        """Yield a function that adds rows with their keys. What was added is on disk at the end of the block, after an error too."""
        waiting, size, began = list[Pack](), 0, time.monotonic()

        def write() -> None:
            nonlocal size, began
            if waiting:
                pack = {name: torch.cat([part[name] for part in waiting]) for name in waiting[0]}
                with replacing(self.folder / f"pack-{digest(pack['keys'].tolist())}.safetensors") as file:
                    save_file(pack, file)
            waiting.clear()
            size, began = 0, time.monotonic()

        def add(keys: Tensor, tensors: dict[str, Tensor]) -> None:
            nonlocal size
            waiting.append({"keys": keys, **{name: tensor.half().cpu() for name, tensor in tensors.items()}})
            size += sum(tensor.nbytes for tensor in waiting[-1].values())
            if size >= SIZE or time.monotonic() - began > SECONDS:
                write()

        try:
            yield add
        finally:
            write()


def _open_pack(file: Path) -> Pack | None:
    """Map a pack into memory. Remove it if it is damaged, and return None."""
    try:
        pack = load_file(file)
        if any(len(tensor) != len(pack["keys"]) for tensor in pack.values()):
            raise SafetensorError("its tensors have different lengths")
        return pack
    except (SafetensorError, KeyError) as error:
        print(f"{file} is damaged ({error}); computing it again", file=sys.stderr)
        file.unlink(missing_ok=True)
    except FileNotFoundError:  # another process removed it
        pass
    return None


@torch.no_grad()
def encode_rows(
    data: Data[Tensor], keys: Tensor, encode: Encode, folder: Path, each: int = 1, workers: int | None = None
) -> dict[str, Rows]:
    """Return the named rows of encode(data.batch(i)) for all i. Row j of batch i has the key `keys[i * each + j]`.

    Only batches with rows that are not in `folder` are encoded, each separately, so the result does not depend on what was there.
    Processes share these batches, and the cores. `workers` of a process read ahead; by default as many as its share of the cores, but at
    most 16, and at most one for every `FEW` pictures: for a few, starting a worker takes longer than reading them.
    """
    store, team = Store(folder), processes.team()
    first = first_rows(keys)
    missing = (first[store.places(keys[first]) < 0] // each).unique().tolist()
    processes.wait()  # so that all processes find the same rows missing
    own = missing[team.rank :: team.size]
    cores = max(2, (os.cpu_count() or 0) // team.size)
    workers = min(16, cores, len(own) * each // FEW) if workers is None else workers
    batches = stream(data, own, workers)
    with store.writing() as add:
        for i in tqdm(own, desc=folder.name, disable=not own or team.rank > 0):
            add(keys[i * each : (i + 1) * each], encode(next(batches)))
    processes.wait()
    store.read()
    return store.rows(keys)
