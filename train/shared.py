"""Optimizer steps that several processes share: with DDP, or with sums whose bits do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.processes import Team
from train.randomness import share_generator
from train.sharding import sharded_adamw
from train.step import Loss, Step, Values, step_for

T = TypeVar("T")


class _WithLoss(nn.Module):
    """A module whose `forward` is its loss, as DDP needs."""

    def __init__(self, module: nn.Module, loss: Loss[Any]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any, generator: torch.Generator) -> Values:
        return self.loss(batch, generator)


class TeamStep(Step[T]):
    """A step of one process of a team. Its batches are the process's shares of the batches of the step."""

    def __init__(self, team: Team, module: nn.Module, loss: Loss[T], *settings: Any) -> None:
        self.team = team
        super().__init__(module, loss, *settings)

    def adamw(self, **settings: Any) -> torch.optim.Optimizer:
        return sharded_adamw(self.parameters, **settings) if self.team.shard_optimizer else super().adamw(**settings)

    def gather(self) -> None:
        if self.team.shard_optimizer:
            self.optimizer.consolidate_state_dict()  # type: ignore[attr-defined]

    def generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        return [share_generator(seed, share, self.device) for share in self.team.shares for seed in seeds]


class SharedStep(TeamStep[T]):
    """Compute the gradients of this process's share of every batch; DDP averages them over the processes.

    The result equals that of one process to rounding: matrix products have other sizes, and sums another order.
    """

    def __init__(self, team: Team, module: nn.Module, loss: Loss[T], *settings: Any) -> None:
        super().__init__(team, module, loss, *settings)
        self.loss = self.ddp = DistributedDataParallel(_WithLoss(module, loss), broadcast_buffers=False)

    def average(self, batches: Sequence[T], generators: Sequence[torch.Generator]) -> Values:
        with self.ddp.no_sync():
            means = self.accumulate(batches[:-1], generators[:-1], len(batches))
        last = self.accumulate(batches[-1:], generators[-1:], len(batches))
        total = torch.stack([(value + means.get(name, 0.0)).float() for name, value in last.items()])
        dist.all_reduce(total)
        return dict(zip(last, total / self.team.size, strict=True))


class TreeStep(TeamStep[T]):
    """Compute the gradients of each part of a batch by itself, and sum them in a binary tree.

    A process holds the parts of a subtree. All gather the sums of the subtrees, and add them in the same tree. So with 1, 2, 4, ...
    processes, all sums are the same to the last bit, on processors that compute the parts alike.
    """

    def average(self, batches: Sequence[T], generators: Sequence[torch.Generator]) -> Values:
        each = len(batches) // len(self.team.shares)  # batches of a step
        count = each * self.team.parts

        def leaf(i: int) -> Tensor:
            part = slice(i * each, (i + 1) * each)
            values = self.accumulate(batches[part], generators[part], count)
            self.names = [*values]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            self.optimizer.zero_grad(set_to_none=True)
            return torch.cat([g.flatten().float() for g in [*gradients, *values.values()]])

        own = tree_sum(leaf, len(self.team.shares))
        if self.team.size == 1:
            return self.unpack(own)
        every = [torch.empty_like(own) for _ in range(self.team.size)]
        dist.all_gather(every, own)
        return self.unpack(tree_sum(every.__getitem__, len(every)))

    def unpack(self, total: Tensor) -> Values:
        """Set the gradients of the parameters from the sum of all parts, and return the named scalars at its end."""
        gradients, values = total[: -len(self.names)], total[-len(self.names) :]
        for p, gradient in zip(self.parameters, gradients.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = gradient.view_as(p)
        return dict(zip(self.names, values, strict=True))


def tree_sum(leaf: Callable[[int], Tensor], count: int, first: int = 0) -> Tensor:
    """Sum leaf(first) ... leaf(first + count - 1), a power of two, pairwise: ((0 + 1) + (2 + 3)) + ..."""
    if count == 1:
        return leaf(first)
    half = count // 2
    return tree_sum(leaf, half, first) + tree_sum(leaf, half, first + half)


def step_of(team: Team, device: str, one_shape: bool, module: nn.Module, loss: Loss[T], *settings: Any) -> Step[T]:
    """Return the step of a process: see `SharedStep` and `TreeStep`; `step_for` if it is alone."""
    if team.parts:
        return TreeStep(team, module, loss, *settings)
    return step_for(device, one_shape)(module, loss, *settings) if team.size == 1 else SharedStep(team, module, loss, *settings)
