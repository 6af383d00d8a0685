"""Draw a sheet of attention maps, one for each word and each image token.  `python -m eval attention`"""

from __future__ import annotations

import math
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from PIL import Image, ImageOps
from torch import Tensor

from checkpoints.files import check_output
from eval.attention_maps import Named, finest, name_maps, record
from sampling.images import open_image, save_image, to_images
from sampling.loading import load
from sampling.pipeline import Pipeline
from sampling.request import WEIGHTS

COLUMNS, INCHES, DPI, SIDE = 7, 1.6, 100, 256
HEAT = matplotlib.colormaps["inferno"]
WORDS_NOTE = (
    "Bright parts of the drawing attend to the word. Each map is averaged over heads, timesteps and the finest layers, and scaled to its "
    "own maximum. To compare two maps, use the percentages: they are shares of the attention to the text."
)
TOKENS_NOTE = (
    "The adapter computes these tokens from the image prompt. They have a softmax of their own, so their shares also add up to 100%. Their "
    "attention is multiplied by lambda and added to the attention to the text."
)


@dataclass(frozen=True)
class Section:
    """Labelled pictures under a title and a note."""

    title: str
    note: str
    cells: list[tuple[Image.Image, str]]

    @property
    def rows(self) -> int:
        return math.ceil(len(self.cells) / COLUMNS)


def draw_with_maps(
    pipeline: Pipeline, prompt: str, embedding: Tensor | None, scale: float, guidance: float, seed: int, steps: int
) -> tuple[Image.Image, Tensor]:
    """Draw once; return the drawing and its `finest` maps, `m y x`, averaged over timesteps."""
    steps_maps = []
    with record(pipeline.unet) as maps:

        def watch(_: object) -> None:
            steps_maps.append(finest(maps))
            maps.clear()

        drawing = pipeline.sample([prompt], [seed], embedding, scale=scale, guidance=guidance, steps=steps, watch=watch)
    return to_images(drawing)[0], torch.stack(steps_maps).mean(dim=0)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Overlay a map `y x`, in colour, on the picture, in dim grey. The map is divided by its maximum and upsampled bilinearly."""
    small = Image.fromarray((heat / heat.max().clamp(min=1e-12)).float().numpy())
    alpha = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR))
    grey = np.asarray(picture.convert("L").convert("RGB")) * 0.4
    blend = grey + 0.85 * alpha[..., None] * (255 * HEAT(alpha)[..., :3] - grey)
    return Image.fromarray(blend.round().astype(np.uint8))


def overlays(drawing: Image.Image, pairs: Named) -> list[tuple[Image.Image, str]]:
    """Make a cell for each map, labelled with its share of the attention."""
    return [(overlay(drawing, heat), f"{name}\n{heat.mean():.1%} of the attention") for name, heat in pairs]


def compose(sections: Sequence[Section]) -> Image.Image:
    """Lay out the colour key and the sections, one below the other, in rows of `COLUMNS` cells."""
    heights = [section.rows * (INCHES + 0.4) + 0.8 for section in sections]
    figure = Figure(figsize=(COLUMNS * INCHES, sum(heights)), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, section, height in zip(panels, sections, heights, strict=True):
        _fill(panel, section, height)
    key = figure.add_axes((0.83, 1 - 0.2 / sum(heights), 0.14, 0.12 / sum(heights)))
    key.imshow(np.linspace(0, 1, 256)[None], HEAT, aspect="auto")
    key.set_xticks([0, 255], ["no attention", "most"], fontsize=7)
    key.set_yticks([])
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _fill(panel: SubFigure, section: Section, height: float) -> None:
    """Draw a section into its part of the figure, `height` inches high."""
    panel.text(0.01, 1 - 0.08 / height, section.title, fontsize=13, va="top")
    panel.text(0.01, 1 - 0.34 / height, textwrap.fill(section.note, 165), fontsize=8, color="#555555", va="top")
    grid = panel.subplots(section.rows, COLUMNS, squeeze=False)
    panel.subplots_adjust(0.01, 0.4 / height, 0.99, 1 - 0.75 / height, wspace=0.06, hspace=0.4 / INCHES)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (picture, label) in zip(grid.flat, section.cells, strict=False):
        axes.imshow(picture)
        axes.text(0, -0.04, label, fontsize=8, va="top", transform=axes.transAxes)


def attention_sheet(
    pipeline: Pipeline,
    pictures: Sequence[Image.Image],
    prompt: str,
    scale: float,
    guidance: float,
    seed: int,
    steps: int,
) -> Image.Image:
    """Draw once and show the attention maps. Raises ValueError if there is neither a text nor an image prompt."""
    if not (prompt or pictures):
        raise ValueError("there is no prompt: give --prompt, --image, or both")
    embedding = pipeline.embed(pictures) if pictures else None
    drawing, maps = draw_with_maps(pipeline, prompt, embedding, scale, guidance, seed, steps)
    drawing = drawing.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    prompts = [f'the text prompt "{prompt}"'] * bool(prompt) + [f"an image prompt, lambda {scale:g}"] * bool(pictures)
    thumbnails = [ImageOps.fit(picture, (SIDE, SIDE), Image.Resampling.LANCZOS) for picture in pictures]
    cells = [*((picture, "image prompt") for picture in thumbnails), (drawing, "the drawing")]
    sections = [Section("Prompts and drawing", " and ".join(prompts), cells)]
    words, tokens = name_maps(pipeline.text, prompt, maps)
    if prompt:
        sections.append(Section("Where the drawing looks at each word", WORDS_NOTE, overlays(drawing, words)))
    if pictures:
        title = "Where the drawing looks at the image prompt"
        sections.append(Section(title, TOKENS_NOTE, overlays(drawing, tokens)))
    return compose(sections)


def run(args: Namespace) -> None:
    """`python -m eval attention`"""
    check_output(args.out)
    pictures = [open_image(path) for path in args.image]  # reject a bad picture before loading the weights
    pipeline = load(args.checkpoint or WEIGHTS, args.ip_adapter, args.image_encoder)
    picture = attention_sheet(pipeline, pictures, args.prompt, args.scale, args.guidance, args.seed, args.steps)
    settings = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()}
    save_image(picture, args.out, {"arguments": settings})
    print(args.out)
