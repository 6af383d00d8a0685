"""The mini world: OpenMoji drawings in two colours on a plain background, with captions and ground truth.

A picture shows a **concept** (one of 64, some with two drawings) in a **palette** (two CIELAB colours) on a **background** (one of
ten), at a **size** and **place**. Most captions name the concept and the background, half of them the coarse name of the first colour,
and some the size or the place. Only an image prompt can convey the exact palette.

`world[i]` depends only on the split and i, so nothing is stored and a run can resume at any step. Training never uses the splits `val`
and `test`, palettes with a hue in `HELD_OUT_HUES`, or the held-out background of each concept (`held_out_pair`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from train.colour import FINE_NAMES, Array, coarse_name, fine_bin, fine_name, lab_to_srgb, lch, srgb_to_lab, to_bytes
from train.drawings import fill_colours, layers

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

SIZES = ("small", "medium", "large")
SIDES = 40, 62  # smallest and largest side of a drawing in pixels
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

# number of classes: concept, background, first colour, second colour, size, place
SLOTS = (len(CONCEPTS), len(BACKGROUNDS), len(FINE_NAMES), len(FINE_NAMES), len(SIZES), len(PLACES))
HELD_OUT_HUES = (196.0, 220.0)


@dataclass(frozen=True)
class Says:
    """The shares of captions that name the concept, the background, the size and the place."""

    concept: float = 0.9
    background: float = 0.9
    size: float = 0.5
    place: float = 0.5


SAYS = Says()

_SPLITS = {"train": 0, "val": 1, "test": 2}


def held_out_pair(concept: int, background: int) -> bool:
    """Return whether training never shows this concept on this background. Each concept has one such background."""
    return background == (7 * concept + 3) % len(BACKGROUNDS)


def held_out_hue(hue: float) -> bool:
    return HELD_OUT_HUES[0] <= hue < HELD_OUT_HUES[1]


def size_class(side: float) -> int:
    """Return the index in `SIZES` of a drawing with this side in pixels. The three classes have equal widths."""
    return min(max(int(3 * (side - SIDES[0]) / (SIDES[1] + 1 - SIDES[0])), 0), 2)


def place_class(x: float, y: float, side: float) -> int:
    """Return the index in `PLACES` of a drawing with its top left corner at (x, y): its cell in a 3 x 3 grid over all positions."""
    across, down = (min(max(int(3 * at / (SIZE - side + 1)), 0), 2) for at in (x, y))
    return 3 * down + across


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
    says_size: bool
    says_place: bool

    @property
    def caption(self) -> str:
        """The caption that the UNet reads: "a purple fox on a pink background"."""
        concept = CONCEPT_NAMES[self.concept] if self.says_concept else None
        colour = coarse_name(self.palette[0]) if self.says_colour else None
        background = BACKGROUND_NAMES[self.background] if self.says_background else None
        size, place = SIZES[self.size_class], PLACES[self.place_class]
        return caption(concept, colour, background, size if self.says_size else None, place if self.says_place else None)

    @property
    def size_class(self) -> int:
        return size_class(self.size)

    @property
    def place_class(self) -> int:
        return place_class(self.x, self.y, self.size)

    @property
    def slots(self) -> tuple[int, ...]:
        """The content of the rich caption: one class index for each entry of `SLOTS`."""
        first, second = map(fine_bin, self.palette)
        return (self.concept, self.background, first, second, self.size_class, self.place_class)

    @property
    def rich_caption(self) -> str:
        """The caption that only CLIP reads. It names every attribute, with the fine names of both colours."""
        first, second = (fine_name(colour) for colour in self.palette)
        name = f"{CONCEPT_NAMES[self.concept]} in {first} and {second}"
        background, size, place = BACKGROUND_NAMES[self.background], SIZES[self.size_class], PLACES[self.place_class]
        return caption(name, None, background, size, place)


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(
    concept: str | None,
    colour: str | None = None,
    background: str | None = None,
    size: str | None = None,
    place: str | None = None,
) -> str:
    """Write a caption for the UNet: "a small purple fox on a pink background, top left", "on a pink background, top left", "small"."""
    subject = article(" ".join(word for word in (size, colour, concept) if word)) if concept else size
    scene = " ".join(part for part in (subject, f"on {article(background)} background" if background else None) if part)
    return ", ".join(part for part in (scene, place) if part)


def render(scene: Scene, code: str | None = None) -> NDArray[np.uint8]:
    """Render a scene, `64 64 3`, optionally with another OpenMoji drawing, `code`.

    Colour channels differ by at most 4 of 255 from those of a rendering of the recoloured SVG.
    """
    code = code or CONCEPTS[CONCEPT_NAMES[scene.concept]][scene.drawing]
    fills, outlines, transparency = layers(code, scene.size)
    colours = fill_colours(code, scene.palette)[:, None, None] / 255
    layer = (fills * colours).sum(axis=0) + outlines + transparency * scene.background_rgb
    canvas = np.broadcast_to(scene.background_rgb, (SIZE, SIZE, 3)).copy()
    return to_bytes(paste(scene, layer, canvas))


def move_randomly(scene: Scene) -> Scene:
    """Return the scene with its drawing at another random size and place, which depend only on the scene."""
    rng = np.random.default_rng(scene.palette.view(np.uint64).ravel())
    size = int(rng.integers(SIDES[0], SIDES[1] + 1))
    x, y = rng.integers(SIZE - size + 1, size=2).tolist()
    return replace(scene, size=size, x=x, y=y)


def elsewhere(scene: Scene) -> NDArray[np.uint8]:
    """Render the scene after `move_randomly`, `64 64 3`."""
    return render(move_randomly(scene))


Style = Callable[[Scene], NDArray[np.uint8]]  # renders a scene, `64 64 3`


def paste(scene: Scene, layer: Array, canvas: Array) -> Array:
    """Put a drawing, `s s c`, in its place on a canvas, `64 64 c`, mirrored if the scene is. Changes and returns the canvas."""
    canvas[scene.y : scene.y + scene.size, scene.x : scene.x + scene.size] = layer[:, ::-1] if scene.mirror else layer
    return canvas


def random_palette(rng: np.random.Generator) -> Array:
    """Draw two colours with hues at least 50 degrees apart and outside `HELD_OUT_HUES`."""

    def colour(hue: float) -> Array:
        return lch(rng.uniform(50, 80), rng.uniform(40, 70), hue)

    while True:
        hues = rng.uniform(0, 360, 2)
        gap = abs((hues[0] - hues[1] + 180) % 360 - 180)
        if gap >= 50 and not any(map(held_out_hue, hues)):
            return np.stack([colour(hue) for hue in hues])


def random_scene(rng: np.random.Generator, concept: int, background: int, says: Says = SAYS) -> Scene:
    """Draw a random scene with this concept and background."""
    size = int(rng.integers(SIDES[0], SIDES[1] + 1))
    jitter = lab_to_srgb(srgb_to_lab(np.array(BACKGROUNDS[BACKGROUND_NAMES[background]]) / 255) + rng.normal(0, 2, 3))
    return Scene(
        concept=concept,
        drawing=int(rng.integers(len(CONCEPTS[CONCEPT_NAMES[concept]]))),
        background=background,
        background_rgb=jitter.clip(0, 1),
        palette=random_palette(rng),
        size=size,
        x=int(rng.integers(SIZE - size + 1)),
        y=int(rng.integers(SIZE - size + 1)),
        mirror=bool(rng.random() < 0.5),
        says_concept=bool(rng.random() < says.concept),
        says_colour=bool(rng.random() < 0.5),
        says_background=bool(rng.random() < says.background),
        says_size=bool(rng.random() < says.size),
        says_place=bool(rng.random() < says.place) and size_class(size) < 2,  # a large drawing fills the picture
    )


class World:
    """An endless list of scenes. `world[i]` is the same on every machine.

    No split has a palette with a hue in `HELD_OUT_HUES`. Only `test` has held-out pairs. `says` changes the captions only.
    """

    def __init__(self, split: Split = "train", says: Says = SAYS) -> None:
        self.split, self.says = split, says

    def __getitem__(self, index: int) -> Scene:
        rng = np.random.default_rng((20230813, _SPLITS[self.split], index))
        while True:
            concept, background = int(rng.integers(len(CONCEPTS))), int(rng.integers(len(BACKGROUNDS)))
            if self.split == "test" or not held_out_pair(concept, background):
                return random_scene(rng, concept, background, says=self.says)


def pictures(scenes: list[Scene], style: Style = render) -> NDArray[np.uint8]:
    """Render scenes in a style, `b 64 64 3`."""
    return np.stack([style(scene) for scene in scenes])
