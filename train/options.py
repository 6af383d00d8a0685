"""The options of `python -m train`. (This file imports neither torch nor anything that does, so that --help is quick.)"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

STAGES = {
    "vae": "the autoencoder",
    "clip": "the mini CLIP, whose towers become the text encoder and the image encoder",
    "unet": "the text-to-image base model",
    "adapter": "IP-Adapter, on the mini world or on your own pictures",
    "plus": "IP-Adapter Plus, which reads fine features, on the mini world or on your own pictures",
    "judge": "the network that measures concept, background and palette",
    "scorer": "the second CLIP, which measures CLIP-I and CLIP-T",
}
ADAPTERS = "adapter", "plus"
SETTINGS = "steps", "batch", "accumulate", "lr", "seed"  # of a plan


def at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        number = int(text)
        if not least <= number < 2**32:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
        return number

    return whole


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a rate above 0")
    return number


def add_settings(p: argparse.ArgumentParser) -> None:
    """The options that every stage has."""
    files = p.add_argument_group("files")
    files.add_argument("--state", type=Path, help="folder of the state, caches and logs of runs (default: runs)")
    files.add_argument("--weights", type=Path, help="folder that finished weights are written to (default: weights)")
    group = p.add_argument_group("settings", "instead of the stage's own")
    group.add_argument("--steps", type=at_least(1), help="number of optimizer steps, in each phase of the stage")
    group.add_argument("--batch", type=at_least(1), help="pictures a step; fewer pictures than this are repeated")
    group.add_argument("--accumulate", type=at_least(1), help="batches whose gradients are added up in a step")
    group.add_argument("--lr", type=rate, help="learning rate")
    group.add_argument("--seed", type=at_least(0), help="seed of the first weights, the order of pictures and the noise")
    machine = p.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", help="where the networks run, such as cuda (default: cpu)")
    machine.add_argument("--bf16", action="store_true", help="use bfloat16 autocast; hold an adapter's base in bfloat16")


def add_source(p: argparse.ArgumentParser) -> None:
    """The options of adapter and plus alone."""
    data = p.add_argument_group("your own pictures")
    data.add_argument(
        "--data",
        type=Path,
        help='a folder of pictures with a .txt caption beside each, or a JSON list [{"image_file": ..., "text": ...}]; '
        "the result is then written to out/adapter, and the state to runs/NAME",
    )
    data.add_argument("--side", type=at_least(1), help="side of the training pictures (default: the base model's own)")
    base = p.add_argument_group("base model")
    base.add_argument("--base", type=Path, help="a single file or a folder (default: the mini weights)")
    base.add_argument("--image-encoder", type=Path, help="a folder or file (default: the base folder's own)")
    base.add_argument("--from", dest="start", type=Path, metavar="FILE", help="continue from this trained adapter")
    base.add_argument("--checkpointing", action="store_true", help="recompute the UNet's stages: less memory, slower")


def parser(about: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m train", description=about, formatter_class=form)
    stages = p.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, what in {**STAGES, "all": "all of them, in this order"}.items():
        stage = stages.add_parser(name, help=what, description=f"Train {what}.")
        add_settings(stage)
        if name in ADAPTERS:
            add_source(stage)
        else:
            stage.set_defaults(data=None, side=None, base=None, image_encoder=None, start=None, checkpointing=False)
    return p
