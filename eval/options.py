"""The options of `python -m eval`, described in plain sentences. Imports nothing heavy, so `--help` is fast."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

Commands = Any  # what ArgumentParser.add_subparsers returns
TEXT = """Measure how good the networks are. Every command that measures writes its results to a file and prints a table.
`python -m eval COMMAND --help` describes the options of a command."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m eval", description=TEXT)
    p.add_argument(
        "--weights", type=Path, default=Path("weights"), help="folder of the mini weights (default: weights)"
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_scores(commands)
    add_ablation(commands)
    add_peers(commands)
    add_calibration(commands)
    add_attention(commands)
    return p


def command(commands: Commands, name: str, says: str) -> argparse.ArgumentParser:
    """A subcommand whose help and description are `says`."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=says[0].lower() + says[1:], description=f"{says}.")
    return added


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_scores(commands: Commands) -> None:
    says = "Score the mini weights against the truth of the mini world"
    score = command(commands, "world", says)
    fine = command(commands, "fine", "Compare global with fine-grained image features")
    for added, name, n in ((score, "world", 1024), (fine, "fine", 512)):
        added.add_argument("--n", type=count, default=n, help=f"number of prompts (default: {n})")
        added.add_argument("--steps", type=count, default=12, help="sampling steps for each drawing (default: 12)")
        added.add_argument("--guidance", type=float, default=4.0, help="guidance weight (default: 4)")
        out = Path(f"results/{name}.json")
        added.add_argument("--out", type=Path, default=out, help=f"file of the results (default: {out})")
    samples = command(commands, "examples", "Write the image prompts of the demo")
    out = Path("sampling/examples")
    samples.add_argument("--out", type=Path, default=out, help=f"folder to write to (default: {out})")

    pages = command(commands, "docs", "Insert what the results say into README.md and docs/")
    pages.add_argument("--root", type=Path, default=Path("."), help="folder of the project (default: here)")


def add_ablation(commands: Commands) -> None:
    says = "Compare decoupled with concatenated attention: train, draw, read, and write RESULTS.md"
    p = command(commands, "ablation", says)
    p.add_argument("--out", type=Path, default=Path("."), help="folder for RESULTS.md and results/ (default: here)")
    p.add_argument("--state", type=Path, help="folder for checkpoints and caches (default: runs/ablation in --out)")
    cores = os.cpu_count() or 1
    p.add_argument(
        "--jobs", type=count, default=cores, help="number of processes, of one thread each (default: all cores)"
    )
    p.add_argument("--device", default="cpu", help="device to train and draw on (default: cpu); others use one process")
    p.add_argument("--smoke", action="store_true", help="run everything at a tiny size; the numbers mean nothing")
    says = "draw and read one cell of the results again, and compare it with the stored numbers"
    p.add_argument("--cell", metavar="FORM:SEED:TASK", help=says)
    own = p.add_argument_group("your own base and pictures")
    own.add_argument("--base", type=Path, help="base model, a file or a folder (default: --weights); needs --data")
    own.add_argument(
        "--image-encoder", type=Path, help="image encoder, a file or a folder (default: the base folder's)"
    )
    own.add_argument("--data", type=Path, help="pictures and captions, as `python -m train adapter` takes them")
    says = "CLIP that reads the pictures, ARCHITECTURE:PRETRAINED of open_clip (default: the second CLIP in --weights)"
    own.add_argument("--scorer", help=says)
    size = p.add_argument_group("size of the study")
    size.add_argument("--seeds", type=int, help="number of adapters of each form (default: 5 to 10, as many as needed)")
    size.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    size.add_argument("--steps", type=int, help="training steps, at least 4 (default: 500)")
    size.add_argument("--batch", type=int, help="pictures in a training step (default: 32)")
    size.add_argument("--prompts", type=int, help="number of held-out prompts (default: 128)")


def add_peers(commands: Commands) -> None:
    says = "Check equality with diffusers and transformers at the true size; writes 3.4 GB of random weights to --state"
    parity = command(commands, "parity", says)
    parity.add_argument("--side", type=count, default=64, help="side of the latents (default: 64, a 512 x 512 picture)")
    says = "Measure speed and memory beside diffusers at the true size; writes 3.4 GB of random weights to --state"
    speed = command(commands, "benchmark", says)
    speed.add_argument("--rounds", type=count, default=3, help="number of measurements of each side (default: 3)")
    says = "measure only this row and keep the other rows of --out; may be repeated"
    speed.add_argument("--row", action="append", default=[], help=says)
    for added, out in ((parity, Path("results/parity.json")), (speed, Path("results/benchmark.json"))):
        added.add_argument("--out", type=Path, default=out, help=f"file of the results (default: {out})")
        state = Path("runs/official")
        added.add_argument("--state", type=Path, default=state, help=f"folder of the random weights (default: {state})")


def add_calibration(commands: Commands) -> None:
    says = "Measure how often the judge agrees with a person about drawn pictures"
    p = command(commands, "calibration", says)
    p.add_argument("--draw", action="store_true", help="draw the pictures again; they then need new labels")
    p.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of labels.png and labels.json (default: results)"
    )


def add_attention(commands: Commands) -> None:
    says = "Draw a sheet that shows where a drawing looks at each word and each image token"
    p = command(commands, "attention", says)
    p.add_argument(
        "--image", type=Path, action="append", default=[], help="picture file; several form one image prompt"
    )
    p.add_argument("--prompt", default="", help="text prompt")
    p.add_argument("--scale", type=float, default=1.0, help="lambda, the weight of the image prompt (default: 1)")
    p.add_argument("--guidance", type=float, default=4.0, help="guidance weight (default: 4, for the mini weights)")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    p.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    out = Path("out/attention.png")
    p.add_argument("--out", type=Path, default=out, help=f"PNG file to write (default: {out})")
    p.add_argument("--checkpoint", type=Path, help="base model, a file or a folder (default: the mini weights)")
    p.add_argument("--ip-adapter", type=Path, help="adapter file (default: the one in the checkpoint's folder)")
    p.add_argument("--image-encoder", type=Path, help="image encoder (default: the one in the checkpoint's folder)")
