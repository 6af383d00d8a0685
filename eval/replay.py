"""Train the first steps of the mini world's stages again, and compare their losses with stored ones.  `python -m eval replay`

Each stage starts from its seed, and reads the shipped weights of the stages before it. So this checks that the recipes, the data and the
weights in the tree still belong together. The stages see few pictures, so that encoding them takes seconds. Plus is checked in its first
phase, which fits its tokens to those of the global adapter.

Processors round differently, and only some compute in bfloat16. So the means over `WINDOW` steps are compared, within `TOLERANCE`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from checkpoints.files import check_output, read_json, write_json
from eval.device import processor
from eval.header import hashes
from eval.tables import markdown
from train.card import ROOT, code_version
from train.options import STAGES

PICTURES, WINDOW, TOLERANCE = 512, 20, 0.05


def losses_of(log: Path) -> list[float]:
    """Read the loss of each step from a log."""
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.exists() else []


def first_losses(stage: str, weights: Path, steps: int) -> list[float]:
    """Run `python -m train STAGE` for this many steps, with a copy of the weights. Return the loss of each step.

    Raises ValueError with the command's message if it fails.
    """
    with TemporaryDirectory() as name:
        state, copy = Path(name) / "state", shutil.copytree(weights, Path(name) / "weights")
        log = state / f"{import_module(f'train.{stage}').PHASES[0].name}.jsonl"
        options = ["--pictures", str(PICTURES), "--save-every", str(steps), "--state", str(state), "--weights", str(copy)]
        train = [sys.executable, "-m", "train", stage, *options]
        said = Path(name) / "said"  # a pipe that nobody reads would fill up, and stop the training
        with said.open("w") as errors, subprocess.Popen(train, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT) as process:
            while len(losses_of(log)) < steps and process.poll() is None:
                time.sleep(0.1)
            process.terminate()
        losses, lines = losses_of(log)[:steps], said.read_text().splitlines()
    if len(losses) < steps:
        raise ValueError(f"{stage}: {lines[-1] if lines else 'training ended early'}")
    return losses


def difference(new: Sequence[float], old: Sequence[float]) -> float:
    """Return the largest relative difference of the mean loss over `WINDOW` steps. Steps that only one of the two has are left out."""
    n = min(len(new), len(old))
    parts = [slice(first, min(first + WINDOW, n)) for first in range(0, n, WINDOW)]
    return max(abs(float(np.mean(new[part]) / np.mean(old[part])) - 1) for part in parts)


def record(stage: str, weights: Path, steps: int) -> dict[str, Any]:
    """Return the first losses of a stage, and what they were computed with."""
    origin = {"commit": code_version(), "processor": processor("cpu"), "pictures": PICTURES}
    return {**origin, "sha256": hashes(weights), "losses": [round(x, 6) for x in first_losses(stage, weights, steps)]}


def compare(stages: Sequence[str], weights: Path, steps: int, old: dict[str, Any]) -> pd.DataFrame:
    """Tabulate for each stage the number of steps and the `difference`. Raises ValueError for stages that are not stored."""
    if unknown := [stage for stage in stages if stage not in old]:
        raise ValueError(f"no losses are stored of {', '.join(unknown)}: choose from {', '.join(old)}")
    runs = {stage: first_losses(stage, weights, steps) for stage in tqdm(stages, desc="replay")}
    rows = [(stage, len(losses), difference(losses, old[stage]["losses"])) for stage, losses in runs.items()]
    return pd.DataFrame(rows, columns=["stage", "steps", "difference"])


def run(args: Namespace) -> None:
    """`python -m eval replay`"""
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        raise ValueError(f"there is no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    old = read_json(args.out) if args.out.exists() or not args.write else {}
    if args.write:
        check_output(args.out)
        for stage in tqdm(args.stages or STAGES, desc="replay"):
            old[stage] = record(stage, args.weights, args.steps)
            write_json(args.out, old)
        return
    table = compare(args.stages or [*old], args.weights, args.steps, old)
    print(markdown(table.assign(difference=[f"{100 * x:.2f} %" for x in table["difference"]])))
    if (table["difference"] > TOLERANCE).any():
        sys.exit(f"a loss differs from the stored one by more than {100 * TOLERANCE:g} %")
