"""Draws a labelled sheet for each way to steer the mini weights, and names the flags of `python -m sampling` that do it.

python -m sampling.gallery --seed 0 --out out/gallery
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from sampling.demo import EXAMPLES, GUIDANCE, STEPS
from sampling.edit import Edit
from sampling.images import open_image, save_image, to_images, to_tensor
from sampling.lambdas import Lambda, Preset
from sampling.options import RULES, SAMPLERS
from sampling.pipeline import WEIGHTS, Pipeline, load
from sampling.sheets import sheet

Cells = tuple[list[list[str]], list[list[Image.Image]], list[str]]  # titles in groups, rows, a note for each row
PROMPTS = {  # pictures, and texts that ask for something else
    "mouse": "a cupcake on a white background",
    "pig": "a turtle on a blue background",
    "owl": "a rocket on a pink background",
}


@dataclass(frozen=True)
class Artist:
    """Draws with a pipeline from the example pictures, by their names."""

    pipeline: Pipeline
    seed: int = 0
    steps: int = STEPS

    def embed(self, *names: str) -> Tensor:
        return self.pipeline.embed([example(name) for name in names])

    def draw(self, embedding: Tensor | list[Tensor], text: str = "", num: int = 1, **options: Any) -> list[Image.Image]:
        """`num` pictures, picture i from seed + i."""
        options = {"guidance": GUIDANCE, "steps": self.steps} | options
        seeds = [self.seed + i for i in range(num)]
        return to_images(self.pipeline.draw([text] * num, seeds, embedding, **options))


def example(name: str) -> Image.Image:
    return open_image(EXAMPLES / f"{name}.png")


def box(left: int, top: int, right: int, bottom: int) -> Tensor:
    """A mask, `64 64`: 1 in the box."""
    mask = torch.zeros(64, 64)
    mask[top:bottom, left:right] = 1
    return mask


def as_picture(mask: Tensor) -> Image.Image:
    """A mask with a thin frame, because paper is white too."""
    return ImageOps.expand(to_images(mask.expand(1, 3, -1, -1) * 2 - 1)[0], 1, "grey")


def image_to_image(artist: Artist) -> Cells:
    strengths = (0.3, 0.45, 0.6, 0.75, 0.9)
    rows = []
    for start, prompt in (("cake", "mushroom"), ("rabbit", "pig"), ("ball", "mouse")):
        embedding, picture = artist.embed(prompt), to_tensor(example(start))
        drawn = [artist.draw(embedding, edit=Edit(picture, strength))[0] for strength in strengths]
        rows.append([example(start), example(prompt), *drawn])
    return [["start", "image prompt"], [f"strength {strength:g}" for strength in strengths]], rows, [""] * 3


def inpainting(artist: Artist) -> Cells:
    top, bottom, right = box(0, 0, 64, 30), box(0, 32, 64, 64), box(30, 0, 64, 64)
    rows = []
    for start, mask, prompt in (("alien", top, "hat"), ("rabbit", right, "ball"), ("mouse", bottom, "alien")):
        edit = Edit(to_tensor(example(start)), 1.0, mask[None, None])
        drawn = artist.draw(artist.embed(prompt), num=4, edit=edit)
        rows.append([example(start), as_picture(mask), example(prompt), *drawn])
    return [["picture", "mask", "image prompt"], ["four seeds", "", "", ""]], rows, [""] * 3


def several_pictures(artist: Artist) -> Cells:
    names, shares = ("mouse", "owl"), (0.0, 0.25, 0.5, 0.75, 1.0)
    embedding, pictures, rows = artist.embed(*names), [example(name) for name in names], []
    for rule in RULES:
        lambdas = [Lambda(images=(1 - share, share), rule=rule) for share in shares]
        rows.append([*pictures, *(artist.draw(embedding, scale=lam)[0] for lam in lambdas)])
    weights = [f"{1 - share:g} and {share:g}" for share in shares]
    return [["one prompt of", "two pictures"], weights], rows, [f"--image-rule {rule}" for rule in RULES]


def negative_image(artist: Artist) -> Cells:
    rows = []
    for prompt, negative in (("snail", "banana"), ("ball", "rabbit"), ("mouse", "owl")):
        embedding, against = artist.embed(prompt), artist.embed(negative)
        drawn = [artist.draw(embedding, num=3, against=[no]) for no in (None, against)]
        rows.append([example(prompt), example(negative), *drawn[0], *drawn[1]])
    return [["image prompt", "negative"], ["without it", "", ""], ["with it", "", ""]], rows, [""] * 3


def layers(artist: Artist) -> Cells:
    lambdas, rows = [Lambda(0.0), *(Lambda(layers=each) for each in (None, *get_args(Preset)))], []
    for name, text in PROMPTS.items():
        drawn = [artist.draw(artist.embed(name), text, scale=lam)[0] for lam in lambdas]
        rows.append([example(name), *drawn])
    return [["image prompt"], ["text alone"], ["all layers", *get_args(Preset)]], rows, [*PROMPTS.values()]


def steps(artist: Artist) -> Cells:
    ranges = [(0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0)]
    lambdas, rows = [Lambda(start=start, end=end) for start, end in ranges], []
    for name, text in PROMPTS.items():
        drawn = [artist.draw(artist.embed(name), text, scale=lam)[0] for lam in lambdas]
        rows.append([example(name), *drawn])
    return [["image prompt"], [f"{start:g} to {end:g}" for start, end in ranges]], rows, [*PROMPTS.values()]


def regions(artist: Artist) -> Cells:
    twice = replace(artist, pipeline=replace(artist.pipeline, adapters=artist.pipeline.adapters * 2))
    masks, rows = (box(0, 0, 32, 64), box(32, 0, 64, 64)), []
    for names in (("mouse", "pig"), ("owl", "alien"), ("snail", "mushroom")):
        lambdas = [Lambda(mask=mask) for mask in masks]
        drawn = twice.draw([artist.embed(name) for name in names], num=4, scale=lambdas)
        cells = [cell for name, mask in zip(names, masks, strict=True) for cell in (example(name), as_picture(mask))]
        rows.append([*cells, *drawn])
    return [["left", "its mask", "right", "its mask"], ["four seeds", "", "", ""]], rows, [""] * 3


def two_guidances(artist: Artist) -> Cells:
    weights, text, rows = (1.0, 2.0, 4.0, 8.0), "an owl on a yellow background", []
    embedding = artist.embed("mushroom")
    for w_t in weights:
        drawn = [artist.draw(embedding, text, guidance=w_t, image_guidance=w_i, scale=0.6)[0] for w_i in weights]
        rows.append([example("mushroom"), *drawn])
    notes = [f'--guidance {w_t:g}, "{text}"' for w_t in weights]
    return [["image prompt"], [f"picture {w_i:g}" for w_i in weights]], rows, notes


def samplers(artist: Artist) -> Cells:
    counts, rows, notes = [max(1, artist.steps * n // STEPS) for n in (5, 10, 20, 50)], [], []
    for name in ("alien", "banana"):
        for flag, sampler in SAMPLERS.items():
            drawn = [artist.draw(artist.embed(name), sampler=sampler, steps=n, guidance=7.5)[0] for n in counts]
            rows.append([example(name), *drawn])
            notes.append(f"--sampler {flag} --guidance 7.5")
    return [["image prompt"], [f"{n} steps" for n in counts]], rows, notes


def fine_grained(artist: Artist) -> Cells:
    plus = replace(artist, pipeline=load(adapter=WEIGHTS / "ip_adapter_plus.safetensors"))
    rows = []
    for name in ("alien", "cake", "train", "hat"):
        drawn = [each.draw(each.embed(name), num=3) for each in (artist, plus)]
        rows.append([example(name), *drawn[0], *drawn[1]])
    return [["image prompt"], ["global: 4 tokens", "", ""], ["fine-grained: 16 tokens", "", ""]], rows, [""] * 4


SHEETS: dict[str, tuple[str, Callable[[Artist], Cells]]] = {  # by its file's name: what is seen, what draws it
    "image_to_image": ("From a picture: the stronger, the less of it stays (--init-image, --strength)", image_to_image),
    "inpainting": ("White is painted anew from the image prompt, black stays (--init-image, --mask)", inpainting),
    "several_pictures": (
        "One prompt of two pictures, weighed by three rules (--image, --image-weight, --image-rule)",
        several_pictures,
    ),
    "negative_image": ("Away from what both have in common, here the background (--negative-image)", negative_image),
    "layers": ("The same lambda in some layers only (--image-layers): here the finest carry the colours", layers),
    "steps": ("The image prompt in a share of the steps only (--image-start, --image-end)", steps),
    "regions": ("Two image prompts, each in its own half (--ip-adapter twice, --image-mask)", regions),
    "guidance": ("A weight for text (--guidance), one for the picture (--image-guidance)", two_guidances),
    "fine_grained": ("Plus reads the encoder's grid, not its one embedding (--ip-adapter)", fine_grained),
    "samplers": ("DDIM and DPM-Solver++ (--sampler, --steps)", samplers),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sampling.gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/gallery"))
    args = parser.parse_args()
    began = time.time()
    try:
        artist = Artist(load(), args.seed)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    settings = {"command": f"python -m sampling.gallery --seed {args.seed}"}
    for name, (title, draw) in tqdm(SHEETS.items(), desc="drawing", unit="sheet", disable=None):
        columns, rows, notes = draw(artist)
        save_image(sheet(columns, rows, notes, title=title), args.out / f"{name}.png", settings)
    print(f"{args.out}: {len(SHEETS)} sheets, drawn in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
