"""Trains one part of the mini world, or all of them in order: vae, clip, unet, adapter.

A run that is stopped (Ctrl-C) goes on when the same command is given again, to the same numbers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from train import adapter, clip, unet, vae

STAGES = {"vae": vae, "clip": clip, "unet": unet, "adapter": adapter}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument(
        "--state", type=Path, default=Path("runs"), help="where checkpoints and logs live (default: runs)"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("weights"),
        help="where finished weights go and earlier stages' are read (default: weights)",
    )
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    args = parser.parse_args()
    for stage in STAGES.values() if args.stage == "all" else (STAGES[args.stage],):
        plan = stage.PLAN if args.steps is None else replace(stage.PLAN, steps=args.steps)
        stage.train(args.state, args.weights, plan)


if __name__ == "__main__":
    main()
