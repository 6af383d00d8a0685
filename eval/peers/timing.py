"""How long things take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch.utils.benchmark import Timer

Run = Callable[[], Any]
Row = dict[str, Any]


def seconds(run: Run) -> float:
    """The time of one run, after a run that warms up."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.0).median


def medians(pairs: Sequence[tuple[float, float]]) -> Row:
    """The medians of our and their seconds, and of the ratio ours / theirs in each round."""
    frame = pd.DataFrame(pairs, columns=["ours", "theirs"])
    return {str(key): value for key, value in frame.assign(ratio=frame["ours"] / frame["theirs"]).median().items()}


def beside(ours: Run, theirs: Run, rounds: int) -> Row:
    """Time both sides in turn."""
    return medians([(seconds(ours), seconds(theirs)) for _ in range(rounds)])


def peak(dtype: torch.dtype, n: int = 4096) -> float:
    """The speed of the fastest of five matrix products, in FLOP/s."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5))
