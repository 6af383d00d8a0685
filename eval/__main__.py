"""Measure how good the networks are.  `python -m eval --help`"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from eval.options import parser

MODULES = {
    "world": "eval.world",
    "clip": "eval.table1",
    "fine": "eval.fine",
    "frechet": "eval.frechet",
    "structure": "eval.structure",
    "style": "eval.style",
    "examples": "eval.examples",
    "docs": "eval.docs",
    "calibration": "eval.calibration",
    "by-eye": "eval.by_eye",
    "replay": "eval.replay",
    "attention": "eval.attention_sheet",
    "page": "eval.page.command",
    "ablation": "eval.ablation.command",
    "cause": "eval.ablation.cause",
    "rivals": "eval.ablation.rivals_table",
    "variants": "eval.ablation.variants",
    "rates": "eval.ablation.rates",
    "second-base": "eval.ablation.second_base",
    "half-base": "eval.ablation.second_base",
    "parity": "eval.peers.parity",
    "benchmark": "eval.peers.benchmark",
    "scaling": "eval.peers.scaling",
}


def run(args: argparse.Namespace) -> None:
    """Run the chosen command. Its module is imported only here, so that `--help` and errors in the options are fast."""
    import_module(MODULES[args.command]).run(args)


def main() -> None:
    try:
        run(parser().parse_args())
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install -e '.[world,eval,test]'")
    except (ValueError, OSError) as error:
        from train.processes import speaks

        sys.exit(f"error: {error}" if speaks() else 1)


if __name__ == "__main__":
    main()
