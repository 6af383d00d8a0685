"""The processes of one run, started by torchrun: who they are, how they share a batch, and how they end together.

`python -m train` alone is one process; `torchrun --nproc-per-node N -m train` starts N, which find each other through torchrun.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from train.randomness import WHOLE, Share

WAIT = timedelta(minutes=30)  # how long a process waits for the others, for example while the first one validates


@dataclass(frozen=True)
class Team:
    """This process's `rank` among the `size` processes of a run.

    With `parts`, a batch is always computed in so many parts, whatever the number of processes. With `shard_optimizer`, each process keeps
    some of the optimizer's moments. `store` holds what they tell each other.
    """

    rank: int = 0
    size: int = 1
    parts: int = 0
    shard_optimizer: bool = False
    store: Any = None

    @property
    def shares(self) -> tuple[Share, ...]:
        """Return the shares of a batch that this process computes, in order: neighbours, so that they form a subtree of a binary tree."""
        if self.size == 1 and not self.parts:
            return (WHOLE,)
        parts = self.parts or self.size
        each = parts // self.size
        return tuple(Share(i, parts) for i in range(self.rank * each, (self.rank + 1) * each))


_team = Team()


def team() -> Team:
    """Return the processes of this run: a single one outside `join_team`."""
    return _team


@contextmanager
def join_team(
    device: str = "cpu", parts: int = 0, shard_optimizer: bool = False, init_method: str = "env://"
) -> Iterator[Team]:
    """Join the processes that torchrun started, if it did. Each takes the GPU of its local rank.

    With `parts`, a power of two, sums do not depend on the number of processes: see `shared.TreeStep`. For `shard_optimizer`, see
    `sharding.sharded_adamw`.
    """
    global _team
    if init_method == "env://" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _team = Team(parts=parts)
    else:
        store, rank, size = next(rendezvous(init_method))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # one machine: torchrun keeps the notes of the processes before a restart
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        if device.startswith("cuda"):
            torch.cuda.set_device(own_gpu(device, int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
        _team = Team(rank, size, parts, shard_optimizer, store)
    if _team.size == 1:
        try:
            yield _team
        finally:
            _team = Team()
    else:
        yield _team  # after an error, the team stays, since `speaks` asks it
        dist.barrier()  # the first process may host the store of the others
        dist.destroy_process_group()
        _team = Team()


def own_gpu(device: str, local_rank: int, count: int) -> int:
    """Return the GPU of a process. Raises ValueError if this machine has too few, or `device` names a single one."""
    if ":" in device:
        raise ValueError(f"--device {device} is a single GPU: give --device cuda, and each process takes its own")
    if local_rank >= count:
        raise ValueError(f"this machine has {count} GPUs: start at most {count} processes on it with --nproc-per-node")
    return local_rank


def check_shares(batch: int) -> None:
    """Raise ValueError if the processes cannot share batches of this size equally."""
    parts, size = _team.parts or _team.size, _team.size
    if parts % size:
        raise ValueError(f"{size} processes cannot share the {parts} parts of --deterministic: use 1, 2, 4, ... processes, at most {parts}")
    if batch % parts:
        share = "parts of --deterministic" if _team.parts else "processes"
        raise ValueError(f"--batch {batch} cannot be shared equally by {parts} {share}: choose a multiple of {parts}")


def check_same(values: Mapping[str, Any]) -> None:
    """Raise ValueError if these values are not the same in all processes; the message names those that differ.

    All processes must call this with the same names.
    """
    if _team.size == 1:
        return
    hashes = [hashlib.sha256(json.dumps(value, default=str).encode()).digest()[:7] for value in values.values()]
    own = torch.tensor([int.from_bytes(each) for each in hashes])
    every = [torch.empty_like(own) for _ in range(_team.size)]
    dist.all_gather(every, own)
    same = (torch.stack(every) == own).all(dim=0).tolist()
    if other := [name for name, equal in zip(values, same, strict=True) if not equal]:
        raise ValueError(
            f"the processes read different {', '.join(other)}: give all of them the same files, and keep --state on a disk that they share"
        )


def largest_of_all(*numbers: int) -> list[int]:
    """Return the largest value of each number in all processes."""
    if _team.size == 1:
        return [*numbers]
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def wait() -> None:
    """Wait until all processes are here."""
    largest_of_all(0)


def speaks() -> bool:
    """Return True in the first process of a run that calls this, so that an error is printed once."""
    with suppress(Exception):  # the store may be gone; a process that cannot ask reports
        return _team.store is None or _team.store.add("errors", 1) == 1
    return True


def lost_another(error: RuntimeError) -> bool:
    """Return whether an error means that another process ended."""
    message = str(error).lower()
    return _team.size > 1 and (isinstance(error, dist.DistError) or "gloo" in message or "connection" in message)
