"""Draws the prompts of a task and reads the pictures: what every measurement here is made of.

Three tasks, each over the same image prompts:

- `picture`: the image prompt alone;
- `agreeing`: with a caption of the same concept and background;
- `conflict`: with a text that names another concept and background. The picture should follow the text in these, and the
  image prompt in its palette.

In the mini world the truth of every prompt is known, so a judge reads the drawings (train/judge.py). Nothing is known about
a user's pictures: there a conflicting text is the caption of another picture, and CLIP alone reads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.clip_score import Scorer, cosine
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.image_encoder import centre_square
from model.vae import VAE
from sampling.embeddings import Strength
from sampling.images import open_image, to_images
from sampling.pipeline import Pipeline
from train.judge import Judge, delta_e, ground_truth
from train.vae import to_tensor
from train.world import BACKGROUND_NAMES, BACKGROUNDS, CONCEPT_NAMES, CONCEPTS, Scene, caption, pictures, random_scene

TASKS = ("picture", "agreeing", "conflict")
Row = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """What is known about n prompts of the mini world: the scenes of the image prompts, and the indices of the concepts and
    backgrounds that the conflicting texts name."""

    scenes: list[Scene]
    concept: Tensor
    background: Tensor

    @property
    def own(self) -> dict[str, Tensor]:
        """What a perfect judge would read from the image prompts (train/judge.py::ground_truth)."""
        return ground_truth(self.scenes)

    @property
    def drawing(self) -> list[int | None]:
        """Which drawing of its concept each image prompt shows; None where the concept has only one."""
        return [s.drawing if len(CONCEPTS[CONCEPT_NAMES[s.concept]]) > 1 else None for s in self.scenes]

    def pixels(self) -> Tensor:
        """The true conflict pictures, `n 3 64 64`: the text's concept and background in the palette of the image prompt."""
        rng = np.random.default_rng(0)
        asked = [random_scene(rng, int(c), int(b)) for c, b in zip(self.concept, self.background, strict=True)]
        right = [replace(scene, palette=own.palette) for scene, own in zip(asked, self.scenes, strict=True)]
        return to_tensor(pictures(right))


@dataclass(frozen=True)
class Prompts:
    """n image prompts; for each a caption of its own, `own`, and a conflicting one, `other`; in the mini world also the truth."""

    images: list[Image.Image]
    own: list[str]
    other: list[str]
    truth: Truth | None = None

    @classmethod
    def of_the_world(cls, n: int, seed: int = 3) -> Prompts:
        """Text i names cell i of concepts x backgrounds, in random order; its image prompt has neither. Repeats after 640."""
        rng, cells = np.random.default_rng((917, seed)), len(CONCEPTS) * len(BACKGROUNDS)
        order = np.concatenate([rng.permutation(cells) for _ in range(-(-n // cells))])[:n]
        concept, background = order // len(BACKGROUNDS), order % len(BACKGROUNDS)
        scenes = []
        for c, b in zip(concept, background, strict=True):
            another = int((c + rng.integers(1, len(CONCEPTS))) % len(CONCEPTS))
            scenes.append(random_scene(rng, another, int((b + rng.integers(1, len(BACKGROUNDS))) % len(BACKGROUNDS))))
        own = [caption(CONCEPT_NAMES[s.concept], None, BACKGROUND_NAMES[s.background]) for s in scenes]
        other = [caption(CONCEPT_NAMES[c], None, BACKGROUND_NAMES[b]) for c, b in zip(concept, background, strict=True)]
        truth = Truth(scenes, torch.from_numpy(concept), torch.from_numpy(background))
        return cls([Image.fromarray(picture) for picture in pictures(scenes)], own, other, truth)

    @classmethod
    def of_files(cls, files: Sequence[tuple[Path, str]], side: int) -> Prompts:
        """A user's pictures, each with the next caption that differs. Raises ValueError when all captions are the same."""
        own = [text for _, text in files]
        if len(set(own)) < 2:
            raise ValueError(
                "the held-out pictures need at least two different captions: give more pictures (51 or more)"
            )
        other = [next(text for text in own[i:] + own[:i] if text != mine) for i, mine in enumerate(own)]
        images = [centre_square(open_image(file), side, Image.Resampling.BILINEAR) for file, _ in files]
        return cls(images, own, other)

    @property
    def pixels(self) -> Tensor:
        """`n 3 h w` in [-1, 1]."""
        return to_tensor(np.stack([np.array(image) for image in self.images]))

    def first(self, n: int) -> Prompts:
        """The first n prompts."""
        truth = self.truth and Truth(self.truth.scenes[:n], self.truth.concept[:n], self.truth.background[:n])
        return Prompts(self.images[:n], self.own[:n], self.other[:n], truth)

    def texts(self, task: str) -> list[str]:
        """The text of each prompt of a task."""
        return {"picture": [""] * len(self.own), "agreeing": self.own, "conflict": self.other}[task]

    def to_json(self) -> dict[str, Any]:
        """The texts and, where it is known, the truth, for a results file."""
        seeds = list(range(len(self.own)))
        data: dict[str, Any] = {"prompts": {"agreeing": self.own, "conflict": self.other, "seeds": seeds}}
        if (truth := self.truth) is not None:
            own = truth.own
            data["truth"] = {
                "wanted": {"concept": truth.concept.tolist(), "background": truth.background.tolist()},
                "own": {key: own[key].tolist() for key in ("concept", "background")},
                "drawing": truth.drawing,
                "palette": [[round(x, 2) for x in pair] for pair in own["palette"].flatten(1).tolist()],
            }
        return data


@dataclass(frozen=True)
class Bench:
    """Draws and reads every picture of a measurement. The mini world has a judge; a user's pictures have none."""

    pipeline: Pipeline
    prompts: Prompts
    scorer: Scorer
    judge: Judge | None
    steps: int = 12
    guidance: float = 4.0

    def first(self, n: int) -> Bench:
        """The same with the first n prompts only."""
        return replace(self, prompts=self.prompts.first(n))

    def read(self, task: str, drawn: Tensor, **cell: Any) -> Row:
        """What the pictures show, one entry for each prompt: CLIP-I, and CLIP-T where the task has a text (cosines); where the
        truth is known also concept, background, palette error and placement error, by the judge."""
        row = {"task": task, **cell}
        if self.prompts.truth is not None:
            row |= self._judged(task, drawn, self.prompts.truth)
        shown = self.scorer.images(to_images(drawn))
        row["clip_i"] = _rounded(cosine(shown, self._pictured), 3)
        if task != "picture":
            row["clip_t"] = _rounded(cosine(shown, self.scorer.texts(self.prompts.texts(task))), 3)
        return row

    @functools.cached_property
    def _pictured(self) -> Tensor:
        return self.scorer.images(self.prompts.images)

    def _judged(self, task: str, drawn: Tensor, truth: Truth) -> Row:
        assert self.judge is not None
        seen, own = self.judge.read(drawn), truth.own
        row: Row = {
            "concept": seen.concept.argmax(dim=1).tolist(),
            "background": seen.background.argmax(dim=1).tolist(),
            "palette_error": _rounded(delta_e(seen.palette, own["palette"]), 1),
            "placement_error": _rounded((seen.placement - own["placement"]).norm(dim=-1), 1),
        }
        return row if task == "conflict" else row | {"drawing": nearest(truth.scenes, drawn)}

    def embedding(self, adapter: IPAdapter) -> Tensor:
        """What the adapter reads from each image prompt, `n 1 ...`."""
        return embed(replace(self.pipeline, adapters=(adapter,)), self.prompts.images)

    def null(self, adapter: IPAdapter) -> Tensor:
        """What the adapter reads when there is no picture, once for each prompt, `n 1 ...`."""
        like = self.embedding(adapter)
        return replace(self.pipeline, adapters=(adapter,)).null(adapter, like).expand_as(like)

    def draw(self, task: str, adapter: IPAdapter | None, fuse: Fuse, embedding: Tensor | None, lam: float) -> Tensor:
        """One picture for each prompt, `n 3 h w`, with seeds 0 .. n-1."""
        pipeline, name = replace(self.pipeline, adapters=(adapter,) if adapter else ()), f"{task}, lambda {lam:g}"
        return draw(pipeline, self.prompts.texts(task), embedding, lam, self.guidance, self.steps, name, fuse)

    def anchors(self) -> list[Row]:
        """Rows that bound every form: the text without a picture; the truth; and the truth through the VAE."""
        rows = [
            self.read(task, self.draw(task, None, decoupled, None, 0.0), form="text alone")
            for task in ("agreeing", "conflict")
        ]
        for task in TASKS if self.prompts.truth is not None else ():
            assert self.prompts.truth is not None
            true = self.prompts.truth.pixels() if task == "conflict" else self.prompts.pixels
            rows.append(self.read(task, true, form="truth"))
            rows.append(self.read(task, through_the_vae(self.pipeline.vae, true), form="truth, through the VAE"))
        return rows

    def cell(self, task: str, adapter: IPAdapter, fuse: Fuse, lambdas: Sequence[float], **where: Any) -> list[Row]:
        """A row for each lambda; `where` is copied into every row."""
        embedding = self.embedding(adapter)
        drawn = ((lam, self.draw(task, adapter, fuse, embedding, lam)) for lam in lambdas)
        return [self.read(task, x, **where, **{"lambda": lam}) for lam, x in drawn]

    def controls(self, adapter: IPAdapter, fuse: Fuse, **where: Any) -> list[Row]:
        """`conflict` at lambda 1 with the picture of another prompt, and with no picture.

        No picture is the adapter's null image. That is not lambda 0: in a joint softmax it still takes some attention.
        """
        others = {"shuffled": self.embedding(adapter).roll(1, dims=0), "null": self.null(adapter)}
        drawn = {name: self.draw("conflict", adapter, fuse, other, 1.0) for name, other in others.items()}
        return [self.read("conflict", x, **where, control=name) for name, x in drawn.items()]


def embed(pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
    """What the pipeline's adapter reads from pictures that are a prompt each, `n 1 ...`."""
    return torch.cat([pipeline.embed([image]) for image in images])


@torch.no_grad()
def through_the_vae(vae: VAE, pixels: Tensor) -> Tensor:
    """Encode and decode pictures `n 3 h w`."""
    device = next(vae.parameters()).device
    return torch.cat([vae.decode(vae.encode(part.to(device))).cpu() for part in pixels.split(32)])


def draw(
    pipeline: Pipeline,
    prompts: list[str],
    embedding: Tensor | None,
    scale: Strength,
    guidance: float,
    steps: int,
    name: str,
    fuse: Fuse = decoupled,
    batch: int = 32,
) -> Tensor:
    """One picture for each prompt, `n 3 h w`, with seeds 0 .. n-1, under bfloat16 autocast.

    `embedding`: what the adapter reads from the image prompts, `n 1 ...`, or None; `scale` is lambda; `name` labels the
    progress bar.
    """
    drawn, device = [], next(pipeline.unet.parameters()).device.type
    for rows in tqdm(torch.arange(len(prompts)).split(batch), desc=name, unit="batch"):
        texts, pictured = [prompts[i] for i in rows], None if embedding is None else embedding[rows]
        with torch.autocast(device, torch.bfloat16):
            x = pipeline.draw(texts, rows.tolist(), pictured, scale=scale, guidance=guidance, steps=steps, fuse=fuse)
        drawn.append(x.float().cpu())
    return torch.cat(drawn)


def all_drawings(scene: Scene) -> Tensor:
    """The scene with each drawing of its concept in turn, `n 3 64 64`."""
    codes = CONCEPTS[CONCEPT_NAMES[scene.concept]]
    return to_tensor(pictures([replace(scene, drawing=i) for i in range(len(codes))]))


def nearest(scenes: list[Scene], drawn: Tensor) -> list[int]:
    """Which drawing of its scene's concept each picture shows: the nearest in mean squared error of the pixels."""
    pairs = zip(scenes, drawn, strict=True)
    return [int((all_drawings(scene) - x).square().mean(dim=(1, 2, 3)).argmin()) for scene, x in pairs]


def _rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
