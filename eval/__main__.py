"""Measures: `judge` trains the network that reads pictures, `world` scores the shipped mini weights against the
truth, `examples` writes the demo's image prompts."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from eval import attributes, world


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    commands = parser.add_subparsers(dest="command", required=True)
    judge = commands.add_parser("judge", help="train the judge")
    judge.add_argument("--state", type=Path, default=Path("runs"))
    judge.add_argument("--steps", type=int, default=attributes.PLAN.steps)
    score = commands.add_parser("world", help="score the mini weights")
    score.add_argument("--n", type=int, default=1024)
    score.add_argument("--steps", type=int, default=12)
    score.add_argument("--guidance", type=float, default=4.0)
    score.add_argument("--out", type=Path, default=Path("results/world.json"))
    samples = commands.add_parser("examples", help="write the demo's image prompts")
    samples.add_argument("--out", type=Path, default=Path("sampling/examples"))
    args = parser.parse_args()
    if args.command == "judge":
        attributes.train(args.state, args.weights, replace(attributes.PLAN, steps=args.steps))
    elif args.command == "examples":
        world.examples(args.out)
    else:
        print(world.table(world.evaluate(args.weights, args.out, args.n, args.steps, args.guidance)))


if __name__ == "__main__":
    main()
