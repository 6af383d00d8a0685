"""Draws a labelled contact sheet from the mini weights: what an image prompt does, alone, with text, and as lambda grows.

python -m sampling.demo --seed 0 --out out/demo.png
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from sampling.images import open_image, save_image, to_images
from sampling.pipeline import Pipeline, load

EXAMPLES = Path(__file__).parent / "examples"
LAMBDAS = (0.0, 0.25, 0.5, 1.0, 1.5)
ROWS, CELL, GAP = 4, 128, 6
GUIDANCE, STEPS, WITH_TEXT = 4.0, 20, 0.4
BACKGROUNDS = ("a white", "a yellow", "a green", "a blue", "a pink", "a purple")
WORDS = (
    "a fox",
    "a rocket",
    "an owl",
    "a cupcake",
    "a castle",
    "a penguin",
    "a mushroom",
    "a robot",
    "a turtle",
    "a strawberry",
)


def plan(seed: int) -> list[tuple[Path, str]]:
    """(image prompt, text prompt) of each row: the seed decides."""
    rng = random.Random(seed)
    pictures = rng.sample(sorted(EXAMPLES.glob("*.png")), ROWS)
    words = rng.sample(
        [word for word in WORDS if not any(word.split()[-1] in picture.stem for picture in pictures)], ROWS
    )
    return [
        (picture, f"{word} on {rng.choice(BACKGROUNDS)} background")
        for picture, word in zip(pictures, words, strict=True)
    ]


def draw_rows(pipeline: Pipeline, rows: list[tuple[Path, str]], seed: int) -> list[list[Image.Image]]:
    """For each row: the prompt, two variations (empty text), two with text, and one picture for each of LAMBDAS."""
    variations, with_text = 2, 2
    scales = [1.0] * variations + [WITH_TEXT] * with_text + list(LAMBDAS)
    seeds = [seed, seed + 1] * 2 + [seed] * len(LAMBDAS)
    drawn, prompts = [], [open_image(picture) for picture, _ in rows]
    with tqdm(total=STEPS * len(rows), desc="drawing", unit="step", disable=None) as bar:
        for prompt, (_, text) in zip(prompts, rows, strict=True):
            texts = [""] * variations + [text] * (with_text + len(LAMBDAS))
            lam = torch.tensor(scales).view(-1, 1, 1, 1)
            pictures = pipeline.draw(
                texts,
                seeds,
                pipeline.embed([prompt]),
                scale=lam,
                guidance=GUIDANCE,
                steps=STEPS,
                watch=lambda _: bar.update() and None,
            )
            drawn.append([prompt, *to_images(pictures)])
    return drawn


def sheet(drawn: list[list[Image.Image]], texts: list[str]) -> Image.Image:
    """The contact sheet: a row a prompt, titles above the columns, the text prompt under its pictures."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    titles = ["image prompt", "variations", "", "with the text below", "", *(f"lambda {scale:g}" for scale in LAMBDAS)]
    groups = [0, 1, 1, 3, 3, *[5] * len(LAMBDAS)]
    lefts = [GAP + i * (CELL + GAP) + 18 * sorted(set(groups)).index(group) for i, group in enumerate(groups)]
    top, row_height = 36, CELL + 30
    canvas = Image.new("RGB", (lefts[-1] + CELL + GAP, top + row_height * len(drawn)), "white")
    pen = ImageDraw.Draw(canvas)
    for left, title in zip(lefts, titles, strict=True):
        pen.text((left, 10), title, fill="black", font=font)
    for y, (pictures, text) in enumerate(zip(drawn, texts, strict=True)):
        for left, picture in zip(lefts, pictures, strict=True):
            canvas.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + y * row_height))
        pen.text((lefts[3], top + y * row_height + CELL + 4), text, fill="#333333", font=small)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sampling.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    args = parser.parse_args()
    began = time.time()
    try:
        pipeline = load()
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    rows = plan(args.seed)
    save_image(
        sheet(draw_rows(pipeline, rows, args.seed), [text for _, text in rows]),
        args.out,
        {"command": f"python -m sampling.demo --seed {args.seed}"},
    )
    print(f"{args.out}: {len(rows)} image prompts, drawn in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
