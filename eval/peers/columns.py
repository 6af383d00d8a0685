"""Time a UNet step of diffusers, of this project, and of its fast form, in separate processes that take turns.

`python -m eval.peers.columns FOLDER COLUMN DTYPE` measures one column in this process and prints the seconds.
`python -m eval benchmark` runs it for all columns, round by round.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from checkpoints.adapters import load_adapter
from checkpoints.single_file import load_single
from eval.peers import official
from eval.peers.timing import Run, seconds
from eval.tables import markdown
from model.context import Context
from model.fast import fasten
from model.image_encoder import VIT_H
from sampling.machine import keep_memory

# A name, and whether the process keeps freed memory (sampling/machine.py).
COLUMNS = {
    "diffusers": ("theirs", False),
    "plain": ("plain", False),
    "fast": ("fast", True),
    "diffusers, memory kept": ("theirs", True),
}
RATIOS = {
    "plain / diffusers": ("plain", "diffusers"),
    "fast / diffusers": ("fast", "diffusers"),
    "fast / diffusers, memory kept in both": ("fast", "diffusers, memory kept"),
}


def inputs(dtype: torch.dtype, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Return latents `b 4 64 64`, text tokens `b 77 768` and image embeddings `b 1024`."""
    g = torch.Generator().manual_seed(1)
    shapes = (batch, 4, 64, 64), (batch, 77, 768), (batch, 1024)
    return tuple(torch.randn(*shape, generator=g).to(dtype) for shape in shapes)


def step_of(folder: Path, side: str, dtype: torch.dtype) -> Run:
    """Return a step of one side: a guidance batch of 2 with the adapter. `side` is "theirs", "plain" or "fast"."""
    x, text, image = inputs(dtype)
    if side == "theirs":
        peer, conditions = official.peer_unet(folder, dtype), {"image_embeds": [image[:, None]]}
        return lambda: peer(x, 500, text, added_cond_kwargs=conditions)
    unet = load_single(folder / official.SINGLE, dtype).unet
    context = load_adapter(folder / official.ADAPTER, unet, VIT_H, dtype)(Context(text), image)
    unet = fasten(unet) if side == "fast" else unet
    return lambda: unet(x, 500, context)


def columns(folder: Path, rounds: int, dtype: str) -> dict[str, Any]:
    """Measure all columns `rounds` times, each time in a new process. Return median and range of the seconds and of the ratios.

    `ours` is the fast form, and `theirs` diffusers' default.
    """
    times = pd.DataFrame([{name: measured_seconds(folder, name, dtype) for name in COLUMNS} for _ in range(rounds)])
    ratios = pd.DataFrame({name: times[a] / times[b] for name, (a, b) in RATIOS.items()})
    row = {"ours": times["fast"].median(), "theirs": times["diffusers"].median(), "ratio": ratios["fast / diffusers"].median()}
    return row | {"seconds": _summary(times), "ratios": _summary(ratios)}


def measured_seconds(folder: Path, column: str, dtype: str) -> float:
    """Measure the seconds of a step of one column, in a process of its own."""
    command = [sys.executable, "-m", "eval.peers.columns", str(folder), column, dtype]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def _summary(frame: pd.DataFrame) -> dict[str, list[float]]:
    """Return [median, smallest, largest] of each column."""
    return {str(name): [float(column.median()), float(column.min()), float(column.max())] for name, column in frame.items()}


def table(row: dict[str, Any]) -> str:
    """Make a table of the medians, with their ranges."""
    lines = [[name, *(f"{value:.2f} s" for value in values)] for name, values in row["seconds"].items()]
    lines += [[name, *(f"{value:.3f}" for value in values)] for name, values in row["ratios"].items()]
    return markdown(pd.DataFrame(lines, columns=["", "median", "smallest", "largest"]))


def main() -> None:
    folder, column, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
    side, keeps = COLUMNS[column]
    with torch.no_grad():
        step = step_of(folder, side, dtype)
        if keeps:
            keep_memory()
        print(seconds(step))


if __name__ == "__main__":
    main()
