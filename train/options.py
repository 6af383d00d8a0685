"""The options of `python -m train`. This file does not import torch, so that --help is fast."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from model.words import Prediction

STAGES = {
    "vae": "the autoencoder",
    "clip": "the mini CLIP: the text encoder and the image encoder",
    "unet": "the text-to-image base model",
    "adapter": "IP-Adapter, on the mini world or on your own pictures",
    "plus": "IP-Adapter Plus, which reads fine features, on the mini world or on your own pictures",
    "judge": "the network that measures concept, background and palette",
    "scorer": "the second CLIP, which measures CLIP-I and CLIP-T",
    "control": "a ControlNet that reads outlines",
    "t2i": "a T2I-Adapter that reads outlines",
    "style": "low-rank differences that give the base model another style",
}
ADAPTERS = "adapter", "plus"
ALL_LEVELS = 64  # more than any UNet has
# options that are fields of TrainingSource
DATA = "data", "side", "buckets", "skip_broken"
SOURCE = *DATA, "image_encoder", "prediction", "checkpointing", "shard", "start", "noise_offset", "preview_every", "tensorboard"
# options that override a field of the plan
SETTINGS = "steps", "batch", "accumulate", "lr", "seed", "warmup", "ema", "clip", "save_every", "validate_every"


def at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        number = int(text)
        if not least <= number < 2**32:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return number

    return whole_number


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return number


def power_of_two(text: str) -> int:
    number = int(text)
    if number < 1 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{text} is not 1, 2, 4, 8, ...")
    return number


def add_settings(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that all stages share. Return the group of the settings."""
    add_state(p).add_argument("--weights", type=Path, help="folder for the trained weights (default: weights)")
    group = p.add_argument_group("settings", "These override the settings of the stage.")
    group.add_argument("--steps", type=at_least(1), help="number of optimizer steps in each phase")
    group.add_argument(
        "--batch", type=at_least(1), help="pictures in a batch, which processes share; if there are fewer, they are repeated"
    )
    group.add_argument("--accumulate", type=at_least(1), help="batches per optimizer step (gradient accumulation)")
    group.add_argument("--lr", type=rate, help="learning rate")
    group.add_argument("--seed", type=at_least(0), help="seed of the initial weights, the order of pictures and the noise")
    group.add_argument("--warmup", type=at_least(0), help="steps in which the learning rate rises")
    group.add_argument("--ema", type=share, help="decay of the average of the weights that is kept; 0 keeps the last weights")
    group.add_argument("--clip", type=rate, help="largest norm of the gradient; a larger gradient is scaled down")
    group.add_argument("--save-every", type=at_least(1), help="steps between two saved states (in any case every five minutes)")
    group.add_argument("--validate-every", type=at_least(1), help="steps between two validations")
    group.add_argument("--pictures", type=at_least(1), help="pictures of the mini world to train on (default: 20,000 to 60,000)")
    group.add_argument(
        "--scale", type=at_least(1), default=1, help="multiply the batch and divide the steps by this, for a GPU (default: 1)"
    )
    machine = add_device(p)
    precision = machine.add_mutually_exclusive_group()
    precision.add_argument(
        "--bf16",
        action="store_true",
        help="keep the frozen base of an adapter in bfloat16 (trainings use bfloat16 autocast anyway, on devices where it is fast)",
    )
    about = "autocast to float16, keep the frozen base in it, and scale the loss, for GPUs without bfloat16"
    precision.add_argument("--fp16", action="store_true", help=about)
    precision.add_argument("--fp32", action="store_true", help="no autocast")
    return group


def add_state(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    files = p.add_argument_group("files")
    files.add_argument("--state", type=Path, help="folder for the states, caches and logs of runs (default: runs)")
    return files


def add_device(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    machine = p.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", help="device to train on, such as cuda (default: cpu)")
    return machine


def add_data(p: argparse.ArgumentParser, required: bool = False) -> argparse._ArgumentGroup:
    """Add the options that name a user's pictures and a base model. Return the group of the base model."""
    data = p.add_argument_group("your own pictures")
    data.add_argument(
        "--data",
        type=Path,
        required=required,
        help="a folder of pictures with a .txt caption beside each, a folder of .tar shards as webdataset writes them, or a JSON list "
        '[{"image_file": ..., "text": ...}]; '
        "the adapter is then written to out/adapter, and the state to runs/NAME",
    )
    data.add_argument("--skip-broken", action="store_true", help="leave out pictures and captions that cannot be read, and count them")
    data.add_argument("--side", type=at_least(1), help="size of the training pictures (default: that of the base model)")
    data.add_argument("--buckets", action="store_true", help="keep the shape of the pictures, nearly: train on several shapes of one area")
    base = p.add_argument_group("base model")
    base.add_argument("--base", type=Path, help="base model, a file or a folder (default: the mini weights)")
    base.add_argument("--prediction", choices=get_args(Prediction), help="what its UNet predicts, whatever its files say")
    base.add_argument("--image-encoder", type=Path, help="image encoder, a file or a folder (default: the one in the base folder)")
    return base


def add_source(p: argparse.ArgumentParser) -> None:
    """Add the options of the stages adapter and plus."""
    base = add_data(p)
    base.add_argument(
        "--checkpointing",
        type=at_least(1),
        nargs="?",
        const=ALL_LEVELS,
        default=0,
        metavar="LEVELS",
        help="recompute activations in the backward pass: slower, but saves memory. LEVELS: only at so many levels of the UNet, from the "
        "largest feature maps",
    )
    show = p.add_argument_group("what is shown")
    sheets = "with --data: steps between two sheets of drawings (default: 0, none)"
    show.add_argument("--preview-every", type=at_least(1), default=0, help=sheets)
    show.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too, to `tensorboard` in the state folder")
    base.add_argument("--from", dest="start", type=Path, metavar="FILE", help="start from this trained adapter")
    loss = p.add_argument_group("loss", "The paper uses neither.")
    loss.add_argument("--min-snr", type=rate, metavar="GAMMA", help="min-SNR weights (default: none; mini world: 1)")
    loss.add_argument("--noise-offset", type=share, default=0.0, help="add noise of this size that is the same at all pixels (default: 0)")
    many = p.add_argument_group("several processes, started by torchrun")
    many.add_argument(
        "--deterministic",
        type=power_of_two,
        nargs="?",
        const=8,
        default=0,
        metavar="PARTS",
        help="compute a batch in so many parts, a power of two (default: 8), and sum them in a binary tree: "
        "then 1, 2, 4, ... processes train the same weights to the last bit",
    )
    many.add_argument(
        "--shard-optimizer", action="store_true", help="keep only a part of the optimizer's moments in each process: saves memory"
    )
    many.add_argument("--shard", action="store_true", help="keep only a part of the frozen base in each process: slower, but saves memory")


def add_cache(p: argparse.ArgumentParser) -> None:
    """Add the options of `cache`, and default values for those that it lacks."""
    add_state(p)
    add_data(p, required=True)
    p.add_argument("--for", dest="reader", choices=ADAPTERS, default="adapter", help="stage that will read the pictures (default: adapter)")
    add_device(p)
    p.set_defaults(**dict.fromkeys(("weights", "pictures", "start", "min_snr")), noise_offset=0.0, deterministic=0, shard_optimizer=False)
    p.set_defaults(bf16=False, fp16=False, fp32=False, checkpointing=0, preview_every=0, tensorboard=False, shard=False)


def parser(description: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m train", description=description, formatter_class=form)
    stages = p.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, trains in {**STAGES, "all": "all stages, in this order"}.items():
        stage = stages.add_parser(name, help=trains, description=f"Train {trains}.")
        settings = add_settings(stage)
        stage.set_defaults(channels=None)
        if name == "unet":
            settings.add_argument("--channels", type=at_least(1), nargs=3, help="channels of the UNet's levels (default: 64 128 192)")
        if name in ADAPTERS:
            add_source(stage)
        else:
            nothing = ("data", "side", "base", "image_encoder", "prediction", "start", "min_snr")
            stage.set_defaults(**dict.fromkeys(nothing), checkpointing=0, skip_broken=False, noise_offset=0.0, deterministic=0)
            stage.set_defaults(preview_every=0, tensorboard=False, shard=False, shard_optimizer=False, buckets=False)
    encodes = "encode your own pictures ahead of training, and store the result in the state folder"
    add_cache(stages.add_parser("cache", help=encodes, description=f"{encodes.capitalize()}."))
    return p
