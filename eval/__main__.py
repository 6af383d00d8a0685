"""Measures: `judge` trains the network that reads pictures, `world` scores the shipped mini weights against the
truth, `examples` writes the demo's image prompts; `parity` and `benchmark` compare with diffusers at the true size (they
write 3.4 GB of random weights to a folder, and want the extra `test`)."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from eval import attributes, benchmark, parity, world


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
    same = commands.add_parser("parity", help="equality with the public implementations at the true size")
    same.add_argument("--side", type=int, default=64, help="of the latents (default 64, a picture of 512 x 512)")
    same.add_argument("--out", type=Path, default=Path("results/parity.json"))
    speed = commands.add_parser("benchmark", help="speed and memory beside diffusers")
    speed.add_argument("--rounds", type=int, default=3)
    speed.add_argument("--out", type=Path, default=Path("results/benchmark.json"))
    for command in (same, speed):
        command.add_argument("--state", type=Path, default=Path("runs/official"), help="folder of the random weights")
    args = parser.parse_args()
    if args.command == "judge":
        attributes.train(args.state, args.weights, replace(attributes.PLAN, steps=args.steps))
    elif args.command == "examples":
        world.examples(args.out)
    elif args.command == "parity":
        print(parity.table(parity.evaluate(args.state, args.out, args.side)))
    elif args.command == "benchmark":
        print(benchmark.table(benchmark.evaluate(args.state, args.out, args.rounds)))
    else:
        print(world.table(world.evaluate(args.weights, args.out, args.n, args.steps, args.guidance)))


if __name__ == "__main__":
    main()
