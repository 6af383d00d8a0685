"""Measures: `judge` and `clip` train the networks that read pictures, `world` scores the shipped mini weights against the
truth, `fine` compares global with fine-grained image features, `examples` writes the demo's image prompts, `attention` draws
where a drawing looks at its prompts, `ablation` compares decoupled with concatenated attention, `calibration` the judge with a
person; `parity` and `benchmark` compare with diffusers at the true size (they write 3.4 GB of random weights to a folder, and
want the extra `test`)."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval import attention_maps, attributes, benchmark, calibration, clip_score, fine, parity, report, world
from eval.ablation import SMOKE, Place, Study
from sampling.pipeline import WEIGHTS
from train.adapter import Source


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    commands = parser.add_subparsers(dest="command", required=True)
    for name, plan, help in (
        ("judge", attributes.PLAN, "train the judge"),
        ("clip", clip_score.PLAN, "train the second CLIP"),
    ):
        training = commands.add_parser(name, help=help)
        training.add_argument("--state", type=Path, default=Path("runs"))
        training.add_argument("--steps", type=int, default=plan.steps)
    for name, n, help in (
        ("world", 1024, "score the mini weights"),
        ("fine", 512, "global against fine-grained image features"),
    ):
        score = commands.add_parser(name, help=help)
        score.add_argument("--n", type=int, default=n)
        score.add_argument("--steps", type=int, default=12)
        score.add_argument("--guidance", type=float, default=4.0)
        score.add_argument("--out", type=Path, default=Path(f"results/{name}.json"))
    samples = commands.add_parser("examples", help="write the demo's image prompts")
    samples.add_argument("--out", type=Path, default=Path("sampling/examples"))
    same = commands.add_parser("parity", help="equality with the public implementations at the true size")
    same.add_argument("--side", type=int, default=64, help="of the latents (default 64, a picture of 512 x 512)")
    same.add_argument("--out", type=Path, default=Path("results/parity.json"))
    speed = commands.add_parser("benchmark", help="speed and memory beside diffusers")
    speed.add_argument("--rounds", type=int, default=3)
    speed.add_argument("--row", action="append", default=[], help="measure this row alone; the others stay in --out")
    speed.add_argument("--out", type=Path, default=Path("results/benchmark.json"))
    for command in (same, speed):
        command.add_argument("--state", type=Path, default=Path("runs/official"), help="folder of the random weights")
    claim = commands.add_parser(
        "ablation", help="decoupled against concatenated: trains, draws, reads, and writes the report"
    )
    claim.add_argument("--state", type=Path, help="checkpoints and caches (default: runs/ablation in --out)")
    claim.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    claim.add_argument(
        "--smoke", action="store_true", help="everything, but tiny: minutes, and numbers that mean nothing"
    )
    claim.add_argument(
        "--cell", metavar="FORM:SEED:TASK", help="draw and read one cell of the results again, and compare"
    )
    claim.add_argument("--out", type=Path, default=Path("."), help="folder of RESULTS.md and results/")
    claim.add_argument(
        "--base", type=Path, help="base model, a single file or a folder (default: --weights); with --data"
    )
    claim.add_argument("--image-encoder", type=Path, help="folder or file (default: the base folder's own)")
    claim.add_argument("--data", type=Path, help="your pictures and captions, as `python -m train adapter` takes them")
    claim.add_argument(
        "--scorer", help="the CLIP that reads pictures: ARCHITECTURE:PRETRAINED of open_clip (default: --weights' own)"
    )
    claim.add_argument("--device", default="cpu", help="other than cpu: one process")
    claim.add_argument("--seeds", type=int, help="adapters of each form, no more and no fewer")
    claim.add_argument("--rates", type=float, nargs="+", help="the grid of learning rates")
    for name, help in (("steps", "of training, 4 or more"), ("batch", "pictures a step"), ("prompts", "held out")):
        claim.add_argument(f"--{name}", type=int, help=help)
    trust = commands.add_parser("calibration", help="how often the judge sees what a person saw in drawn pictures")
    trust.add_argument(
        "--draw", action="store_true", help="draw the pictures anew: their labels must be written anew too"
    )
    trust.add_argument("--out", type=Path, default=Path("results"))
    look = commands.add_parser("attention", help="a sheet: where a drawing looks at each word and each image token")
    look.add_argument("--image", type=Path, action="append", default=[], help="image prompt; several make one prompt")
    look.add_argument("--prompt", default="", help="text prompt")
    look.add_argument("--scale", type=float, default=1.0, help="lambda, the weight of the image prompt (default 1)")
    look.add_argument(
        "--guidance", type=float, default=4.0, help="guidance weight (default 4, which suits the mini weights)"
    )
    look.add_argument("--seed", type=int, default=0)
    look.add_argument("--steps", type=int, default=20)
    look.add_argument("--out", type=Path, default=Path("out/attention.png"))
    look.add_argument("--checkpoint", type=Path, default=WEIGHTS, help="as in sampling, like the next two")
    look.add_argument("--ip-adapter", type=Path)
    look.add_argument("--image-encoder", type=Path)
    return parser


def place_of(args: argparse.Namespace) -> Place:
    """Where the ablation finds and keeps things. Raises ValueError when options don't go together."""
    other = [name for name in ("smoke", "data", "steps", "batch", "prompts", "rates") if getattr(args, name)]
    other += ["device"] if args.device != "cpu" else []
    if other and args.out == Path("."):
        raise ValueError(
            f"with --{other[0]} it is another study than the published one: name a folder for it with --out"
        )
    if (args.base is None) != (args.data is None):
        raise ValueError("--base and --data go together: the mini world's pictures are for the mini world's base")
    if args.data is not None and args.scorer is None:
        raise ValueError("name the CLIP that reads the pictures, as in --scorer ViT-L-14:openai")
    pictures = 64 if args.smoke else Source.pictures
    source = Source(args.base or args.weights, args.image_encoder, pictures=pictures, data=args.data)
    shipped, state = args.out / "results" / "ablation", args.state or args.out / "runs" / "ablation"
    return Place(source, shipped, state, args.scorer or str(args.weights))


def study_of(args: argparse.Namespace) -> Study:
    """How much of everything. Raises ValueError for less than makes a study."""
    study = replace(SMOKE if args.smoke else Study(), device=args.device)
    given: dict[str, Any] = {
        key: found for key in ("prompts", "steps", "batch") if (found := getattr(args, key)) is not None
    }
    if args.seeds is not None:
        given |= {"seeds": args.seeds, "most_seeds": args.seeds}
    if args.rates is not None:
        given |= {"rates": tuple(args.rates)}
    study = replace(study, **given)
    if study.steps < 4 or min(study.seeds, study.prompts, study.batch, *study.rates) <= 0:
        raise ValueError("--steps must be 4 or more, --seeds, --prompts, --batch and --rates more than 0")
    return study


def run(args: argparse.Namespace) -> None:
    if args.command == "judge":
        attributes.train(args.state, args.weights, replace(attributes.PLAN, steps=args.steps))
    elif args.command == "clip":
        clip_score.train(args.state, args.weights, replace(clip_score.PLAN, steps=args.steps))
    elif args.command == "examples":
        world.examples(args.out)
    elif args.command == "parity":
        print(parity.table(parity.evaluate(args.state, args.out, args.side)))
    elif args.command == "benchmark":
        print(benchmark.table(benchmark.evaluate(args.state, args.out, args.rounds, args.row)))
    elif args.command == "ablation":
        if args.cell:
            said, same = report.cell(place_of(args), args.out, args.cell)
            print(said)
            if not same:
                sys.exit(1)
        else:
            report.run(place_of(args), study_of(args), args.out, args.jobs if args.device == "cpu" else 1)
    elif args.command == "calibration":
        if args.draw:
            calibration.draw(args.weights, args.out / "labels.png")
        print(attributes.summary(calibration.agreement(attributes.load(args.weights / "judge.safetensors"), args.out)))
    elif args.command == "attention":
        attention_maps.run(args)
    else:
        measure = {"world": world, "fine": fine}[args.command]
        print(measure.table(measure.evaluate(args.weights, args.out, args.n, args.steps, args.guidance)))


def main() -> None:
    try:
        run(parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
