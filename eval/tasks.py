"""What the ablation draws, and how it is read.

Three tasks, each over the same reference pictures:

- `picture`: the image prompt alone;   - `agreeing`: with a caption of the same concept and background;
- `conflict`: with the text of another concept and background: those should follow the text, the palette the picture.

Rows that anchor them: the true conflict pictures, the same through the VAE, the text alone, a shuffled image prompt, and no image
prompt but the adapter's null image, which in a joint softmax still takes its share of the attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import attributes, clip_score, world
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from sampling.images import to_images
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


@dataclass(frozen=True)
class Bench:
    """What draws and reads every picture of a study: the prompts, the judge and the second CLIP."""

    pipeline: Pipeline
    test: world.Task
    judge: attributes.Judge
    scorer: clip_score.Scorer
    steps: int = 12
    guidance: float = 4.0

    @classmethod
    def of(cls, weights: Path, pipeline: Pipeline, prompts: int, steps: int, guidance: float) -> Bench:
        judge, scorer = attributes.load(weights / "judge.safetensors"), clip_score.load(weights)
        return cls(pipeline, world.task(prompts, seed=3), judge, scorer, steps, guidance)

    def first(self, n: int) -> Bench:
        """The same with the first n prompts alone."""
        t = self.test
        return replace(self, test=world.Task(t.references[:n], t.pixels[:n], t.concept[:n], t.background[:n]))

    def texts(self, task: str) -> list[str]:
        """The text of each prompt of a task."""
        if task == "conflict":
            return self.test.captions()
        scenes = self.test.references
        own = [caption(CONCEPT_NAMES[s.concept], None, BACKGROUND_NAMES[s.background]) for s in scenes]
        return own if task == "agreeing" else [""] * len(own)

    def read(self, task: str, drawn: Tensor, **cell: Any) -> Row:
        """What pictures show, one entry a prompt: concept, background, palette and placement error by the judge; CLIP-I, CLIP-T."""
        seen, own = attributes.read(self.judge, drawn), attributes.truth(self.test.references)
        images, texts = to_images(drawn), self.texts(task)
        row = {
            "task": task,
            **cell,
            "concept": seen.concept.argmax(dim=1).tolist(),
            "background": seen.background.argmax(dim=1).tolist(),
            "palette_error": rounded(attributes.delta_e(seen.palette, own["palette"]), 1),
            "placement_error": rounded((seen.placement - own["placement"]).norm(dim=-1), 1),
            "clip_i": rounded(self.scorer.clip_i(images, to_images(self.test.pixels)), 3),
        }
        if task != "conflict":
            row["drawing"] = self.nearest(drawn)
        return row if task == "picture" else row | {"clip_t": rounded(self.scorer.clip_t(images, texts), 3)}

    def embedding(self, adapter: IPAdapter) -> Tensor:
        """What the adapter reads of the reference pictures, `n 1 ...`."""
        return world.embedding(replace(self.pipeline, adapters=(adapter,)), self.test.pixels)

    @functools.cached_property
    def _drawings(self) -> list[Tensor]:
        return [drawings(scene) for scene in self.test.references]

    def nearest(self, drawn: Tensor) -> list[int]:
        """Which of its concept's drawings each picture shows: the nearest in pixels, all of them rendered as the reference is."""
        return [
            int((each - x).square().mean(dim=(1, 2, 3)).argmin()) for each, x in zip(self._drawings, drawn, strict=True)
        ]

    def draw(self, task: str, adapter: IPAdapter | None, fuse: Fuse, embedding: Tensor | None, lam: float) -> Tensor:
        """One picture a prompt, seeds 0 .. n-1, in bfloat16."""
        pipeline, name = replace(self.pipeline, adapters=(adapter,) if adapter else ()), f"{task}, lambda {lam:g}"
        return world.draw(pipeline, self.texts(task), embedding, lam, self.guidance, self.steps, name, fuse)

    def anchors(self) -> list[Row]:
        """Rows between which every form lies: the truth, the truth through the VAE, and the text without a picture."""
        true = oracle(self.test)
        with torch.no_grad():
            through = torch.cat([self.pipeline.vae.decode(self.pipeline.vae.encode(part)) for part in true.split(64)])
        rows = [
            self.read("conflict", true, form="truth"),
            self.read("conflict", through, form="truth, through the VAE"),
        ]
        for task in ("agreeing", "conflict"):
            rows.append(self.read(task, self.draw(task, None, decoupled, None, 0.0), form="text alone"))
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


def rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
