"""Draws a labelled contact sheet from the mini weights: what an image prompt does, alone, with text, and as lambda grows."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from sampling.images import check_png, open_image, save_image, to_images
from sampling.lambdas import layer_weights
from sampling.pipeline import Pipeline, load
from sampling.sheets.layout import sheet

EXAMPLES = Path(__file__).parent.parent / "examples"
LAMBDAS = (0.0, 0.25, 0.5, 1.0, 1.5)
COLUMNS = (
    ["image prompt"],
    ["variations", ""],
    ["with the text below", ""],
    [f"lambda {scale:g}" for scale in LAMBDAS],
)
ROWS = 4
GUIDANCE, STEPS = 4.0, 20
WITH_TEXT = 0.6  # lambda beside a text, in the finest layers, so that colours come and shapes do not
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
    """For each row: the prompt, two variations (empty text), two with text (the picture in the finest layers alone), and one
    picture for each of LAMBDAS (in all layers)."""
    variations, with_text = 2, 2
    scales = [1.0] * variations + [WITH_TEXT] * with_text + list(LAMBDAS)
    alone = [1.0] * variations + [0.0] * with_text + [1.0] * len(LAMBDAS)  # whether the coarse layers see the picture
    finest = layer_weights("finest", pipeline.unet.config)
    seeds = [seed, seed + 1] * 2 + [seed] * len(LAMBDAS)
    drawn, prompts = [], [open_image(picture) for picture, _ in rows]
    with tqdm(total=STEPS * len(rows), desc="drawing", unit="step", disable=None) as bar:
        for prompt, (_, text) in zip(prompts, rows, strict=True):
            texts = [""] * variations + [text] * (with_text + len(LAMBDAS))
            lam = torch.tensor(scales).view(-1, 1, 1, 1)
            coarse = lam * torch.tensor(alone).view(-1, 1, 1, 1)
            pictures = pipeline.sample(
                texts,
                seeds,
                pipeline.embed([prompt]),
                scale=[lam if weight else coarse for weight in finest],
                guidance=GUIDANCE,
                steps=STEPS,
                watch=lambda _: bar.update() and None,
            )
            drawn.append([prompt, *to_images(pictures)])
    return drawn


def write(seed: int, out: Path) -> str:
    """Draws the sheet to a file, and says what it wrote."""
    check_png(out)
    rows = plan(seed)
    page = sheet(COLUMNS, draw_rows(load(), rows, seed), [text for _, text in rows], note_at=3)
    save_image(page, out, {"command": f"python -m sampling.sheets demo --seed {seed}"})
    return f"{out}: {len(rows)} image prompts"
