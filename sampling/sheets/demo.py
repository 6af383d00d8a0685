"""Draw the contact sheet of `make demo`: image prompts alone, with a text that names a scene, and at increasing lambda.

Scenes have more guidance by the text than by the image prompt, so that the text's background, size and place win. Where the text names
another subject, both have the same.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from sampling.images import check_png, open_image, save_image, to_images
from sampling.loading import load
from sampling.pipeline import Pipeline
from sampling.sheets.layout import sheet

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS, GUIDANCE, TEXT_GUIDANCE, STEPS = 4, 4.0, 8.0, 20
SCENES = {  # heading -> text: none names the subject
    '"on pink"': "on a pink background",
    '"small, top left"': "small on a white background, top left",
    '"bottom, yellow"': "on a yellow background, bottom",
}
LAMBDAS = (0.0, 0.6, 1.0, 1.5)
CONFLICT, CONFLICT_LAMBDAS = "a cupcake on a yellow background", (0.3, 0.6)
COLUMNS = (
    ["image prompt"],
    ["variations", ""],
    list(SCENES),
    [f"lambda {scale:g}" for scale in LAMBDAS],
    [f"conflict, {scale:g}" for scale in CONFLICT_LAMBDAS],
)


def cells() -> list[tuple[str, int, float]]:
    """Return (text, offset of the seed, lambda) for each drawing in a row."""
    variations = [("", 0, 1.0), ("", 1, 1.0)]
    scenes = [(text, 0, 1.0) for text in SCENES.values()]
    growing = [(scenes[0][0], 0, scale) for scale in LAMBDAS]
    return [*variations, *scenes, *growing, *[(CONFLICT, 0, scale) for scale in CONFLICT_LAMBDAS]]


def draw_row(pipeline: Pipeline, prompt: Image.Image, seed: int, bar: tqdm[None]) -> list[Image.Image]:
    """Draw one row: the image prompt, followed by its drawings."""
    drawings, embedding, conflicts = [prompt], pipeline.embed(prompt), len(CONFLICT_LAMBDAS)
    for part, guidance in ((cells()[:-conflicts], TEXT_GUIDANCE), (cells()[-conflicts:], GUIDANCE)):
        texts, seeds, scales = zip(*part, strict=True)
        pictures = pipeline.sample(
            texts,
            [seed + more for more in seeds],
            embedding,
            scale=torch.tensor(scales).view(-1, 1, 1, 1),
            guidance=guidance,
            image_guidance=GUIDANCE,
            steps=STEPS,
            watch=lambda _: bar.update() and None,
        )
        drawings += to_images(pictures)
    return drawings


def write(seed: int, out: Path) -> str:
    """Draw the sheet; return a summary of what was written. The seed determines the image prompts and the noise."""
    check_png(out)
    pictures, pipeline = random.Random(seed).sample(sorted(EXAMPLES.glob("*.png")), ROWS), load()
    with tqdm(total=2 * STEPS * ROWS, desc="drawing", unit="step", disable=None) as bar:
        rows = [draw_row(pipeline, open_image(picture), seed, bar) for picture in pictures]
    save_image(sheet(COLUMNS, rows, [""] * ROWS), out, {"command": f"python -m sampling.sheets demo --seed {seed}"})
    return f"{out}: {ROWS} image prompts"
