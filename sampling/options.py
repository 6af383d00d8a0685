"""The options of the command line, and what they say together."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from sampling.ddim import ddim
from sampling.dpm import dpm
from sampling.lambdas import Rule
from sampling.pipeline import WEIGHTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLERS = {"ddim": ddim, "dpm++": dpm}

# Of an image prompt, so of each --ip-adapter: options that may be given again, and the others with their defaults.
MANY = ("image", "image_weight", "negative_image")
ONE = {"scale": 1.0, "image_layers": None, "image_start": 0.0, "image_end": 1.0, "image_mask": None, "image_rule": None}
RULES = get_args(Rule)
OUTPUTS = ("out", "again", "save_embedding")  # what decides no picture
PATHS = ("checkpoint", "image_encoder", "init_image", "mask")  # of the others, those that name a file


class Following(argparse.Action):
    """Keeps a value with the number of --ip-adapter flags before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        setattr(args, self.dest, [*getattr(args, self.dest), (len(args.ip_adapter), value)])


def layers(text: str) -> Any:
    """The value of --image-layers: a preset's name, or JSON."""
    try:
        return json.loads(text) if text[:1] in ("{", "[") else text
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON ({error})") from None


def _image_prompt(p: argparse.ArgumentParser) -> None:
    """What each adapter has for itself."""

    def add(name: str, kind: Callable[[str], Any], about: str, choices: Sequence[str] | None = None) -> None:
        p.add_argument(name, type=kind, action=Following, default=[], help=about, choices=choices)

    add("--image", Path, "image prompt, or a file of --save-embedding; several make one prompt of several pictures")
    add("--image-weight", float, "weight of a picture: of several, one for each --image, in their order")
    add(
        "--image-rule",
        str,
        "what the weights multiply: what is read of each picture alone (output, as diffusers), its embedding (as "
        "ComfyUI_IPAdapter_plus), or its tokens (as refiners) (default output)",
        RULES,
    )
    add("--negative-image", Path, "a picture to keep away from: the unconditional pass sees it in place of none")
    add("--scale", float, "lambda, the weight of the image prompt (Eq. 8; default 1)")
    add(
        "--image-layers",
        layers,
        "where it acts: style, layout (InstantStyle's blocks), finest (the finest level, which carries colours in the mini world), "
        "a JSON list of a weight for each cross-attention layer, "
        """or diffusers' blocks: '{"up": {"block_1": [0, 1, 0]}}' (default: all alike)""",
    )
    add("--image-start", float, "the share of the steps that are over when it begins to act (default 0)")
    add("--image-end", float, "the share of the steps that are over when it has ceased to act (default 1)")
    add("--image-mask", Path, "where it acts in the picture: white yes, black no, grey in between; of any size")


def parser(about: str | None = None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sampling", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _image_prompt(p)
    p.add_argument(
        "--fit",
        choices=("crop", "squash", "pad"),
        default="crop",
        help="how a picture that is not square becomes one (default: crop, as CLIP does)",
    )
    p.add_argument("--prompt", default="", help="text prompt")
    p.add_argument("--negative-prompt", default="", help="text of the unconditional pass")
    p.add_argument("--guidance", type=float, default=7.5, help="w, the guidance weight (Eq. 7; default 7.5)")
    p.add_argument("--image-guidance", type=float, help="the image prompt's own w; --guidance is then the text's alone")
    p.add_argument("--steps", type=int, default=50, help="steps of the sampler (default 50)")
    p.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="DDIM, or DPM-Solver++(2M) (default ddim)")
    p.add_argument("--eta", type=float, default=0.0, help="0 is DDIM, 1 is DDPM (default 0); of ddim alone")
    p.add_argument("--init-image", type=Path, help="a picture to change; width and height are its own")
    p.add_argument(
        "--strength",
        type=float,
        help="how much it may change: the share of the steps that run, above 0, at most 1 (default 0.8; with --mask 1)",
    )
    p.add_argument("--mask", type=Path, help="white where to repaint --init-image, black where it stays; of its size")
    p.add_argument("--no-paste", action="store_true", help="with --mask: leave what was drawn, also where it is black")
    p.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    p.add_argument("--num", type=int, default=1, help="number of pictures (default 1)")
    p.add_argument("--width", type=int, help="in pixels (default: what the base model was trained at)")
    p.add_argument("--height", type=int, help="in pixels")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet: minutes to start, then faster")
    p.add_argument(
        "--checkpoint",
        type=Path,
        default=WEIGHTS,
        help="Stable Diffusion 1.5 as one file or a diffusers folder, or a folder of our own (default: the mini weights)",
    )
    p.add_argument(
        "--ip-adapter",
        type=Path,
        action="append",
        default=[],
        help="official adapter file (default: the folder's own); of several, each is followed by its own --image and --scale",
    )
    p.add_argument(
        "--image-encoder",
        type=Path,
        help="folder in transformers' layout, or a file of our own (default: the folder's own)",
    )
    p.add_argument(
        "--out", type=Path, default=Path("out.png"), help="PNG to write; with --num N, out-0.png ... (default out.png)"
    )
    p.add_argument(
        "--save-embedding", type=Path, help="safetensors to write the image prompt to; --image reads it again"
    )
    p.add_argument(
        "--again", type=Path, help="a PNG that this program wrote: draws it again from its own settings, to --out"
    )
    return p


def settle(args: argparse.Namespace) -> None:
    """Gives each adapter its pictures and its lambda, and a picture to change its strength.

    One adapter takes them wherever they stand; of several, each takes those that follow it, and `ip_adapter`, `image`,
    `scale` and the other options of an image prompt are then lists with an entry for each.
    """
    several, places = len(args.ip_adapter) > 1, range(1, max(1, len(args.ip_adapter)) + 1)
    found = {name: getattr(args, name) for name in (*MANY, *ONE)}
    if several and any(before == 0 for given in found.values() for before, _ in given):
        raise ValueError("of several --ip-adapter, each is followed by its own --image and --scale; none stands before")
    for name, given in found.items():
        each = [[value for before, value in given if before == place or not several] for place in places]
        if name in ONE and any(len(values) > 1 for values in each):
            raise ValueError(f"{flag(name)} is given twice for one adapter")
        values = [(*values, ONE[name])[0] if name in ONE else values for values in each]
        setattr(args, name, values if several else values[0])
    if several and [] in args.image:
        bare = args.ip_adapter[args.image.index([])]
        raise ValueError(f"of several --ip-adapter, each is followed by its own --image; {bare} has none")
    for pictures, weights in (
        zip(args.image, args.image_weight, strict=True) if several else [(args.image, args.image_weight)]
    ):
        if weights and len(weights) != len(pictures):
            raise ValueError(f"{len(weights)} --image-weight for {len(pictures)} --image: give each its own")
    args.ip_adapter = args.ip_adapter if several else (*args.ip_adapter, None)[0]
    _check(args, found)
    if args.init_image and args.strength is None:
        args.strength = 1.0 if args.mask else 0.8


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(args: argparse.Namespace, found: dict[str, list[Any]]) -> None:
    """Refuses what lacks its counterpart. A lambda alone is fine: it is that of no picture."""
    alone = [name for name, given in found.items() if given and name not in ("image", "scale")]
    if not found["image"] and (alone or args.image_guidance is not None):
        raise ValueError(f"{flag((*alone, 'image_guidance')[0])} is for an image prompt: name it with --image")
    if args.init_image is None and (args.mask or args.strength is not None):
        raise ValueError(
            f"{'--mask' if args.mask else '--strength'} is for a picture to change: name it with --init-image"
        )
    if args.no_paste and args.mask is None:
        raise ValueError("--no-paste is for a picture with a --mask")


def adapter_files(args: argparse.Namespace) -> list[Path]:
    """The adapters that are named."""
    named = args.ip_adapter if isinstance(args.ip_adapter, list) else [args.ip_adapter]
    return [Path(name) for name in named if name]


def image_prompts(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each adapter's image prompt; empty without pictures."""
    several, names = isinstance(args.ip_adapter, list), (*MANY, *ONE)
    each = zip(*(getattr(args, name) if several else [getattr(args, name)] for name in names), strict=True)
    prompts = [argparse.Namespace(**dict(zip(names, values, strict=True))) for values in each]
    for prompt in prompts:
        prompt.image = [Path(picture) for picture in prompt.image]
        prompt.negative_image = [Path(picture) for picture in prompt.negative_image]
        prompt.image_mask = Path(prompt.image_mask) if prompt.image_mask else None
    return [prompt for prompt in prompts if prompt.image]
