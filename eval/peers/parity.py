"""Compare our outputs with those of the public implementations at full size.  `python -m eval parity`

The weights are random, with peaky attention, in the official layouts. The error is max |a - b| / max |b|, where b is the output of the
public network in float64. Another order of summation changes the last bits, and a deep network amplifies these differences. We therefore
allow at most twice the error of the public network itself, in float32 and in bfloat16.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import check_output, write_json
from eval.peers import own_files
from eval.peers.parts import Part, Suite
from eval.peers.parts_sd15 import SD15
from eval.peers.parts_sdxl import SDXL
from eval.tables import markdown

SUITES = {"sd15": SD15, "sdxl": SDXL}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(part: Part, side: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Draw random inputs for a part; `side` is the side of the latents."""
    drawn = part.inputs(side, torch.Generator().manual_seed(1))
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in drawn)


@torch.no_grad()
def measure(suite: Suite, folder: Path, side: int = 64) -> dict[str, Any]:
    """Return {part: {dtype: [error of the public network, our error]}}."""
    suite.write(folder)
    results: dict[str, Any] = {}
    for name, part in tqdm(suite.parts.items(), desc="parity", unit="part"):
        want = part.peer(folder, torch.float64)(*inputs(part, side, torch.float64))
        gc.collect()
        results[name] = {}
        for precision, dtype in DTYPES.items():
            errors = []
            for load in (part.peer, part.ours):
                got = load(folder, dtype)(*inputs(part, side, dtype)).double()
                errors.append(float((got - want).abs().max() / want.abs().max()))
                gc.collect()
            results[name][precision] = errors
    return results


def table(results: dict[str, Any]) -> str:
    """Make the table of README.md and docs/parity.md."""
    frame = pd.DataFrame(
        [
            [part, *(f"{error:.1e}" for pair in errors.values() for error in pair)]
            for part, errors in results["parts"].items()
        ]
    )
    return markdown(frame.set_axis(["", *(name for dtype in DTYPES for name in (f"{dtype}: public", "ours"))], axis=1))


def evaluate(base: str, folder: Path, out: Path, side: int) -> dict[str, Any]:
    """Measure all parts of a base model, with random weights in `folder`, and write `out` (JSON).

    Raises ValueError if our error is more than twice the public one.
    """
    check_output(out)
    parts = measure(SUITES[base], folder, side)
    results = {"command": f"python -m eval parity --base {base} --side {side}", "latents": side, "parts": parts}
    write_json(out, results)
    pairs = {f"{part} in {name}": pair for part, errors in parts.items() for name, pair in errors.items()}
    if worse := [f"{what}: {ours:.1e} against {theirs:.1e}" for what, (theirs, ours) in pairs.items() if ours > 2 * theirs]:
        raise ValueError(f"our error is more than twice the public one: {'; '.join(worse)}")
    return results


def run(args: Namespace) -> None:
    """`python -m eval parity`; with a checkpoint, one picture from your own files."""
    if args.checkpoint:
        own_files.run(args)
        return
    if options := [name for name in ("ip_adapter", "image_encoder", "image", "prediction") if getattr(args, name)]:
        raise ValueError(f"--{options[0].replace('_', '-')} is for your own base model: name its file with --checkpoint")
    xl = args.base == "sdxl"
    state, out = args.state / "sdxl" if xl else args.state, args.out or Path("results", "parity_sdxl.json" if xl else "parity.json")
    print(table(evaluate(args.base, state, out, args.side)))
