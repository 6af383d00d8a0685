"""The traps that others fell into: each other way to compute differs from the public libraries, where this project's way agrees.

The parity tests of each module check that our way is right. Here the common mistakes are made on purpose, through arguments and
configs, to show that a comparison would notice them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import clip_tokenizer, max_error, randn, text_pair, unet_pair, vision_pair
from PIL import Image, ImageOps
from safetensors.torch import save_file
from solvers import ddim_trajectory, denoiser
from torch import Tensor
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from checkpoints.adapters import load_adapter
from model.adapter import IPAdapter
from model.attention import concatenated
from model.context import pyramid
from model.image_encoder import ImageConfig, ImageEncoder
from model.text_encoder import TextConfig, TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from sampling.ddim import ddim, ddim_times
from sampling.guidance import guided
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule

TOLERANCE = 1e-11  # measured: right 1.3e-13 and less, wrong 4.9e-6 and more
# One width for all levels, so that no mistake with the adapter's keys shows in a shape.
UNET = UNetConfig(channels=(16, 16), depth=(1, 1), heads=(2, 2), res_blocks=1, context_dim=12, groups=4)
TEXT = TextConfig(width=12, layers=3, heads=2)
IMAGE = ImageConfig(image_size=16, patch=4, width=16, layers=(3,), heads=2, output_dim=10)
PROMPTS, LAMBDA, GUIDANCE, T = ["an owl", "a photo of a fox"], 0.7, 7.5, 500  # negative first
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8))
SQUARE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
MASK, GRIDS = randn(72, 120, seed=4).sigmoid(), ((9, 15), (5, 8), (3, 4))  # of a picture, and a UNet's for its latents


def official(peer: Any) -> dict[str, dict[str, Tensor]]:
    """A random adapter, its keys counted over diffusers' processors, in numbers that float32 can hold."""
    widths = {"k": 2.0, "v": 1.0}
    layers = {
        f"{i}.to_{x}_ip.weight": size * randn(16, 12, seed=2 * i + (x == "k")) / 12**0.5
        for i, name in enumerate(peer.attn_processors)
        if "attn2" in name
        for x, size in widths.items()
    }
    projection = {"proj.weight": randn(48, 10) / 10**0.5, "proj.bias": 0.3 * randn(48, seed=1)}
    projection |= {"norm.weight": 1 + 0.3 * randn(12, seed=2), "norm.bias": 0.3 * randn(12, seed=3)}
    rounded = {"image_proj": projection, "ip_adapter": layers}
    return {part: {k: v.float().double() for k, v in tensors.items()} for part, tensors in rounded.items()}


def averages(mask: Tensor, h: int, w: int) -> Tensor:
    """The mean of a mask, `H W`, over the pixels that each cell of an `h w` grid touches, cell by cell: `1 1 (h w) 1`."""
    rows, columns = (
        [slice(i * size // n, math.ceil((i + 1) * size / n)) for i in range(n)]
        for size, n in zip(mask.shape, (h, w), strict=True)
    )
    return torch.stack([mask[y, x].mean() for y in rows for x in columns]).reshape(1, 1, h * w, 1)


@dataclass(frozen=True, repr=False)
class Stack:
    """Our networks with an adapter, what they are asked, and the peers' answers to it."""

    pipeline: Pipeline
    pixels: Tensor
    latents: Tensor
    answers: dict[str, Tensor]

    @property
    def encoder(self) -> ImageEncoder:
        assert self.pipeline.image is not None
        return self.pipeline.image


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    denoise, (text, our_text), (image, our_image) = unet_pair(UNET, linear=False), text_pair(TEXT), vision_pair(IMAGE)
    pixels, latents, adapter = randn(2, 3, 16, 16, seed=1), randn(1, 4, 12, 10, seed=2), official(denoise.peer)
    path = tmp_path_factory.mktemp("traps") / "adapter.safetensors"
    save_file({f"{part}.{k}": v for part, tensors in adapter.items() for k, v in tensors.items()}, path)

    ids = clip_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    states, seen = text(ids).last_hidden_state, image(pixels, output_hidden_states=True)
    denoise.peer._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
    for processor in denoise.peer.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [LAMBDA]
    embeds = torch.stack([torch.zeros_like(seen.image_embeds), seen.image_embeds])  # the two pictures of one prompt
    both = denoise.peer(torch.cat([latents] * 2), T, states, added_cond_kwargs={"image_embeds": [embeds]}).sample
    answers = {
        "step": both[:1] + GUIDANCE * (both[1:] - both[:1]),
        "weak step": both[:1] + 0.5 * (both[1:] - both[:1]),
        "text": states,
        "image": seen.image_embeds,
        "fine": seen.hidden_states[-2],
        "trajectory": ddim_trajectory(latents, Schedule(spacing="leading"), 30, eta=0.0, exact=True)[-1],
        "preprocess": CLIPImageProcessorPil(**SQUARE)(PHOTO, return_tensors="pt").pixel_values[0],
        "mask": torch.cat([averages(MASK, h, w) for h, w in GRIDS], dim=2),
    }
    adapters = (load_adapter(path, denoise.ours, IMAGE, dtype=None),)
    pipeline = Pipeline(denoise.ours, VAE(VAEConfig(channels=(8, 12), res_blocks=1, groups=4)), our_text, Schedule(), our_image, adapters)
    return Stack(pipeline, pixels, latents, answers)


def step(s: Stack, weight: float = GUIDANCE, **contexts: Any) -> Tensor:
    """One guided step from prompt, negative prompt and two pictures."""
    given: dict[str, Any] = {"embedding": s.encoder(s.pixels)[None, :, None], "scale": LAMBDA, **contexts}
    uncond, cond = s.pipeline.contexts(PROMPTS[1:], PROMPTS[:1], **given)
    return guided(s.pipeline.unet, uncond, cond, weight)(s.latents, T)


def text_states(s: Stack, **config: Any) -> Tensor:
    tower = TextEncoder(replace(TEXT, **config)).double().eval()
    tower.load_state_dict(s.pipeline.text.state_dict())
    return tower(tower.tokenize(PROMPTS))


def embedding(s: Stack, **config: Any) -> Tensor:
    encoder = ImageEncoder(replace(IMAGE, **config)).double().eval()
    encoder.load_state_dict(s.encoder.state_dict())
    return encoder(s.pixels)


def last(s: Stack, **schedule: Any) -> Tensor:
    changed = replace(s.pipeline.schedule, **schedule)
    return list(ddim(denoiser, s.latents, changed, ddim_times(changed, 30)))[-1].x


RIGHT: dict[str, Callable[[Stack], Tensor]] = {
    "step": step,
    "weak step": lambda s: step(s, 0.5),
    "text": text_states,
    "image": embedding,
    "fine": lambda s: s.encoder.fine(s.pixels),
    "trajectory": last,
    "preprocess": lambda s: s.encoder.preprocess(PHOTO),
    "mask": lambda _: torch.cat(pyramid(MASK, *GRIDS[0], levels=len(GRIDS)), dim=2),
}


def width_of_a_head(s: Stack) -> Tensor:
    """Takes attention_head_dim, 2, for the width of a head: 8 heads of a layer 16 wide."""
    unet = UNet(replace(UNET, heads=(8, 8))).double().eval()
    unet.load_state_dict(s.pipeline.unet.state_dict())
    (known,) = s.pipeline.adapters
    adapter = IPAdapter(unet, known.image_projection)
    adapter.load_state_dict(known.state_dict())
    return step(replace(s, pipeline=replace(s.pipeline, unet=unet, adapters=(adapter,))))


def grids_guessed(_: Stack) -> Tensor:
    """From the number of queries and the mask's own sides, as diffusers guesses them."""
    levels = []
    for h, w in GRIDS:
        rows = int(math.sqrt(h * w * MASK.shape[0] / MASK.shape[1]))
        rows += (h * w) % rows != 0
        levels += pyramid(MASK, rows, h * w // rows, levels=1)
    return torch.cat(levels, dim=2)


WRONG: dict[str, tuple[str, Callable[[Stack], Tensor]]] = {
    "heads: attention_head_dim read as the width of a head": ("step", width_of_a_head),
    "one softmax over text and image": ("step", lambda s: step(s, fuse=concatenated)),
    "null image: zero pixels through the encoder": (
        "step",
        lambda s: step(s, against=[s.encoder(torch.zeros_like(s.pixels))[None, :, None]]),
    ),
    "no guidance at a weight below 1": ("weak step", lambda s: step(s, max(0.5, 1.0))),
    "padding token 0": ("text", lambda s: text_states(s, pad=0)),
    "penultimate hidden state": ("text", lambda s: text_states(s, skip=1)),
    "no final LayerNorm": ("text", lambda s: text_states(s, final_norm=False)),
    "text: gelu for quick_gelu": ("text", lambda s: text_states(s, activation="gelu")),
    "image: quick_gelu for gelu": ("image", lambda s: embedding(s, activation="quick_gelu")),
    "image: another number of heads": ("image", lambda s: embedding(s, heads=4)),
    "image embedding normalised": ("image", lambda s: F.normalize(embedding(s), dim=-1)),
    "fine features after post-layernorm": ("fine", lambda s: s.encoder.clip.ln_post(s.encoder.fine(s.pixels))),
    "picture cropped with the margin rounded up": (
        "preprocess",
        lambda s: s.encoder.preprocess(ImageOps.mirror(PHOTO)).flip(-1),
    ),
    "picture prepared by torchvision": (
        "preprocess",
        lambda _: CLIPImageProcessor(**SQUARE)(PHOTO, return_tensors="pt").pixel_values[0],
    ),
    "mask: the grid guessed from the number of queries": ("mask", grids_guessed),
    "30 steps spaced as LDM does": ("trajectory", lambda s: last(s, spacing="ldm")),
    "alpha is 1 after the last step": ("trajectory", lambda s: last(s, final_one=True)),
}


@pytest.mark.parity("diffusers UNet2DConditionModel with an IP-Adapter, DDIMScheduler", TOLERANCE)
@pytest.mark.parity("transformers CLIPTextModel, CLIPVisionModelWithProjection, CLIPImageProcessorPil", TOLERANCE)
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_the_peers(stack: Stack, name: str) -> None:
    with torch.no_grad():
        assert max_error(RIGHT[name](stack), stack.answers[name]) < TOLERANCE


@pytest.mark.parametrize("trap", WRONG)
def test_a_trap_shows(stack: Stack, trap: str) -> None:
    name, wrong = WRONG[trap]
    with torch.no_grad():
        assert max_error(wrong(stack), stack.answers[name]) > 100 * TOLERANCE
