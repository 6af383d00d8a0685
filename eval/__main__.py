"""Measure how good the networks are.  `python -m eval --help`"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval.options import parser

if TYPE_CHECKING:
    from eval.ablation.study import Place, Study

Args = argparse.Namespace
OTHER_STUDY = ("smoke", "data", "steps", "batch", "prompts", "rates")  # options that change the published study


def run_world(args: Args) -> None:
    from eval import world

    print(world.table(world.evaluate(args.weights, args.out, args.n, args.steps, args.guidance)))


def run_fine(args: Args) -> None:
    from eval import fine

    print(fine.table(fine.evaluate(args.weights, args.out, args.n, args.steps, args.guidance)))


def run_examples(args: Args) -> None:
    from eval import world

    world.examples(args.out)


def place_of(args: Args) -> Place:
    """Where the ablation finds and keeps its files. Raises ValueError when options do not go together."""
    from eval.ablation.study import SMOKE, Place
    from train.adapter import Source

    other = [name for name in OTHER_STUDY if getattr(args, name)] + ["device"] * (args.device != "cpu")
    if other and args.out == Path("."):
        raise ValueError(f"--{other[0]} does not go with the published study: name a folder for your own with --out")
    if (args.base is None) != (args.data is None):
        raise ValueError("--base and --data go together: the mini world's pictures are for the mini world's base")
    if args.data is not None and args.scorer is None:
        raise ValueError("name the CLIP that reads the pictures, as in --scorer ViT-L-14:openai")
    pictures = 16 * SMOKE.batch if args.smoke else Source.pictures
    source = Source(args.base or args.weights, args.image_encoder, pictures=pictures, data=args.data)
    shipped, state = args.out / "results" / "ablation", args.state or args.out / "runs" / "ablation"
    return Place(source, shipped, state, args.scorer or str(args.weights))


def study_of(args: Args) -> Study:
    """The size of the study. Raises ValueError for one that is too small."""
    from eval.ablation.study import SMOKE, Study

    given = {key: value for key in ("prompts", "steps", "batch") if (value := getattr(args, key)) is not None}
    if args.seeds is not None:
        given |= {"seeds": args.seeds, "most_seeds": args.seeds}
    if args.rates is not None:
        given["rates"] = tuple(args.rates)
    return replace(SMOKE if args.smoke else Study(), device=args.device, **given)


def run_ablation(args: Args) -> None:
    from eval.ablation import command as ablation

    if args.cell is None:
        ablation.run(place_of(args), study_of(args), args.out, args.jobs if args.device == "cpu" else 1)
        return
    compared = ablation.redraw(place_of(args), args.out, args.cell)
    print(compared.to_string(index=False))
    if not compared["within"].all():
        sys.exit(f"{args.cell} is not within the tolerance of the stored numbers")
    print(f"{args.cell} is within the tolerance of the stored numbers")


def run_parity(args: Args) -> None:
    from eval.peers import parity

    print(parity.table(parity.evaluate(args.state, args.out, args.side)))


def run_benchmark(args: Args) -> None:
    from eval.peers import benchmark

    print(benchmark.table(benchmark.evaluate(args.state, args.out, args.rounds, args.row)))


def run_calibration(args: Args) -> None:
    from eval import calibration
    from eval.tables import summary
    from train.judge import load_judge

    if args.draw:
        calibration.draw(args.weights, args.out / "labels.png")
    print(summary(calibration.agreement(load_judge(args.weights / "judge.safetensors"), args.out)))


def run_attention(args: Args) -> None:
    from eval.attention_sheet import attention_sheet
    from sampling.images import open_image, save_image
    from sampling.pipeline import WEIGHTS, load

    pictures = [open_image(path) for path in args.image]  # reject a bad picture before loading the weights
    pipeline = load(args.checkpoint or WEIGHTS, args.ip_adapter, args.image_encoder)
    picture = attention_sheet(pipeline, pictures, args.prompt, args.scale, args.guidance, args.seed, args.steps)
    settings = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()}
    save_image(picture, args.out, {"arguments": settings})
    print(args.out)


RUN = {
    "world": run_world,
    "fine": run_fine,
    "examples": run_examples,
    "ablation": run_ablation,
    "parity": run_parity,
    "benchmark": run_benchmark,
    "calibration": run_calibration,
    "attention": run_attention,
}


def run(args: Args) -> None:
    """Run the chosen command."""
    RUN[args.command](args)


def main() -> None:
    try:
        run(parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
