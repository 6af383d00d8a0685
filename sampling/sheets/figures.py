"""Draw the paper's figures from the mini world; the file of a figure has its number in the paper.

They need the ControlNet, the T2I-Adapter and the comic base of the mini world: `python -m train control`, `t2i` and `style`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from sampling.images import check_png, open_image, save_image
from sampling.loading import load
from sampling.request import WEIGHTS, HintFile
from sampling.sheets.gallery import (
    Artist,
    Cells,
    example,
    fine_grained,
    hint,
    image_to_image,
    inpainting,
    open_examples,
    prompt,
    shown_mask,
)
from sampling.sheets.layout import sheet

CONTROLNET, T2I, COMIC = (WEIGHTS / f"{name}.safetensors" for name in ("controlnet", "t2i", "comic"))


@dataclass(frozen=True)
class Studio:
    """Artists who share a seed: with the base model alone, with a control, and with the comic base."""

    base: Artist
    controlnet: Artist
    t2i: Artist
    comic: Artist

    @classmethod
    def of(cls, folder: Path, seed: int) -> Studio:
        """Load all models."""
        base, steerable = load(), load(controls=[CONTROLNET, T2I])
        alone = [replace(steerable, controls=(control,)) for control in steerable.controls]
        models = [base, *alone, load(loras=[(COMIC, 1.0)])]
        return cls(*(Artist(model, folder, seed) for model in models))


def figure_1(studio: Studio) -> Cells:
    """Variations, a text, structure, inpainting, and another base."""
    text, rows = "on a pink background", []
    for name, lines, start in (("owl", "snail", "alien"), ("mouse", "hat", "rabbit"), ("cake", "mushroom", "mouse")):
        mask = studio.base.mask(0, 32, 64, 64)
        rows.append(
            [
                *open_examples(name),
                *studio.base.draw(prompt(name), num=2),
                *studio.base.draw(prompt(name), text=text),
                open_image(hint(lines)),
                *studio.controlnet.draw(prompt(name), hints=(HintFile(hint(lines)),)),
                *open_examples(start),
                shown_mask(mask),
                *studio.base.draw(prompt(name), init_image=example(start), mask=mask),
                *studio.comic.draw(prompt(name), num=2),
            ]
        )
    groups = [["image prompt"], ["variations", ""], ['"on pink"'], ["structure", ""], ["inpainting", "", ""], ["comic base", ""]]
    return groups, rows, [""] * len(rows)


def figure_4(studio: Studio) -> Cells:
    """Draw with one adapter and two base models."""
    rows = [
        [*open_examples(name), *studio.base.draw(prompt(name), num=3), *studio.comic.draw(prompt(name), num=3)]
        for name in ("pig", "snail", "train", "mushroom")
    ]
    return [["image prompt"], ["original base", "", ""], ["comic base", "", ""]], rows, [""] * len(rows)


def figure_5(studio: Studio) -> Cells:
    """Image prompt and structural condition; the last row has a T2I-Adapter. At the right, what the control draws alone."""
    rows, notes = [], []
    for artist, name, lines in (
        (studio.controlnet, "owl", "train"),
        (studio.controlnet, "hat", "rabbit"),
        (studio.t2i, "ball", "pig"),
    ):
        control = (HintFile(hint(lines)),)
        both = artist.draw(prompt(name), num=4, hints=control)
        rows.append([*open_examples(name), open_image(hint(lines)), *both, *artist.draw(num=2, hints=control)])
        notes.append("ControlNet" if artist is studio.controlnet else "T2I-Adapter")
    groups = [["image prompt", "condition"], ["samples", "", "", ""], ["control alone", ""]]
    return groups, rows, notes


def figure_8(studio: Studio) -> Cells:
    """Multimodal prompts: the image prompt is the subject, the text its scene."""
    texts = {
        "on pink": "on a pink background",
        "on white": "on a white background",
        "small, top left": "small, top left",
        "large, on blue": "large on a blue background",
    }
    rows = [
        [*open_examples(name), *(picture for text in texts.values() for picture in studio.base.draw(prompt(name), text=text))]
        for name in ("owl", "mouse", "snail", "hat")
    ]
    return [["image prompt"], [*texts]], rows, [""] * len(rows)


FIGURES: dict[str, tuple[str, Callable[[Studio], Cells]]] = {  # file name -> (title, function that draws the cells)
    "figure_1": ("Figure 1: image prompts with one adapter and two base models", figure_1),
    "figure_4": ("Figure 4: the same adapter on another base model", figure_4),
    "figure_5": ("Figure 5: an image prompt with a structural condition", figure_5),
    "figure_7_image_to_image": ("Figure 7: image to image", lambda studio: image_to_image(studio.base)),
    "figure_7_inpainting": ("Figure 7: inpainting", lambda studio: inpainting(studio.base)),
    "figure_8": ("Figure 8: multimodal prompts", figure_8),
    "figure_11": ("Figure 11: global and fine-grained features", lambda studio: fine_grained(studio.base)),
}


def write(seed: int, out: Path) -> str:
    """Draw all figures into a folder; return a summary of what was written.

    Raises FileNotFoundError if a network is missing; the message names the command that trains it.
    """
    for file, stage in ((CONTROLNET, "control"), (T2I, "t2i"), (COMIC, "style")):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: run `python -m train {stage}` first")
    check_png(out / "figure.png")
    settings = {"command": f"python -m sampling.sheets figures --seed {seed}"}
    with TemporaryDirectory() as folder:
        studio = Studio.of(Path(folder), seed)
        for name, (title, draw) in tqdm(FIGURES.items(), desc="drawing", unit="figure", disable=None):
            columns, rows, notes = draw(studio)
            save_image(sheet(columns, rows, notes, title=title), out / f"{name}.png", settings)
    return f"{out}: {len(FIGURES)} sheets"
