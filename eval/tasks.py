"""What the ablation draws, and how it is read.

Three tasks, each over the same reference pictures:

- `picture`: the image prompt alone;   - `agreeing`: with a caption of the same concept and background;
- `conflict`: with the text of another concept and background: those should follow the text, the palette the picture.

Rows that anchor them: the true conflict pictures, the same through the VAE, the text alone, a shuffled image prompt, and no image
prompt but the adapter's null image, which in a joint softmax still takes its share of the attention.

Of a user's pictures no truth is known: there the conflicting text is another picture's caption, and CLIP alone reads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from eval import attributes, clip_score, world
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.image_encoder import centre_square
from sampling.images import open_image, to_images
from sampling.pipeline import Pipeline
from train.vae import to_tensor
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, CONCEPTS, Scene, caption, pictures, random_scene

TASKS = ("picture", "agreeing", "conflict")
Row = dict[str, Any]


def oracle(test: world.Task) -> Tensor:
    """The true conflict pictures: the text's concept and background in the reference's palette."""
    rng = np.random.default_rng(0)
    scenes = [
        replace(random_scene(rng, int(c), int(b)), palette=reference.palette)
        for c, b, reference in zip(test.concept, test.background, test.references, strict=True)
    ]
    return to_tensor(pictures(scenes))


def drawings(scene: Scene) -> Tensor:
    """The scene with each of its concept's drawings in turn, `n 3 64 64`."""
    codes = CONCEPTS[CONCEPT_NAMES[scene.concept]]
    return to_tensor(pictures([replace(scene, drawing=i) for i in range(len(codes))]))


def drawing_of(scene: Scene) -> int | None:
    """Which of its concept's drawings a scene shows, or None where there is but one."""
    return scene.drawing if len(CONCEPTS[CONCEPT_NAMES[scene.concept]]) > 1 else None


@dataclass(frozen=True)
class Prompts:
    """n image prompts; for each the caption of itself and one that conflicts; in the mini world also the truth."""

    images: list[Image.Image]
    own: list[str]
    other: list[str]
    truth: world.Task | None = None

    @classmethod
    def of_the_world(cls, n: int, seed: int = 3) -> Prompts:
        test = world.task(n, seed)
        own = [caption(CONCEPT_NAMES[s.concept], None, BACKGROUND_NAMES[s.background]) for s in test.references]
        return cls(to_images(test.pixels), own, test.captions(), test)

    @classmethod
    def of_files(cls, files: Sequence[tuple[Path, str]], side: int) -> Prompts:
        """A user's pictures, each against the next caption that is another. Raises ValueError when there is none."""
        own = [text for _, text in files]
        if len(set(own)) < 2:
            raise ValueError(
                "two held-out pictures with different captions at least are needed, and every 50th is held out: give 51 or more"
            )
        other = [next(text for text in own[i:] + own[:i] if text != mine) for i, mine in enumerate(own)]
        images = [centre_square(open_image(file), side, Image.Resampling.BILINEAR) for file, _ in files]
        return cls(images, own, other)

    @property
    def pixels(self) -> Tensor:
        """`n 3 h w` in [-1, 1]."""
        return to_tensor(np.stack([np.array(image) for image in self.images]))

    def first(self, n: int) -> Prompts:
        t = self.truth
        truth = t and world.Task(t.references[:n], t.pixels[:n], t.concept[:n], t.background[:n])
        return Prompts(self.images[:n], self.own[:n], self.other[:n], truth)

    def texts(self, task: str) -> list[str]:
        """The text of each prompt of a task."""
        return {"picture": [""] * len(self.own), "agreeing": self.own, "conflict": self.other}[task]


@dataclass(frozen=True)
class Bench:
    """What draws and reads every picture of a study: the prompts, a CLIP, and in the mini world the judge."""

    pipeline: Pipeline
    prompts: Prompts
    scorer: clip_score.Scorer
    judge: attributes.Judge | None
    steps: int = 12
    guidance: float = 4.0

    def first(self, n: int) -> Bench:
        """The same with the first n prompts alone."""
        return replace(self, prompts=self.prompts.first(n))

    def read(self, task: str, drawn: Tensor, **cell: Any) -> Row:
        """What pictures show, one entry a prompt: CLIP-I, and CLIP-T where there is a text (cosines); where the truth is known
        also concept, background, palette and placement error by the judge."""
        images, texts = to_images(drawn), self.prompts.texts(task)
        row = {"task": task, **cell}
        if self.prompts.truth is not None:
            row |= self._judged(task, drawn, self.prompts.truth.references)
        shown = self.scorer.images(images)
        row["clip_i"] = rounded(clip_score.cosine(shown, self._pictured), 3)
        if task != "picture":
            row["clip_t"] = rounded(clip_score.cosine(shown, self.scorer.texts(texts)), 3)
        return row

    @functools.cached_property
    def _pictured(self) -> Tensor:
        return self.scorer.images(self.prompts.images)

    def _judged(self, task: str, drawn: Tensor, references: list[Scene]) -> Row:
        assert self.judge is not None
        seen, own = attributes.read(self.judge, drawn), attributes.truth(references)
        row: Row = {
            "concept": seen.concept.argmax(dim=1).tolist(),
            "background": seen.background.argmax(dim=1).tolist(),
            "palette_error": rounded(attributes.delta_e(seen.palette, own["palette"]), 1),
            "placement_error": rounded((seen.placement - own["placement"]).norm(dim=-1), 1),
        }
        return row if task == "conflict" else row | {"drawing": nearest(references, drawn)}

    def embedding(self, adapter: IPAdapter) -> Tensor:
        """What the adapter reads of the image prompts, `n 1 ...`."""
        return world.embedding(replace(self.pipeline, adapters=(adapter,)), self.prompts.images)

    def draw(self, task: str, adapter: IPAdapter | None, fuse: Fuse, embedding: Tensor | None, lam: float) -> Tensor:
        """One picture a prompt, seeds 0 .. n-1, in bfloat16."""
        pipeline, name = replace(self.pipeline, adapters=(adapter,) if adapter else ()), f"{task}, lambda {lam:g}"
        return world.draw(pipeline, self.prompts.texts(task), embedding, lam, self.guidance, self.steps, name, fuse)

    def anchors(self) -> list[Row]:
        """Rows between which every form lies: the text without a picture; where it is known the truth, and that through the VAE,
        which on the other two tasks is the image prompt itself."""
        rows = [
            self.read(task, self.draw(task, None, decoupled, None, 0.0), form="text alone")
            for task in ("agreeing", "conflict")
        ]
        for task in TASKS if self.prompts.truth is not None else ():
            true = oracle(self.prompts.truth) if task == "conflict" else self.prompts.pixels
            rows += [
                self.read(task, true, form="truth"),
                self.read(task, world.through_the_vae(self.pipeline.vae, true), form="truth, through the VAE"),
            ]
        return rows

    def cell(self, task: str, adapter: IPAdapter, fuse: Fuse, lambdas: Sequence[float], **where: Any) -> list[Row]:
        """One row a lambda."""
        embedding = self.embedding(adapter)
        drawn = ((lam, self.draw(task, adapter, fuse, embedding, lam)) for lam in lambdas)
        return [self.read(task, x, **where, **{"lambda": lam}) for lam, x in drawn]

    def controls(self, adapter: IPAdapter, fuse: Fuse, **where: Any) -> list[Row]:
        """`conflict` at lambda 1 with another prompt's picture, and with none, which is not the same as lambda 0."""
        own = self.embedding(adapter)
        none = replace(self.pipeline, adapters=(adapter,)).null(adapter, own).expand_as(own)
        return [
            self.read("conflict", self.draw("conflict", adapter, fuse, other, 1.0), **where, control=name)
            for name, other in (("shuffled", own.roll(1, dims=0)), ("null", none))
        ]


def nearest(references: list[Scene], drawn: Tensor) -> list[int]:
    """Which of its concept's drawings each picture shows: the nearest in pixels, all of them rendered as the reference is."""
    pairs = zip(references, drawn, strict=True)
    return [int((drawings(scene) - x).square().mean(dim=(1, 2, 3)).argmin()) for scene, x in pairs]


def rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
