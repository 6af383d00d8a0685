"""A network of a few weights, its noisy data, and a run of twelve steps that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.clock import ROW
from train.data import OnTheFly
from train.loop import run
from train.plan import Plan

PLAN = Plan("tiny", steps=12, batch=4, lr=1e-2, warmup=3, ema=0.9, save_every=100, validate_every=4)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Labelled:
    x: Tensor
    y: Tensor
    nothing: None = None


class Net(nn.Module):
    """With a normalisation that counts, so that state has integers too, and a weight that doesn't train."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.frozen


def make(step: int, n: int = 4) -> Batch:
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(n, 3, generator=g), torch.randn(n, 2, generator=g)


def noisy_loss(net: nn.Module) -> Callable[[Batch, torch.Generator], dict[str, Tensor]]:
    def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        x, y = batch
        error = net(x + 0.1 * torch.randn(x.shape, generator=g)) - y
        return {"loss": error.square().mean(), "largest": error.detach().abs().max()}

    return loss


def weight_sum(module: nn.Module) -> dict[str, float]:
    return {"sum": float(sum(p.detach().double().sum() for p in module.parameters()))}


def train(
    folder: Path, plan: Plan = PLAN, seed: int = 0, make: Callable[[int], Batch] = make, workers: int = 0, **options: Any
) -> tuple[Net, nn.Module, list[dict[str, Any]]]:
    """(the module, what `run` says to keep, the log)."""
    net = Net(seed)
    kept, log = run(plan, net, OnTheFly(make), noisy_loss(net), weight_sum, folder, workers, **options)
    return net, kept, log


def numbers(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without its clock."""
    return [{k: v for k, v in row.items() if k not in ROW} for row in log]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
