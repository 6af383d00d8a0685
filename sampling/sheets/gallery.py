"""Draw a labelled sheet for each way to control a drawing; its title names the options of `python -m sampling`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from PIL import Image, ImageOps
from tqdm import tqdm

from sampling.fields import Preset
from sampling.images import check_png, open_image, save_image
from sampling.inputs import read_inputs
from sampling.loading import load
from sampling.pipeline import Pipeline
from sampling.request import WEIGHTS, HintFile, ImagePrompt, Request, Rule
from sampling.sheets.demo import EXAMPLES, GUIDANCE, STEPS
from sampling.sheets.layout import sheet

Cells = tuple[list[list[str]], list[list[Image.Image]], list[str]]  # column titles in groups, rows of pictures, one note per row
HINTS = EXAMPLES / "hints"  # outlines of test pictures, written by `python -m eval examples`
PROMPTS = {  # image prompts, and texts that name something else
    "mouse": "a cupcake on a white background",
    "pig": "a turtle on a blue background",
    "owl": "a rocket on a pink background",
}


@dataclass(frozen=True)
class Artist:
    """Draws requests with the example pictures as image prompts. Writes masks to files in `folder`."""

    pipeline: Pipeline
    folder: Path
    seed: int = 0
    steps: int = STEPS

    def draw(self, *prompts: ImagePrompt, text: str = "", num: int = 1, **options: Any) -> list[Image.Image]:
        """Draw `num` pictures; picture i has seed + i."""
        options = {"guidance": GUIDANCE, "steps": self.steps, "seed": self.seed} | options
        return list(self.pipeline.series(read_inputs(Request(text, prompts, **options)), num))

    def mask(self, left: int, top: int, right: int, bottom: int) -> Path:
        """Write a 64 x 64 mask that is white inside a box; return its path."""
        path, mask = self.folder / f"mask-{left}-{top}-{right}-{bottom}.png", Image.new("L", (64, 64))
        mask.paste(255, (left, top, right, bottom))
        mask.save(path)
        return path


def example(name: str) -> Path:
    return EXAMPLES / f"{name}.png"


def hint(name: str) -> Path:
    return HINTS / f"{name}.png"


def prompt(*names: str, **options: Any) -> ImagePrompt:
    """Build an image prompt from example pictures."""
    return ImagePrompt(tuple(example(name) for name in names), **options)


def open_examples(*names: str) -> list[Image.Image]:
    return [open_image(example(name)) for name in names]


def shown_mask(path: Path) -> Image.Image:
    """Open a mask and add a thin frame, because the sheet is white too."""
    return ImageOps.expand(open_image(path), 1, "grey")


def image_to_image(artist: Artist) -> Cells:
    strengths = (0.3, 0.45, 0.6, 0.75, 0.9)
    rows = []
    for start, name in (("cake", "mushroom"), ("rabbit", "pig"), ("ball", "mouse")):
        drawings = [artist.draw(prompt(name), init_image=example(start), strength=share)[0] for share in strengths]
        rows.append([*open_examples(start, name), *drawings])
    return [["start", "image prompt"], [f"strength {strength:g}" for strength in strengths]], rows, [""] * 3


def inpainting(artist: Artist) -> Cells:
    top, bottom, right = artist.mask(0, 0, 64, 30), artist.mask(0, 32, 64, 64), artist.mask(30, 0, 64, 64)
    rows = []
    for start, mask, name in (("alien", top, "hat"), ("rabbit", right, "ball"), ("mouse", bottom, "alien")):
        drawings = artist.draw(prompt(name), num=4, init_image=example(start), mask=mask)
        rows.append([*open_examples(start), shown_mask(mask), *open_examples(name), *drawings])
    return [["picture", "mask", "image prompt"], ["four seeds", "", "", ""]], rows, [""] * 3


def several_pictures(artist: Artist) -> Cells:
    names, shares, rows = ("mouse", "owl"), (0.0, 0.25, 0.5, 0.75, 1.0), []
    for rule in get_args(Rule):
        prompts = [prompt(*names, weights=(1 - share, share), rule=rule) for share in shares]
        rows.append([*open_examples(*names), *(artist.draw(one)[0] for one in prompts)])
    weights = [f"{1 - share:g} and {share:g}" for share in shares]
    return [["one prompt of", "two pictures"], weights], rows, [f"--image-rule {rule}" for rule in get_args(Rule)]


def negative_image(artist: Artist) -> Cells:
    rows = []
    for name, negative in (("snail", "banana"), ("ball", "rabbit"), ("mouse", "owl")):
        drawings = [artist.draw(prompt(name, negatives=no), num=3) for no in ((), (example(negative),))]
        rows.append([*open_examples(name, negative), *drawings[0], *drawings[1]])
    return [["image prompt", "negative"], ["without it", "", ""], ["with it", "", ""]], rows, [""] * 3


def layers(artist: Artist) -> Cells:
    options: list[dict[str, Any]] = [{"scale": 0.0}, {}, *({"layers": name} for name in get_args(Preset))]
    rows = [
        [*open_examples(name), *(artist.draw(prompt(name, **each), text=text)[0] for each in options)]
        for name, text in PROMPTS.items()
    ]
    return [["image prompt"], ["text alone"], ["all layers", *get_args(Preset)]], rows, [*PROMPTS.values()]


def steps(artist: Artist) -> Cells:
    ranges = [(0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0)]
    rows = [
        [*open_examples(name), *(artist.draw(prompt(name, start=start, end=end), text=text)[0] for start, end in ranges)]
        for name, text in PROMPTS.items()
    ]
    return [["image prompt"], [f"{start:g} to {end:g}" for start, end in ranges]], rows, [*PROMPTS.values()]


def regions(artist: Artist) -> Cells:
    twice = replace(artist, pipeline=replace(artist.pipeline, adapters=artist.pipeline.adapters * 2))
    masks, rows = (artist.mask(0, 0, 32, 64), artist.mask(32, 0, 64, 64)), []
    for names in (("mouse", "pig"), ("owl", "alien"), ("snail", "mushroom")):
        halves = list(zip(names, masks, strict=True))
        drawings = twice.draw(*(prompt(name, mask=mask) for name, mask in halves), num=4)
        cells = [cell for name, mask in halves for cell in (*open_examples(name), shown_mask(mask))]
        rows.append([*cells, *drawings])
    return [["left", "its mask", "right", "its mask"], ["four seeds", "", "", ""]], rows, [""] * 3


def two_guidances(artist: Artist) -> Cells:
    weights, text, rows = (1.0, 2.0, 4.0, 8.0), "small on a yellow background, top left", []
    mushroom = prompt("mushroom")
    for w_t in weights:
        drawings = [artist.draw(mushroom, text=text, guidance=w_t, image_guidance=w_i)[0] for w_i in weights]
        rows.append([*open_examples("mushroom"), *drawings])
    notes = [f'--guidance {w_t:g}, "{text}"' for w_t in weights]
    return [["image prompt"], [f"picture {w_i:g}" for w_i in weights]], rows, notes


def structure(artist: Artist) -> Cells:
    controlled = replace(artist, pipeline=load(controls=[WEIGHTS / "controlnet.safetensors"]))
    names = sorted(path.stem for path in HINTS.glob("*.png"))[:6]
    rows = [[Image.new("RGB", (64, 64), "white"), *(open_image(hint(name)) for name in names)]]
    for name in names:
        drawings = [controlled.draw(prompt(name), hints=(HintFile(hint(lines)),))[0] for lines in names]
        rows.append([*open_examples(name), *drawings])
    return [["image prompt"], ["hint", *[""] * 5]], rows, [""] * 7


def samplers(artist: Artist) -> Cells:
    counts, rows, notes = [max(1, artist.steps * n // STEPS) for n in (5, 10, 20, 50)], [], []
    for name in ("alien", "banana"):
        for sampler in ("ddim", "dpm++"):
            drawings = [artist.draw(prompt(name), sampler=sampler, steps=n, guidance=7.5)[0] for n in counts]
            rows.append([*open_examples(name), *drawings])
            notes.append(f"--sampler {sampler} --guidance 7.5")
    return [["image prompt"], [f"{n} steps" for n in counts]], rows, notes


def fine_grained(artist: Artist) -> Cells:
    plus = replace(artist, pipeline=load(adapter=WEIGHTS / "ip_adapter_plus.safetensors"))
    rows = []
    for name in ("alien", "cake", "owl", "hat"):
        drawings = [each.draw(prompt(name), num=3) for each in (artist, plus)]
        rows.append([*open_examples(name), *drawings[0], *drawings[1]])
    return [["image prompt"], ["global: 4 tokens", "", ""], ["fine-grained: 16 tokens", "", ""]], rows, [""] * 4


SHEETS: dict[str, tuple[str, Callable[[Artist], Cells]]] = {  # file name -> (title, function that draws the cells)
    "image_to_image": ("From a picture: the stronger, the less of it stays (--init-image, --strength)", image_to_image),
    "inpainting": ("White is painted anew from the image prompt, black stays (--init-image, --mask)", inpainting),
    "several_pictures": (
        "One prompt of two pictures, weighted by three rules (--image, --image-weight, --image-rule)",
        several_pictures,
    ),
    "negative_image": ("Away from what both have in common, here the background (--negative-image)", negative_image),
    "layers": ("The same lambda in some layers only (--image-layers): here the finest carry the colours", layers),
    "steps": ("The image prompt in a share of the steps only (--image-start, --image-end)", steps),
    "regions": ("Two image prompts, each in its own half (--ip-adapter twice, --image-mask)", regions),
    "guidance": ("A weight for text (--guidance), one for the picture (--image-guidance)", two_guidances),
    "fine_grained": ("Plus reads the encoder's grid, not its one embedding (--ip-adapter)", fine_grained),
    "structure": ("Each image prompt with the lines of each hint (--control, --hint)", structure),
    "samplers": ("DDIM and DPM-Solver++ (--sampler, --steps)", samplers),
}


def write(seed: int, out: Path) -> str:
    """Draw all sheets into a folder; return a summary of what was written."""
    check_png(out / "sheet.png")
    pipeline, settings = load(), {"command": f"python -m sampling.sheets gallery --seed {seed}"}
    with TemporaryDirectory() as folder:
        artist = Artist(pipeline, Path(folder), seed)
        for name, (title, draw) in tqdm(SHEETS.items(), desc="drawing", unit="sheet", disable=None):
            columns, rows, notes = draw(artist)
            save_image(sheet(columns, rows, notes, title=title), out / f"{name}.png", settings)
    return f"{out}: {len(SHEETS)} sheets"
