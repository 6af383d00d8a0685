"""Recorded steps: a double of the CUDA graph reads every batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import PLAN, Batch, Labelled, Net, make, noisy_loss, numbers, same, weight_sum
from torch import Tensor, nn

from train import shared
from train.data import OnTheFly
from train.loop import run
from train.step import GraphStep


class Replayed(GraphStep[Any]):
    """A recorded step without a GPU: replaying runs the recorded function on whatever the recorded batch holds by then."""

    capturable = False

    def _warm_up(self) -> Tensor:
        self.warm += 1
        self.optimizer.zero_grad(set_to_none=True)
        return self._step()

    def idle(self) -> bool:
        return True

    def _record(self) -> None:
        graph: Any = SimpleNamespace(replay=lambda: setattr(self, "values", self._warm_up()))
        self.graph = graph


KINDS: dict[str, Callable[[Batch], Any]] = {
    "tuple": lambda batch: batch,
    "dict in a tuple": lambda batch: (batch[0], {"y": batch[1]}),
    "dataclass": lambda batch: Labelled(*batch),
    "tensor": lambda batch: torch.cat(batch, dim=1),
}


def parts_of(batch: Any) -> Batch:
    if isinstance(batch, Tensor):
        return batch[:, :3], batch[:, 3:]
    x, y = (batch.x, batch.y) if isinstance(batch, Labelled) else batch
    return x, y["y"] if isinstance(y, dict) else y


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_reads_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int, accumulate: int
) -> None:
    """On a GPU, a step is replayed on memory that must be filled anew with every batch, whatever a batch is made of."""

    def trained(folder: Path) -> tuple[nn.Module, list[dict[str, Any]]]:
        net = Net()

        def loss(batch: Any, g: torch.Generator) -> dict[str, Tensor]:
            return noisy_loss(net)(parts_of(batch), g)

        data = OnTheFly(lambda step: KINDS[kind](make(step)))
        return run(replace(PLAN, accumulate=accumulate), net, data, loss, weight_sum, folder, workers)

    kept, log = trained(tmp_path / "plain")
    monkeypatch.setattr(shared, "step_for", lambda *_: Replayed)
    kept_too, log_too = trained(tmp_path / "recorded")
    assert same(kept, kept_too) and numbers(log_too) == numbers(log) and len(log) == 12
