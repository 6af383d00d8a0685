"""The options of `python -m eval`. This file does not import torch, so that `--help` is fast."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from eval.protocol import Protocol
from model.words import Prediction
from sampling.request import DtypeName, Model
from train.options import STAGES

Commands = Any  # what ArgumentParser.add_subparsers returns
DESCRIPTION = """Measure how good the networks are. Most commands write their results to a file and print a table.
`python -m eval COMMAND --help` describes the options of a command."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m eval", description=DESCRIPTION)
    p.add_argument("--weights", type=Path, default=Path("weights"), help="folder of the mini weights (default: weights)")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_scores(commands)
    add_clip(commands)
    add_ablation(commands)
    add_tiers(commands)
    add_peers(commands)
    add_calibration(commands)
    add_by_eye(commands)
    add_replay(commands)
    add_attention(commands)
    add_page(commands)
    return p


def command(commands: Commands, name: str, description: str) -> argparse.ArgumentParser:
    """Add a subcommand with this help text and description."""
    summary = description[0].lower() + description[1:]
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=f"{description}.")
    return parser


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_scores(commands: Commands) -> None:
    description = "Score the mini weights against the ground truth of the mini world"
    score = command(commands, "world", description)
    fine = command(commands, "fine", "Compare global with fine-grained image features")
    description = "Compute Fréchet distances from held-out pictures to drawings of their captions and to the VAE's reconstructions"
    frechet = command(commands, "frechet", description)
    structure = command(commands, "structure", "Measure structure control beside image prompts")
    style = command(commands, "style", "Measure the adapter on another base model")
    sizes = ((score, "world", 1024), (fine, "fine", 512), (frechet, "frechet", 10000), (structure, "structure", 512), (style, "style", 512))
    for parser, name, n in sizes:
        parser.add_argument("--n", type=count, default=n, help=f"number of prompts (default: {n})")
        parser.add_argument("--steps", type=count, default=12, help="sampling steps for each drawing (default: 12)")
        parser.add_argument("--guidance", type=float, default=4.0, help="guidance weight (default: 4)")
        out = Path(f"results/{name}.json")
        parser.add_argument("--out", type=Path, default=out, help=f"file of the results (default: {out})")
        parser.add_argument("--device", default="cpu", help="device to draw and score on, such as cuda (default: cpu)")
    forms, about = ("none", "control", "t2i"), "measure only the missing rows of this form of control; can be given several times"
    structure.add_argument("--form", action="append", default=[], choices=forms, help=about)
    samples = command(commands, "examples", "Write the image prompts of the demo, and their outlines")
    out = Path("sampling/examples")
    samples.add_argument("--out", type=Path, default=out, help=f"folder to write to (default: {out})")

    pages = command(commands, "docs", "Insert the tables of results into README.md and docs/")
    pages.add_argument("--root", type=Path, default=Path("."), help="folder of the project (default: the current one)")


def add_clip(commands: Commands) -> None:
    p = command(commands, "clip", "Measure an adapter as the paper does: CLIP-I and CLIP-T of variations of pictures, such as COCO's")
    p.add_argument("--data", type=Path, required=True, help="pictures and captions, in the formats of `python -m train adapter`")
    p.add_argument("--checkpoint", type=Path, help="base model, a file or a folder (default: --weights)")
    p.add_argument("--ip-adapter", type=Path, help="adapter file (default: the one in the checkpoint's folder)")
    p.add_argument("--image-encoder", type=Path, help="image encoder (default: the one in the checkpoint's folder)")
    scorer, paper = "ViT-L-14:openai", Protocol()
    p.add_argument("--scorer", default=scorer, help=f"CLIP, an open_clip ARCHITECTURE:PRETRAINED (default: {scorer}, the paper's)")
    p.add_argument("--n", type=count, default=paper.pictures, help="number of pictures, the first ones of --data (default: %(default)s)")
    about = "drawings for each picture (default: %(default)s)"
    p.add_argument("--images-per-prompt", type=count, default=paper.images_per_prompt, help=about)
    p.add_argument("--prompt", default=paper.prompt, help="text prompt (default: the empty one)")
    p.add_argument("--scale", type=float, default=paper.scale, help="lambda, the weight of the image prompt (default: %(default)s)")
    p.add_argument("--steps", type=count, default=paper.steps, help="sampling steps of DDIM (default: %(default)s)")
    p.add_argument("--guidance", type=float, default=paper.guidance, help="guidance weight (default: %(default)s)")
    p.add_argument("--seed", type=int, default=paper.seed, help="seed of the first drawing (default: %(default)s)")
    p.add_argument("--batch", type=count, default=16, help="pictures to draw at a time (default: 16)")
    p.add_argument("--device", default="cpu", help="device to draw and score on, such as cuda (default: cpu)")
    p.add_argument("--state", type=Path, default=Path("runs/clip"), help="folder of finished scores (default: runs/clip)")
    out = Path("results/clip.json")
    p.add_argument("--out", type=Path, default=out, help=f"file of the results (default: {out})")


def add_ablation(commands: Commands) -> None:
    description = "Compare decoupled with concatenated attention: train adapters, draw, score, and write RESULTS.md"
    p = command(commands, "ablation", description)
    p.add_argument("--out", type=Path, default=Path("."), help="folder for RESULTS.md and results/ (default: the current one)")
    p.add_argument("--state", type=Path, help="folder for checkpoints and caches (default: runs/ablation in --out)")
    p.add_argument("--jobs", type=count, help="number of processes, each with one thread (default: one per core; on a GPU, 6 share it)")
    p.add_argument("--device", default="cpu", help="device to train and draw on, such as cuda (default: cpu)")
    p.add_argument("--smoke", action="store_true", help="run everything at a tiny size; the numbers mean nothing")
    p.add_argument("--cell", metavar="FORM:SEED:TASK", help="draw and score one cell of the results again, and compare the numbers")
    p.add_argument("--report", action="store_true", help="write the summary, figures and RESULTS.md again, from the stored results")
    own = p.add_argument_group("your own base and pictures")
    own.add_argument("--base", type=Path, help="base model, a file or a folder (default: --weights); needs --data")
    own.add_argument("--image-encoder", type=Path, help="image encoder, a file or a folder (default: the one in the base folder)")
    own.add_argument("--data", type=Path, help="pictures and captions, in the format of `python -m train adapter`")
    description = "CLIP that scores the drawings, an open_clip ARCHITECTURE:PRETRAINED (default: the second CLIP in --weights)"
    own.add_argument("--scorer", help=description)
    size = p.add_argument_group("size of the study")
    size.add_argument("--seeds", type=int, help="number of adapters of the two forms compared first (default: 5; others: at most 3)")
    size.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    size.add_argument("--steps", type=int, help="training steps, at least 16 (default: 8000)")
    size.add_argument("--batch", type=int, help="pictures per training step (default: 32)")
    size.add_argument("--prompts", type=int, help="number of test prompts (default: 128)")


def add_tiers(commands: Commands) -> None:
    cause = command(commands, "cause", "Find out why a joint softmax costs what it costs: tier B of the ablation")
    description = "Compare IP-Adapter and the simple adapter on a base and a CLIP from another seed: tier E of the ablation"
    second = command(commands, "second-base", description)
    half = command(commands, "half-base", "Compare IP-Adapter and the simple adapter on a base of half the width: tier E of the ablation")
    others = (second, "second_base"), (half, "half_base")
    for p, name in others:
        p.add_argument("--base", type=Path, help=f"folder of this base (default: runs/{name}/weights in --out; trained first)")
    rivals = command(commands, "rivals", "Compare IP-Adapter with other ways to show a picture to the base: tier C of the ablation")
    variants = command(commands, "variants", "Vary the number of tokens, initial values, padding and odds: tier D of the ablation")
    rates = command(commands, "rates", "Train the simple adapter to the end at IP-Adapter's learning rate: tier F of the ablation")
    for p, name in ((cause, "cause"), (rivals, "rivals"), (variants, "variants"), *others, (rates, "rates")):
        p.add_argument("--out", type=Path, default=Path("."), help="folder for results/ (default: the current one)")
        p.add_argument("--state", type=Path, help=f"folder for checkpoints and caches (default: runs/{name} in --out)")
        p.add_argument("--jobs", type=count, help="number of processes, each with one thread (default: one per core; on a GPU, 6 share it)")
        p.add_argument("--device", default="cpu", help="device to train and draw on, such as cuda (default: cpu)")
        p.add_argument("--smoke", action="store_true", help="run everything at a tiny size; the numbers mean nothing")


def add_peers(commands: Commands) -> None:
    description = (
        "Compare outputs with diffusers and transformers at full size; writes random weights to --state, 3.4 GB for SD 1.5 and 11 GB for "
        "SDXL. With --checkpoint, draw one picture from your own files here and in diffusers, and compare the two"
    )
    parity = command(commands, "parity", description)
    parity.add_argument("--base", choices=("sd15", "sdxl"), default="sd15", help="base model of the random weights (default: sd15)")
    parity.add_argument("--side", type=count, default=64, help="side of the latents (default: 64, a 512 x 512 picture)")
    own = parity.add_argument_group("your own files")
    own.add_argument("--checkpoint", type=Path, help="base model, a file or a folder")
    own.add_argument("--ip-adapter", type=Path, help="adapter file (default: none, the text alone)")
    own.add_argument("--image-encoder", type=Path, help="image encoder, a folder in transformers' layout")
    own.add_argument("--image", type=Path, help="picture to use as the image prompt; for FaceID a file of faces")
    own.add_argument("--prompt", default="a photo of a fox", help="text prompt (default: a photo of a fox)")
    own.add_argument("--steps", type=count, default=4, help="number of steps (default: 4)")
    own.add_argument("--prediction", choices=get_args(Prediction), help="what the UNet predicts, if its files do not say it")
    description = "Compare speed and memory with diffusers at full size; writes 3.4 GB of random weights to --state"
    benchmark = command(commands, "benchmark", description)
    benchmark.add_argument("--rounds", type=count, default=3, help="number of measurements of each implementation (default: 3)")
    description = "measure only this row, and keep the other rows of --out; can be given several times"
    benchmark.add_argument("--row", action="append", default=[], help=description)
    parity.add_argument("--out", type=Path, help="file of the results (default: results/parity.json, for sdxl results/parity_sdxl.json)")
    out, state = Path("results/benchmark.json"), Path("runs/official")
    benchmark.add_argument("--out", type=Path, default=out, help=f"file of the results (default: {out})")
    scaling = command(commands, "scaling", "Measure how the time of a UNet step grows with the latents and the batch")
    scaling.add_argument("--rounds", type=count, default=3, help="number of measurements of each point (default: 3)")
    points = Path("results/scaling.json")
    scaling.add_argument("--out", type=Path, default=points, help=f"file of the results, with the figure beside it (default: {points})")
    for parser in (parity, benchmark, scaling):
        parser.add_argument("--state", type=Path, default=state, help=f"folder for the random weights (default: {state})")


def add_calibration(commands: Commands) -> None:
    description = "Measure how often the judge agrees with labels given by eye"
    p = command(commands, "calibration", description)
    p.add_argument("--labels", type=Path, default=Path("results"), help="folder of labels.png and labels.json (default: results)")
    out = Path("results/calibration.json")
    p.add_argument("--out", type=Path, default=out, help=f"file of the results (default: {out})")


def add_by_eye(commands: Commands) -> None:
    p = command(commands, "by-eye", "Measure how often labels given by eye match the text of a drawing")
    p.add_argument("--draw", action="store_true", help="draw the pictures, for people to label")
    folder = Path("results/by_eye")
    p.add_argument("--labels", type=Path, default=folder, help=f"folder of labels.png and labels.json (default: {folder})")
    out = Path("results/by_eye.json")
    p.add_argument("--out", type=Path, default=out, help=f"file of the results (default: {out})")


def add_replay(commands: Commands) -> None:
    p = command(commands, "replay", "Train the first steps of the mini world's stages again, and compare their losses with stored ones")
    about = f"stages, of {', '.join(STAGES)} (default: those that are stored; with --write, all)"
    p.add_argument("stages", nargs="*", metavar="STAGE", help=about)
    p.add_argument("--steps", type=count, default=200, help="number of steps of each stage (default: 200)")
    p.add_argument("--write", action="store_true", help="store the losses instead of comparing them")
    out = Path("results/replay.json")
    p.add_argument("--out", type=Path, default=out, help=f"file of the stored losses (default: {out})")


def add_attention(commands: Commands) -> None:
    description = "Draw a sheet of attention maps, one for each word and each image token"
    p = command(commands, "attention", description)
    p.add_argument(
        "--image", type=Path, action="append", default=[], help="picture file; give several to combine them into one image prompt"
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


def add_page(commands: Commands) -> None:
    p = command(commands, "page", "Open a page in the browser to play with image prompts, lambda and attention, on this computer alone")
    p.add_argument("--checkpoint", type=Path, help="base model, a file or a folder (default: the mini weights)")
    p.add_argument("--ip-adapter", type=Path, help="adapter file (default: the one in the checkpoint's folder)")
    p.add_argument("--image-encoder", type=Path, help="image encoder (default: the one in the checkpoint's folder)")
    p.add_argument("--control", type=Path, help="ControlNet or T2I-Adapter; the page then has a field for its hint")
    p.add_argument("--dtype", choices=get_args(DtypeName), default=Model.dtype, help=f"precision (default: {Model.dtype})")
    p.add_argument("--device", default="cpu", help="device to draw on, such as cuda (default: cpu)")
    p.add_argument("--port", type=count, default=7860, help="port of the page (default: 7860)")
