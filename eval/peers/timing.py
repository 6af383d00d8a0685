"""Time a function, or two functions alternately; and the training step that is timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

Run = Callable[[], Any]
Timing = dict[str, Any]  # named measurements


def training_step(loss: Callable[[], Tensor], weights: Iterable[Tensor]) -> Run:
    """Return a training step: the loss, its gradients, and AdamW."""
    optimizer = torch.optim.AdamW(weights, 1e-4, weight_decay=0.01)

    def run() -> None:
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def seconds(run: Run) -> float:
    """Time one run in seconds, after a warm-up run."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.0).median


def memory(line: str) -> int:
    """Read a line of /proc/self/status in bytes: RssAnon, the memory that is no mapped file, or VmHWM, the peak."""
    return 1024 * int(re.findall(rf"{line}:\s*(\d+)", Path("/proc/self/status").read_text())[0])


def beside(ours: Run, theirs: Run, rounds: int) -> Timing:
    """Time both implementations alternately; return the medians over rounds of our seconds, their seconds, and the ratio ours / theirs."""
    frame = pd.DataFrame([(seconds(ours), seconds(theirs)) for _ in range(rounds)], columns=["ours", "theirs"])
    return {str(key): value for key, value in frame.assign(ratio=frame["ours"] / frame["theirs"]).median().items()}


def peak(dtype: torch.dtype, n: int = 4096) -> float:
    """Return the speed of the fastest of five matrix products, in FLOP/s."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5))
