"""Draw one request at several lambdas, with one softmax or two: the paper's claim as two rows of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from model.attention import Fuse
from sampling.batch import groups
from sampling.images import to_images
from sampling.inputs import read_inputs
from sampling.pipeline import SAMPLERS, Pipeline
from sampling.request import Request
from sampling.sampler import State

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
Watch = Callable[[State], None]


def strip(
    pipeline: Pipeline, request: Request, fuse: Fuse, watch: Watch | None = None, lambdas: Sequence[float] = LAMBDAS
) -> list[Image.Image]:
    """Draw a picture for each lambda, all with the seed of the request. Raises ValueError if there is no image prompt."""
    if not request.image_prompts:
        raise ValueError("lambda is the weight of an image prompt: choose a picture first")
    pictures: list[Image.Image] = []
    height, width = pipeline.native_size
    for part in groups(0, len(lambdas), height * width // pipeline.vae.config.factor**2):
        scale = torch.tensor([lambdas[i] for i in part]).view(-1, 1, 1, 1)
        pictures += to_images(sample(pipeline, request, fuse, watch, scale, len(part)))
    return pictures


def sample(
    pipeline: Pipeline, request: Request, fuse: Fuse, watch: Watch | None, scale: float | Tensor, num: int
) -> Tensor:
    """Draw `num` pictures with the seed of the request, `num 3 H W`, with this `fuse` and lambda.

    A picture to change, and the settings of the image prompts other than their pictures, are left out.
    """
    inputs = read_inputs(replace(request, init_image=None, mask=None, strength=None, paste=True, crop=False))
    each = [pipeline.embed(prompt.pictures, request.fit, i) for i, prompt in enumerate(inputs.image_prompts)]
    return pipeline.sample(
        [request.prompt] * num,
        [request.seed] * num,
        each or None,
        request.negative_prompt,
        scale=[scale] * len(each) or 1.0,
        guidance=request.guidance,
        image_guidance=request.image_guidance,
        steps=request.steps,
        fuse=fuse,
        watch=watch,
        sampler=SAMPLERS[request.sampler],
        hints=inputs.hints,
    )
