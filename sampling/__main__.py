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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoints.adapters import adapter_file, projection_of
from checkpoints.files import files_of, sha256
from checkpoints.stable_diffusion import unet_config
from model.image_encoder import Fit
from sampling import images
from sampling.edit import Edit
from sampling.embeddings import load_embedding, save_embedding
from sampling.lambdas import Lambda, layer_weights
from sampling.options import DTYPES, OUTPUTS, PATHS, SAMPLERS, adapter_files, image_prompts, parser, settle
from sampling.pipeline import Pipeline, compiled, load, prompt_files

BATCH = 16


def read_mask(path: Path | None) -> Tensor | None:
    """A grey picture as `1 1 h w` in [0, 1]."""
    return images.to_tensor(images.open_image(path).convert("L")) / 2 + 0.5 if path else None


def lambda_of(prompt: argparse.Namespace) -> Lambda:
    """What an image prompt's options say of its lambda."""
    mask = read_mask(prompt.image_mask)
    mask = None if mask is None else mask[0, 0]
    shares, images = (prompt.image_start, prompt.image_end), tuple(prompt.image_weight)
    return Lambda(prompt.scale, prompt.image_layers, *shares, mask, images, prompt.image_rule or "output")


def read_prompt(paths: list[Path]) -> list[Image.Image | Path]:
    """Opened pictures; a file of an embedding stays a path until `read_embeddings`, which needs its adapter's file."""
    return [path if path.suffix == ".safetensors" else images.open_image(path) for path in paths]


def read_embeddings(prompt: list[Image.Image | Path], adapter: Path) -> list[Image.Image | Tensor]:
    """A prompt with its files of embeddings read, as the header of the adapter's file says that it reads them."""
    reads = projection_of(adapter_file(adapter))
    return [load_embedding(one, reads) if isinstance(one, Path) else one for one in prompt]


def check_layers(checkpoint: Path, lambdas: list[Lambda]) -> None:
    """Raises ValueError where --image-layers does not fit the base model, as its config or header describes it."""
    for layers in [lam.layers for lam in lambdas if lam.layers is not None]:
        layer_weights(layers, unet_config(checkpoint))


def embed(pipeline: Pipeline, prompt: Sequence[Image.Image | Tensor], fit: Fit, adapter: int) -> Tensor:
    """Pictures and embeddings, in their order, as one prompt of an adapter."""
    pictures = [one for one in prompt if isinstance(one, Image.Image)]
    seen = iter(pipeline.embed(pictures, fit, adapter).split(1, dim=1) if pictures else ())
    like = next(pipeline.adapters[adapter].parameters())
    return torch.cat([one.to(like) if isinstance(one, Tensor) else next(seen) for one in prompt], dim=1)


def opened(args: argparse.Namespace) -> Edit | None:
    """The picture to change, and its mask."""
    if args.init_image is None:
        return None
    mask = read_mask(args.mask)
    return Edit(images.to_tensor(images.open_image(args.init_image)), args.strength, mask, not args.no_paste)


def files(args: argparse.Namespace) -> dict[str, str]:
    """The hash of every file that decides the picture: weights, their configs, image prompts, a picture to change, masks."""
    prompts, base = image_prompts(args), [args.checkpoint]
    pictures = [picture for prompt in prompts for picture in (*prompt.image, *prompt.negative_image)]
    edited = [path for path in (args.init_image, args.mask, *(prompt.image_mask for prompt in prompts)) if path]
    if (args.checkpoint / "unet.safetensors").exists():
        base = [args.checkpoint / f"{part}.safetensors" for part in ("unet", "vae", "text_encoder")]
    adapters, encoder = prompt_files(args.checkpoint, adapter_files(args) or None, args.image_encoder)
    used = [*base, *adapters, encoder] if pictures else base
    names = [name for path in used if path for name in files_of(path)]
    return {str(name): sha256(name) for name in [*names, *pictures, *edited]}


def recall(given: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the picture that is given to draw again, checked against the files as they are now."""
    path: Path = given.again
    settings = images.read_settings(path)
    arguments = settings.get("arguments", {})
    if set(arguments) != set(vars(parser().parse_args([]))) - {*OUTPUTS}:
        raise ValueError(f"{path}: a sheet, or drawn by another version of this program, so it can't be drawn again")
    args = argparse.Namespace(**arguments | {name: getattr(given, name) for name in OUTPUTS})
    for name in PATHS:
        setattr(args, name, Path(value) if (value := getattr(args, name)) else None)
    for name, digest in settings["sha256"].items():
        if not Path(name).exists():
            raise ValueError(f"{path} was drawn with {name}, which is not there")
        if sha256(Path(name)) != digest:
            raise ValueError(f"{path} was drawn with another {name}: the file has changed since")
    return args


def draw(
    pipeline: Pipeline,
    args: argparse.Namespace,
    embeddings: list[Tensor],
    against: list[Tensor | None],
    lambdas: list[Lambda],
    edit: Edit | None,
) -> list[Image.Image]:
    """The pictures that the arguments ask for; each adapter has its embeddings, those against it, and its lambda."""
    height, width = edit.size if edit else pipeline.native_size
    steps = args.steps - (edit.start(args.steps) if edit else 0)
    pictures = []
    with tqdm(total=steps * -(-args.num // BATCH), desc="drawing", unit="step", disable=None) as bar:
        for first in range(0, args.num, BATCH):
            seeds = [args.seed + i for i in range(first, min(first + BATCH, args.num))]
            drawn = pipeline.draw(
                [args.prompt] * len(seeds),
                seeds,
                embeddings or None,
                [args.negative_prompt] * len(seeds),
                scale=lambdas,
                guidance=args.guidance,
                steps=args.steps,
                eta=args.eta,
                size=(height if args.height is None else args.height, width if args.width is None else args.width),
                watch=lambda _: bar.update() and None,
                sampler=SAMPLERS[args.sampler],
                edit=edit,
                image_guidance=args.image_guidance,
                against=against or None,
            )
            pictures += images.to_images(drawn)
    return pictures


def run(argv: list[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    settle(args)
    if args.again:
        args = recall(args)
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, not {args.num}")
    if args.out.is_dir():
        raise ValueError(f"{args.out} is a folder: name the file to write")
    # a bad picture is refused before the weights are read
    prompts = [read_prompt(prompt.image) for prompt in image_prompts(args)]
    negatives = [read_prompt(prompt.negative_image) for prompt in image_prompts(args)]
    if args.save_embedding and len(prompts) != 1:
        raise ValueError("--save-embedding writes one adapter's image prompt: name it with --image")
    lambdas = [lambda_of(prompt) for prompt in image_prompts(args)]
    edit = opened(args)
    adapters, encoder = prompt_files(args.checkpoint, adapter_files(args) or None, args.image_encoder)
    sees = any(isinstance(one, Image.Image) for prompt in (*prompts, *negatives) for one in prompt)
    if prompts and not (adapters and (encoder or not sees)):
        flag = "--image-encoder" if adapters else "--ip-adapter"
        raise FileNotFoundError(
            f"an image prompt needs {flag}, {args.checkpoint} has none; `make weights` trains the mini ones"
        )
    check_layers(args.checkpoint, lambdas)
    read, read_against = (
        [read_embeddings(prompt, adapter) for prompt, adapter in zip(each, adapters, strict=False)]
        for each in (prompts, negatives)
    )
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    pipeline = load(args.checkpoint, adapters, encoder, DTYPES[args.dtype], args.device)
    if args.compile:
        pipeline = replace(pipeline, unet=compiled(pipeline.unet))
    embeddings = [embed(pipeline, prompt, args.fit, i) for i, prompt in enumerate(read)]
    against = [embed(pipeline, prompt, args.fit, i) if prompt else None for i, prompt in enumerate(read_against)]
    pictures = draw(pipeline, args, embeddings, against, lambdas, edit)
    if args.save_embedding:
        save_embedding(embeddings[0], args.save_embedding)
    arguments = {k: v for k, v in vars(args).items() if k not in OUTPUTS}
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
