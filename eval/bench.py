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
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.clip_score import Scorer
from eval.device import batch_size, device_of, precision
from eval.prompts import Prompts
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.vae import VAE
from sampling.control import Hint
from sampling.embeddings import AdapterLambda
from sampling.images import to_images
from sampling.pipeline import Pipeline
from train.judge import Judge

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

    def read(self, task: str, drawings: Tensor) -> dict[str, Tensor]:
        """Read drawings, one row each.

        `clip_i`: the cosine with the image prompt. `clip_t`: that with the text, or with the caption where there is no text, as in the
        paper's Table 1. In the mini world also what the judge sees: `concept` and `background`, indices; `palette`, `n 2 3`;
        `placement`, `n 3`.
        """
        readings: dict[str, Tensor] = {}
        if self.judge is not None:
            reading = self.judge.read(drawings)
            readings = {"concept": reading.concept.argmax(dim=1), "background": reading.background.argmax(dim=1)}
            readings |= {"palette": reading.palette, "placement": reading.placement}
        embeddings, texts = self.scorer.images(to_images(drawings)), self.prompts.texts("agreeing" if task == "picture" else task)
        targets = {"clip_i": self._prompt_embeddings, "clip_t": self.scorer.texts(texts)}
        return readings | {name: F.cosine_similarity(embeddings, target) for name, target in targets.items()}

    @functools.cached_property
    def _prompt_embeddings(self) -> Tensor:
        return self.scorer.images(self.prompts.images)

    def draw(self, task: str, adapter: IPAdapter | None = None, fuse: Fuse = decoupled, lam: AdapterLambda = 0.0) -> Tensor:
        """Draw one picture per prompt, `n 3 h w`, with seeds 0 .. n-1; without an adapter, from the text alone."""
        pipeline = replace(self.pipeline, adapters=(adapter,) if adapter else ())
        embedding = embed(pipeline, self.prompts.images) if adapter else None
        name = f"{task}, lambda {lam:g}" if isinstance(lam, float) else task
        return draw_prompts(pipeline, self.prompts.texts(task), embedding, lam, self.guidance, self.steps, name, fuse)


def embed(pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
    """Encode pictures for the pipeline's adapter, `n 1 m e`, on its device. Each picture is a separate image prompt."""
    batch = batch_size(str(pipeline.device))
    parts = [pipeline.embed(images[first : first + batch]) for first in range(0, len(images), batch)]
    return torch.cat([part.transpose(0, 1) for part in parts])


@torch.no_grad()
def through_the_vae(vae: VAE, pixels: Tensor) -> Tensor:
    """Encode and decode pictures, `n 3 h w`, on the VAE's device. The result is on the CPU."""
    device = device_of(vae)
    return torch.cat([vae.decode(vae.encode(part.to(device))).cpu() for part in pixels.split(batch_size(device, pixels.shape[-1]))])


def draw_prompts(
    pipeline: Pipeline,
    prompts: list[str],
    embedding: Tensor | None,
    scale: AdapterLambda,
    guidance: float,
    steps: int,
    name: str,
    fuse: Fuse = decoupled,
    hints: Tensor | None = None,
    control_scale: float = 1.0,
    image_guidance: float | None = None,
) -> Tensor:
    """Draw one picture per prompt, `n 3 h w`, with seeds 0 .. n-1, in bfloat16 if the device supports it. The result is on the CPU.

    `embedding`: the encoded image prompts, `n 1 m e`, or None. `scale`: lambda. `name`: the label of the progress bar. `hints`: what
    each of the pipeline's controls reads, `n c h w` in [0, 1], weighted by `control_scale`. `image_guidance`: as in `sample`.
    """
    parts, device = [], str(pipeline.device)
    for rows in tqdm(torch.arange(len(prompts)).split(batch_size(device, pipeline.native_size[0])), desc=name, unit="batch"):
        texts, part_embedding = [prompts[i] for i in rows], None if embedding is None else embedding[rows]
        part_hints = [] if hints is None else [Hint(hints[rows], control_scale)] * len(pipeline.controls)
        with precision(device):
            x = pipeline.sample(
                texts,
                rows.tolist(),
                part_embedding,
                scale=scale,
                guidance=guidance,
                steps=steps,
                fuse=fuse,
                image_guidance=image_guidance,
                hints=part_hints,
            )
        parts.append(x.float().cpu())
    return torch.cat(parts)
