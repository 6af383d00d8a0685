"""Every trap that others fell into, as a mutant of the real code: the parity checks pass what is right and reject each mutant."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from peers import clip_tokenizer, max_error, randn, text_pair, unet_pair, vae_pair, vision_pair
from PIL import Image, ImageOps
from safetensors.torch import save_file
from test_ddim import denoiser, peer_trajectory
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import weights_convert
from model import attention, image_encoder, unet
from model.adapter import IPAdapter
from model.attention import Attention, Context, CrossAttention
from model.image_encoder import ImageConfig, ImageEncoder
from model.layers import Downsample, ResBlock, SpatialTransformer
from model.text_encoder import TextConfig
from model.unet import UNetConfig
from model.vae import VAEConfig
from sampling.ddim import ddim
from sampling.guidance import guided
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule

TOLERANCE = 1e-11  # measured: right 1.3e-13 and less, wrong 4.9e-6 and more
# One width for all levels, so that no mistake with the adapter's keys shows in a shape.
UNET = UNetConfig(channels=(16, 16), depth=(1, 1), heads=(2, 2), res_blocks=1, context_dim=12, groups=4)
TEXT, VAE = TextConfig(width=12, layers=3, heads=2), VAEConfig(channels=(8, 12), res_blocks=1, groups=4)
IMAGE = ImageConfig(image_size=16, patch=4, width=16, layers=(3,), heads=2, output_dim=10)
PROMPTS, LAMBDA, GUIDANCE, T = ["an owl", "a photo of a fox"], 0.7, 7.5, 500  # negative first
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8))


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


@dataclass(frozen=True, repr=False)
class Stack:
    """Our networks and an adapter on disk, what they are asked, and the peers' answers to it."""

    pipeline: Pipeline
    adapter: Path
    pixels: Tensor
    latents: Tensor
    tokens: Tensor
    answers: dict[str, Tensor]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    denoise, (vae, our_vae) = unet_pair(UNET, linear=False), vae_pair(VAE)
    (text, our_text), (image, our_image) = text_pair(TEXT), vision_pair(IMAGE)
    pixels, latents, adapter = randn(2, 3, 16, 16, seed=1), randn(1, 4, 12, 10, seed=2), official(denoise.peer)
    path = tmp_path_factory.mktemp("mutants") / "adapter.safetensors"
    save_file({f"{part}.{k}": v for part, tensors in adapter.items() for k, v in tensors.items()}, path)

    ids = clip_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    states = text(ids).last_hidden_state
    seen = image(pixels, output_hidden_states=True)
    denoise.peer._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
    for processor in denoise.peer.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [LAMBDA]
    embeds = torch.stack([torch.zeros_like(seen.image_embeds), seen.image_embeds])  # the two pictures of one prompt
    both = denoise.peer(torch.cat([latents] * 2), T, states, added_cond_kwargs={"image_embeds": [embeds]}).sample
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    answers = {
        "step": both[:1] + GUIDANCE * (both[1:] - both[:1]),
        "text": states,
        "image": seen.image_embeds,
        "fine": seen.hidden_states[-2],
        "encode": vae.encode(pixels).latent_dist.mean * VAE.scale,
        "decode": vae.decode(latents / VAE.scale).sample,
        "trajectory": peer_trajectory(latents, Schedule(), 30, eta=0.0, exact=True)[-1],
        "preprocess": CLIPImageProcessorPil(**square)(PHOTO, return_tensors="pt").pixel_values[0],
    }
    pipeline = Pipeline(denoise.ours, our_vae, our_text, Schedule(), our_image)
    return Stack(pipeline, path, pixels, latents, ids, answers)


def step(s: Stack) -> Tensor:
    """One guided step from prompt, negative prompt and two pictures, with the adapter read from its file."""
    adapter = weights_convert.load_adapter(s.adapter, s.pipeline.unet, IMAGE.output_dim, dtype=None)
    pipeline = replace(s.pipeline, adapters=(adapter,))
    embedding = pipeline.image(s.pixels)[None]  # type: ignore[misc]
    uncond, cond = pipeline.contexts(PROMPTS[1:], PROMPTS[:1], embedding, LAMBDA)
    return guided(pipeline.unet, uncond, cond, GUIDANCE)(s.latents, T)


CHECKS: dict[str, Callable[[Stack], Tensor]] = {
    "step": step,
    "text": lambda s: s.pipeline.text(s.pipeline.text.tokenize(PROMPTS)),
    "image": lambda s: s.pipeline.image(s.pixels),  # type: ignore[misc]
    "fine": lambda s: s.pipeline.image.fine(s.pixels),  # type: ignore[union-attr]
    "encode": lambda s: s.pipeline.vae.encode(s.pixels),
    "decode": lambda s: s.pipeline.vae.decode(s.latents),
    "trajectory": lambda s: list(ddim(denoiser, s.latents, s.pipeline.schedule, 30))[-1].x,
    "preprocess": lambda s: s.pipeline.image.preprocess(PHOTO),  # type: ignore[union-attr]
}


def error(s: Stack, check: str) -> float:
    with torch.no_grad():
        return max_error(CHECKS[check](s), s.answers[check])


Mutant = Callable[[pytest.MonkeyPatch, Stack], None]


def head_width_for_heads(m: pytest.MonkeyPatch, s: Stack) -> None:
    m.setattr(s.pipeline.unet, "config", replace(UNET, heads=(8, 8)))
    for module in s.pipeline.unet.modules():
        if isinstance(module, Attention):
            m.setattr(module, "heads", 8)


def no_root_of_d(m: pytest.MonkeyPatch, _: Stack) -> None:
    m.setattr(attention, "attention", lambda q, k, v, _=None: F.scaled_dot_product_attention(q, k, v, scale=1.0))


def mid_in_execution_order(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = weights_convert.adapter_names

    def names(ours: Any, unet: Any) -> dict[str, tuple[str, ...]]:
        layer = re.compile(r"to_[kv]\.(\d+)")
        return {
            k: (re.sub(r"r\.\d+", f"r.{2 * int(found[1]) + 1}", v),) if (found := layer.match(k)) else (v,)
            for k, (v,) in real(ours, unet).items()
        }

    m.setattr(weights_convert, "adapter_names", names)


def sum_after_to_out(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = CrossAttention.forward

    def forward(self: CrossAttention, x: Tensor, context: Context) -> Tensor:
        z, q = real(self, x, replace(context, image=())), self.split(self.to_q(x))
        for source in context.at(self.layer):
            z = z + LAMBDA * self.merge(attention.attention(q, source.k, source.v))
        return z

    m.setattr(CrossAttention, "forward", forward)


def one_softmax(m: pytest.MonkeyPatch, _: Stack) -> None:
    """Under the right one's name, because it is the default of several signatures."""
    m.setattr(attention.decoupled, "__code__", attention.concatenated.__code__)


def epsilon(kind: type[nn.Module], eps: float, part: str = "unet") -> Mutant:
    def mutate(m: pytest.MonkeyPatch, s: Stack) -> None:
        for module in getattr(s.pipeline, part).modules():
            for child in module.children() if isinstance(module, kind) else ():
                if isinstance(child, nn.GroupNorm):
                    m.setattr(child, "eps", eps)

    return mutate


def sine_first(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = unet.timestep_embedding
    m.setattr(unet, "timestep_embedding", lambda t, dim: real(t, dim).roll(dim // 2, dims=-1))


def pad_all_around(m: pytest.MonkeyPatch, s: Stack) -> None:
    for module in s.pipeline.vae.modules():
        if isinstance(module, Downsample):
            m.setattr(module, "asymmetric", False)
            m.setattr(module.conv, "padding", (1, 1))


def text_config(**changes: Any) -> Mutant:
    return lambda m, s: m.setattr(s.pipeline.text, "config", replace(TEXT, **changes))


def null_tokens(null: Callable[[Stack, IPAdapter, Tensor], Tensor]) -> Mutant:
    """Other image tokens where the embedding is zero."""

    def mutate(m: pytest.MonkeyPatch, s: Stack) -> None:
        real = IPAdapter.tokens
        m.setattr(IPAdapter, "tokens", lambda self, e: real(self, e) if e.any() else null(s, self, real(self, e)))

    return mutate


def zero_pixels(s: Stack, adapter: IPAdapter, tokens: Tensor) -> Tensor:
    embedding = s.pipeline.image(torch.zeros_like(s.pixels))  # type: ignore[misc]
    return adapter.image_projection(embedding).reshape(tokens.shape)


def normalised(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = ImageEncoder.forward
    m.setattr(ImageEncoder, "forward", lambda self, pixels: F.normalize(real(self, pixels), dim=-1))


def norm_of_fine_features(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = ImageEncoder.fine
    m.setattr(ImageEncoder, "fine", lambda self, pixels: self.clip.ln_post(real(self, pixels)))


def schedule(**changes: Any) -> Mutant:
    def mutate(m: pytest.MonkeyPatch, _: Stack) -> None:
        real = Schedule.pairs
        m.setattr(Schedule, "pairs", lambda self, steps: real(replace(self, **changes), steps))

    return mutate


def tanh_gelu(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = F.gelu
    m.setattr(F, "gelu", lambda x, approximate="tanh": real(x, approximate=approximate))  # CLIP's module names its own


def no_causal_mask(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = ResidualAttentionBlock.forward
    m.setattr(ResidualAttentionBlock, "forward", lambda self, x, attn_mask: real(self, x))


def crop_rounded_up(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = image_encoder.centre_square
    m.setattr(image_encoder, "centre_square", lambda image, *how: ImageOps.mirror(real(ImageOps.mirror(image), *how)))


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "heads: attention_head_dim read as the width of a head": ("step", head_width_for_heads),
    "no 1/sqrt(d)": ("step", no_root_of_d),
    "adapter keys: mid in execution order": ("step", mid_in_execution_order),
    "text and image added after to_out, its bias twice": ("step", sum_after_to_out),
    "one softmax over text and image": ("step", one_softmax),
    "GroupNorm of spatial transformers at 1e-5": ("step", epsilon(SpatialTransformer, 1e-5)),
    "GroupNorm of residual blocks at 1e-6": ("step", epsilon(ResBlock, 1e-6)),
    "GroupNorm of the UNet's output at 1e-6": ("step", epsilon(unet.UNet, 1e-6)),
    "GroupNorm of the encoder at 1e-5": ("encode", epsilon(nn.Module, 1e-5, "vae")),
    "GroupNorm of the decoder at 1e-5": ("decode", epsilon(nn.Module, 1e-5, "vae")),
    "timestep embedding: sine first": ("step", sine_first),
    "GEGLU with the tanh gelu": ("step", tanh_gelu),
    "encoder pads all around": ("encode", pad_all_around),
    "null image: zero pixels through the encoder": ("step", null_tokens(zero_pixels)),
    "null image: zero tokens": ("step", null_tokens(lambda _, __, tokens: torch.zeros_like(tokens))),
    "padding token 0": ("text", text_config(pad=0)),
    "penultimate hidden state": ("text", text_config(skip=1)),
    "no final LayerNorm": ("text", text_config(final_norm=False)),
    "no causal mask": ("text", no_causal_mask),
    "text: gelu for quick_gelu": ("text", lambda m, _: m.setattr(QuickGELU, "forward", lambda self, x: F.gelu(x))),
    "image: quick_gelu for gelu": ("image", lambda m, _: m.setattr(nn.GELU, "forward", QuickGELU.forward)),
    "image embedding normalised": ("image", normalised),
    "fine features after post-layernorm": ("fine", norm_of_fine_features),
    "picture cropped with the margin rounded up": ("preprocess", crop_rounded_up),
    "30 steps spaced as LDM does": ("trajectory", schedule(spacing="ldm")),
    "alpha is 1 after the last step": ("trajectory", schedule(final_one=True)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_rejected(stack: Stack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check, mutate = MUTANTS[name]
    right = error(stack, check)
    mutate(monkeypatch, stack)
    wrong = error(stack, check)
    assert right < TOLERANCE
    assert wrong > 100 * TOLERANCE
