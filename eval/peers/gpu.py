"""Compare speed and memory with diffusers on one device, a GPU above all.  `python -m eval.peers.gpu --device cuda`

It needs neither the internet nor files: all weights are random, because speed does not depend on them. Each line is printed and saved as
soon as it is measured, the most important first. If diffusers is not installed, only this project is measured. `limit` is the time that
the arithmetic of a step would take at the speed of a large matrix product on this device.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from checkpoints.files import check_output, read_json, write_json
from eval.device import processor
from eval.peers.gpu_rows import picture, step, training
from eval.peers.random_networks import Setting, tiny
from eval.peers.timing import Timing
from eval.tables import markdown
from sampling.device import check_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def rows(s: Setting) -> dict[str, Callable[[], Timing]]:
    """Return the functions that measure each line, by name, in the order in which they run."""
    few, many = s.batches
    functions: dict[str, Callable[[], Timing]] = {}
    functions |= {f"eager {name}, batch {few}": partial(step, s, dtype, few) for name, dtype in DTYPES.items()}
    functions |= {
        f"training step, batch {s.training}": partial(training, s),
        f"{s.steps}-step picture, bf16": partial(picture, s, DTYPES["bf16"]),
    }
    modes = "reduce-overhead", "max-autotune"
    compiled = {
        f"compiled {name}, batch {batch}, {mode}": partial(step, s, dtype, batch, mode)
        for mode, (name, dtype), batch in product(modes, DTYPES.items(), s.batches)
    }
    first = next(iter(compiled))
    functions |= {first: compiled[first]}
    functions |= {f"eager {name}, batch {many}": partial(step, s, dtype, many) for name, dtype in DTYPES.items()}
    functions |= compiled
    return functions


def evaluate(setting: Setting, out: Path, only: list[str]) -> dict[str, Any]:
    """Measure all lines, or those whose names start with one of `only`, and keep the others of `out`. After each line, print it and
    write `out` (JSON).

    If a line fails, its error is saved and the others still run. Raises ValueError if `out` is from another device.
    """
    check_device(setting.device)
    check_output(out)
    device = processor(setting.device)
    before = read_json(out) if only and out.exists() else {}
    if before.get("device", device) != device:
        raise ValueError(f"{out} was measured on {before['device']}, and this is {device}: choose another file with --out")
    results: dict[str, Any] = before | {"command": "python -m eval.peers.gpu", "device": device, "torch": torch.__version__}
    for name, run in rows(setting).items():
        if only and not name.startswith(tuple(only)):
            continue
        torch._dynamo.reset()
        try:
            with torch.no_grad():
                results[name] = run()
        except RuntimeError as error:  # out of memory, or no compiler
            results[name] = {"error": str(error).partition("\n")[0]}
        print(name, json.dumps(results[name]), flush=True)
        write_json(out, results)
        gc.collect()
        if setting.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return results


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/benchmark.md: milliseconds and GB of each line, the ratio to diffusers, and the limit."""
    rows = []
    for name, row in results.items():
        if isinstance(row, dict) and "theirs" in row:
            sides = row["ours"], row["theirs"]
            times = [f"{1000 * side['seconds']:,.1f} ms" for side in sides]
            limit = f"{1000 * row['limit']:.1f} ms" if "limit" in row else ""
            memory = [f"{side['memory']:.1f} GB" for side in sides if "memory" in side]
            rows.append([name, *times, f"{sides[0]['seconds'] / sides[1]['seconds']:.2f}", limit, " / ".join(memory)])
    columns = ["", "ours", "diffusers", "ratio", "limit", "memory, ours / diffusers"]
    return f"Measured on one {results['device']} with torch {results['torch']}.\n\n{markdown(pd.DataFrame(rows, columns=columns))}"


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m eval.peers.gpu", description=__doc__)
    p.add_argument("--device", default="cuda", help="device to measure (default: cuda)")
    p.add_argument("--out", type=Path, default=Path("results/gpu.json"), help="file of the results (default: results/gpu.json)")
    p.add_argument("--tiny", action="store_true", help="try the script at a tiny size; the numbers mean nothing")
    description = "measure only lines whose names begin with this, and keep the others of --out; may be given again"
    p.add_argument("--row", action="append", default=[], help=description)
    args = p.parse_args()
    try:
        evaluate(tiny(args.device) if args.tiny else Setting(args.device), args.out, args.row)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
