"""Run a function in several processes of one team, connected by gloo on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # DDP imports it: load it once, before the processes fork
import torch.multiprocessing as mp

from train.processes import join_team


def _joined(rank: int, size: int, parts: int, shard_optimizer: bool, file: str, work: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    with join_team(parts=parts, shard_optimizer=shard_optimizer, init_method=f"file://{file}?rank={rank}&world_size={size}"):
        work(rank)


def together(size: int, work: Callable[[int], None], parts: int = 0, shard_optimizer: bool = False) -> None:
    """Call work(rank) in `size` processes, and wait for them. An error in one of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = size, parts, shard_optimizer, str(Path(folder) / "store"), work
        mp.start_processes(_joined, arguments, nprocs=size, start_method="fork")
