"""Draw the prompts of a task and score the drawings. All measurements use this module.

In the mini world, a judge network compares the drawings with the ground truth (train/judge.py). A user's pictures have no ground truth,
so only CLIP scores them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.clip_score import Scorer, cosine
from eval.device import batch_size, device_of, precision
from eval.prompts import TASKS, Prompts, Truth
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.vae import VAE
from sampling.control import Hint
from sampling.embeddings import Strength
from sampling.images import to_images
from sampling.pipeline import Pipeline
from train.judge import Judge, delta_e
from train.vae import bytes_to_tensor
from train.world import CONCEPT_NAMES, CONCEPTS, Scene, pictures

Row = dict[str, Any]  # one entry of a results file


@dataclass(frozen=True)
class Bench:
    """Draws and scores all pictures of a measurement. `judge` is None for a user's pictures."""

    pipeline: Pipeline
    prompts: Prompts
    scorer: Scorer
    judge: Judge | None
    steps: int = 12
    guidance: float = 4.0

    def first(self, n: int) -> Bench:
        """Return the same bench with only the first n prompts."""
        return replace(self, prompts=self.prompts.first(n))

    def read(self, task: str, drawn: Tensor, **cell: Any) -> Row:
        """Score the pictures, one entry per prompt. `cell` is copied into the row.

        The scores are CLIP-I, and CLIP-T if the task has a text (cosines). In the mini world, they include the judge's concept,
        background, palette error and placement error.
        """
        row = {"task": task, **cell}
        if self.prompts.truth is not None:
            row |= self._judge(task, drawn, self.prompts.truth)
        shown = self.scorer.images(to_images(drawn))
        row["clip_i"] = _round(cosine(shown, self._prompt_embeddings), 3)
        if task != "picture":
            row["clip_t"] = _round(cosine(shown, self.scorer.texts(self.prompts.texts(task))), 3)
        return row

    @functools.cached_property
    def _prompt_embeddings(self) -> Tensor:
        return self.scorer.images(self.prompts.images)

    def _judge(self, task: str, drawn: Tensor, truth: Truth) -> Row:
        assert self.judge is not None
        reading, shown = self.judge.read(drawn), truth.shown
        row: Row = {
            "concept": reading.concept.argmax(dim=1).tolist(),
            "background": reading.background.argmax(dim=1).tolist(),
            "palette_error": _round(delta_e(reading.palette, shown["palette"]), 1),
            "placement_error": _round((reading.placement - shown["placement"]).norm(dim=-1), 1),
        }
        return row if task == "conflict" else row | {"drawing": nearest(truth.scenes, drawn)}

    def embedding(self, adapter: IPAdapter) -> Tensor:
        """Encode the image prompts for the adapter, `n 1 m e`."""
        return embed(replace(self.pipeline, adapters=(adapter,)), self.prompts.images)

    def null(self, adapter: IPAdapter) -> Tensor:
        """Return the adapter's null image, repeated for each prompt, `n 1 m e`."""
        like = self.embedding(adapter)
        return replace(self.pipeline, adapters=(adapter,)).null(adapter, like).expand_as(like)

    def draw(self, task: str, adapter: IPAdapter | None, fuse: Fuse, embedding: Tensor | None, lam: float) -> Tensor:
        """Draw one picture per prompt, `n 3 h w`, with seeds 0 .. n-1."""
        pipeline, name = replace(self.pipeline, adapters=(adapter,) if adapter else ()), f"{task}, lambda {lam:g}"
        return draw_prompts(pipeline, self.prompts.texts(task), embedding, lam, self.guidance, self.steps, name, fuse)

    def anchors(self) -> list[Row]:
        """Score the reference rows: the text alone, the true pictures, and the true pictures through the VAE."""
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
        """Draw a task at each lambda; return a row per lambda. `where` is copied into every row."""
        embedding = self.embedding(adapter)
        drawn = ((lam, self.draw(task, adapter, fuse, embedding, lam)) for lam in lambdas)
        return [self.read(task, x, **where, **{"lambda": lam}) for lam, x in drawn]

    def controls(self, adapter: IPAdapter, fuse: Fuse, **where: Any) -> list[Row]:
        """Draw `conflict` at lambda 1 with another prompt's picture, and with no picture (the adapter's null image).

        The null image differs from lambda 0: in a joint softmax it still receives attention.
        """
        others = {"shuffled": self.embedding(adapter).roll(1, dims=0), "null": self.null(adapter)}
        drawn = {name: self.draw("conflict", adapter, fuse, other, 1.0) for name, other in others.items()}
        return [self.read("conflict", x, **where, control=name) for name, x in drawn.items()]


def embed(pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
    """Encode pictures for the pipeline's adapter, `n 1 m e`, on its device. Each picture is a separate image prompt."""
    batch = batch_size(device_of(pipeline.unet))
    parts = [pipeline.embed(images[first : first + batch]) for first in range(0, len(images), batch)]
    return torch.cat([part.transpose(0, 1) for part in parts])


@torch.no_grad()
def through_the_vae(vae: VAE, pixels: Tensor) -> Tensor:
    """Encode and decode pictures, `n 3 h w`, on the VAE's device. The result is on the CPU."""
    device = device_of(vae)
    return torch.cat([vae.decode(vae.encode(part.to(device))).cpu() for part in pixels.split(batch_size(device))])


def draw_prompts(
    pipeline: Pipeline,
    prompts: list[str],
    embedding: Tensor | None,
    scale: Strength,
    guidance: float,
    steps: int,
    name: str,
    fuse: Fuse = decoupled,
    hints: Tensor | None = None,
    control_scale: float = 1.0,
) -> Tensor:
    """Draw one picture per prompt, `n 3 h w`, with seeds 0 .. n-1, in bfloat16 if the device supports it. The result is on the CPU.

    `embedding`: the encoded image prompts, `n 1 m e`, or None. `scale`: lambda. `name`: the label of the progress bar. `hints`: what
    each of the pipeline's controls reads, `n c h w` in [0, 1], weighted by `control_scale`.
    """
    drawn, device = [], device_of(pipeline.unet)
    for rows in tqdm(torch.arange(len(prompts)).split(batch_size(device)), desc=name, unit="batch"):
        texts, pictured = [prompts[i] for i in rows], None if embedding is None else embedding[rows]
        steered = [] if hints is None else [Hint(hints[rows], control_scale)] * len(pipeline.controls)
        with precision(device):
            x = pipeline.sample(
                texts, rows.tolist(), pictured, scale=scale, guidance=guidance, steps=steps, fuse=fuse, hints=steered
            )
        drawn.append(x.float().cpu())
    return torch.cat(drawn)


def all_drawings(scene: Scene) -> Tensor:
    """Render a scene once with each drawing of its concept, `n 3 64 64`."""
    codes = CONCEPTS[CONCEPT_NAMES[scene.concept]]
    return bytes_to_tensor(pictures([replace(scene, drawing=i) for i in range(len(codes))]))


def nearest(scenes: list[Scene], drawn: Tensor) -> list[int]:
    """Return, for each picture, the index of the drawing of its concept with the smallest mean squared pixel error."""
    pairs = zip(scenes, drawn, strict=True)
    return [int((all_drawings(scene) - x).square().mean(dim=(1, 2, 3)).argmin()) for scene, x in pairs]


def _round(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
