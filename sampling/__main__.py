"""Draws pictures from an image prompt, a text prompt, or both.

python -m sampling --image cat.png --prompt "on a pink background" --scale 0.7 --seed 0 --out out.png
python -m sampling --ip-adapter a.bin --image x.png --scale 0.5 --ip-adapter b.bin --image y.png --scale 0.8
python -m sampling --init-image photo.png --mask mask.png --prompt "a red hat" --out out.png
python -m sampling --again out.png
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import weights_convert
from sampling import images
from sampling.ddim import ddim
from sampling.dpm import dpm
from sampling.edit import Edit
from sampling.pipeline import WEIGHTS, Pipeline, compiled, load, prompt_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLERS = {"ddim": ddim, "dpm++": dpm}
BATCH = 16


class Following(argparse.Action):
    """Keeps a value with the number of --ip-adapter flags before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        setattr(args, self.dest, [*getattr(args, self.dest), (len(args.ip_adapter), value)])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--image",
        type=Path,
        action=Following,
        default=[],
        help="image prompt; several make one prompt of several pictures",
    )
    p.add_argument(
        "--fit",
        choices=("crop", "squash", "pad"),
        default="crop",
        help="how a picture that is not square becomes one (default: crop, as CLIP does)",
    )
    p.add_argument("--prompt", default="", help="text prompt")
    p.add_argument("--negative-prompt", default="", help="text of the unconditional pass")
    p.add_argument(
        "--scale",
        type=float,
        action=Following,
        default=[],
        help="lambda, the weight of the image prompt (Eq. 8; default 1)",
    )
    p.add_argument("--guidance", type=float, default=7.5, help="w, the guidance weight (Eq. 7; default 7.5)")
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
        "--again", type=Path, help="a PNG that this program wrote: draws it again from its own settings, to --out"
    )
    return p


def settle(args: argparse.Namespace) -> None:
    """Gives each adapter its pictures and its lambda, and a picture to change its strength.

    One adapter takes them wherever they stand; of several, each takes those that follow it, and `ip_adapter`, `image` and
    `scale` are then lists with an entry for each.
    """
    several, places = len(args.ip_adapter) > 1, range(1, max(1, len(args.ip_adapter)) + 1)

    def at(place: int, found: list[tuple[int, Any]]) -> list[Any]:
        return [value for before, value in found if before == place or not several]

    pictures, lambdas = ([at(place, found) for place in places] for found in (args.image, args.scale))
    if several and (at(0, args.image) or at(0, args.scale)):
        raise ValueError("of several --ip-adapter, each is followed by its own --image and --scale; none stands before")
    if several and [] in pictures:
        bare = args.ip_adapter[pictures.index([])]
        raise ValueError(f"of several --ip-adapter, each is followed by its own --image; {bare} has none")
    if any(len(given) > 1 for given in lambdas):
        raise ValueError("--scale is given twice for one adapter")
    args.ip_adapter, args.image, args.scale = args.ip_adapter or [None], pictures, [(*lam, 1.0)[0] for lam in lambdas]
    if not several:
        args.ip_adapter, args.image, args.scale = args.ip_adapter[0], args.image[0], args.scale[0]
    if args.init_image is None and (args.mask or args.strength is not None):
        flag = "--mask" if args.mask else "--strength"
        raise ValueError(f"{flag} is for a picture to change: name it with --init-image")
    if args.no_paste and args.mask is None:
        raise ValueError("--no-paste is for a picture with a --mask")
    if args.init_image and args.strength is None:
        args.strength = 1.0 if args.mask else 0.8


def adapter_files(args: argparse.Namespace) -> list[Path]:
    """The adapters that are named."""
    named = args.ip_adapter if isinstance(args.ip_adapter, list) else [args.ip_adapter]
    return [Path(name) for name in named if name]


def image_prompts(args: argparse.Namespace) -> list[tuple[list[Path], float]]:
    """(pictures, lambda) of each adapter; empty without pictures."""
    several = isinstance(args.ip_adapter, list)
    each = zip(args.image, args.scale, strict=True) if several else [(args.image, args.scale)]
    return [([Path(picture) for picture in pictures], scale) for pictures, scale in each if pictures]


def opened(args: argparse.Namespace) -> Edit | None:
    """The picture to change, and its mask."""
    if args.init_image is None:
        return None
    mask = images.to_tensor(images.open_image(args.mask).convert("L")) / 2 + 0.5 if args.mask else None
    return Edit(images.to_tensor(images.open_image(args.init_image)), args.strength, mask, not args.no_paste)


def files(args: argparse.Namespace) -> dict[str, str]:
    """The hash of every file that decides the picture: weights, their configs, image prompts, a picture to change and its mask."""
    base, pictures = [args.checkpoint], [picture for prompt, _ in image_prompts(args) for picture in prompt]
    edited = [picture for picture in (args.init_image, args.mask) if picture]
    if (args.checkpoint / "unet.safetensors").exists():
        base = [args.checkpoint / f"{part}.safetensors" for part in ("unet", "vae", "text_encoder")]
    adapters, encoder = prompt_files(args.checkpoint, adapter_files(args) or None, args.image_encoder)
    used = [*base, *adapters, encoder] if pictures else base
    names = [name for path in used if path for name in weights_convert.files_of(path)]
    return {str(name): weights_convert.sha256(name) for name in [*names, *pictures, *edited]}


def recall(path: Path, out: Path) -> argparse.Namespace:
    """The arguments of a picture, checked against the files as they are now."""
    settings = images.read_settings(path)
    arguments = settings.get("arguments", {})
    if set(arguments) != set(vars(parser().parse_args([]))) - {"out", "again"}:
        raise ValueError(f"{path}: a sheet, or drawn by another version of this program, so it can't be drawn again")
    args = argparse.Namespace(**arguments)
    for name in ("checkpoint", "image_encoder", "init_image", "mask"):
        setattr(args, name, Path(value) if (value := getattr(args, name)) else None)
    for name, digest in settings["sha256"].items():
        if not Path(name).exists():
            raise ValueError(f"{path} was drawn with {name}, which is not there")
        if weights_convert.sha256(Path(name)) != digest:
            raise ValueError(f"{path} was drawn with another {name}: the file has changed since")
    args.out = out
    return args


def draw(
    pipeline: Pipeline, args: argparse.Namespace, prompts: list[list[Image.Image]], edit: Edit | None
) -> list[Image.Image]:
    """The pictures that the arguments ask for; `prompts` are the opened pictures of each adapter."""
    height, width = edit.size if edit else pipeline.native_size
    steps = args.steps - (edit.start(args.steps) if edit else 0)
    embeddings = [pipeline.embed(prompt, args.fit) for prompt in prompts]
    pictures = []
    with tqdm(total=steps * -(-args.num // BATCH), desc="drawing", unit="step", disable=None) as bar:
        for first in range(0, args.num, BATCH):
            seeds = [args.seed + i for i in range(first, min(first + BATCH, args.num))]
            drawn = pipeline.draw(
                [args.prompt] * len(seeds),
                seeds,
                embeddings or None,
                [args.negative_prompt] * len(seeds),
                scale=[scale for _, scale in image_prompts(args)],
                guidance=args.guidance,
                steps=args.steps,
                eta=args.eta,
                size=(height if args.height is None else args.height, width if args.width is None else args.width),
                watch=lambda _: bar.update() and None,
                sampler=SAMPLERS[args.sampler],
                edit=edit,
            )
            pictures += images.to_images(drawn)
    return pictures


def run(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    settle(args)
    if args.again:
        args = recall(args.again, args.out)
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, not {args.num}")
    if args.out.is_dir():
        raise ValueError(f"{args.out} is a folder: name the file to write")
    # a bad picture is refused before the weights are read
    prompts = [[images.open_image(path) for path in paths] for paths, _ in image_prompts(args)]
    edit = opened(args)
    adapters, encoder = prompt_files(args.checkpoint, adapter_files(args) or None, args.image_encoder)
    if prompts and not (adapters and encoder):
        flag = "--image-encoder" if adapters else "--ip-adapter"
        raise FileNotFoundError(
            f"an image prompt needs {flag}, {args.checkpoint} has none; `make weights` trains the mini ones"
        )
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    pipeline = load(args.checkpoint, adapters, encoder, DTYPES[args.dtype], args.device)
    if args.compile:
        pipeline = replace(pipeline, unet=compiled(pipeline.unet))
    pictures = draw(pipeline, args, prompts, edit)
    arguments = {k: v for k, v in vars(args).items() if k not in ("out", "again")}
    settings = {"arguments": json.loads(json.dumps(arguments, default=str)), "sha256": files(args)}
    for i, picture in enumerate(pictures):
        path = args.out if args.num == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
        one = settings | {"arguments": settings["arguments"] | {"seed": args.seed + i, "num": 1}}
        images.save_image(picture, path, one)
        print(path)


def main() -> None:
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        run()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
