"""Every trap that others fell into, as a mutant of the real code: the parity checks pass what is right and reject each mutant."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from peers import clip_tokenizer, max_error, randn, text_pair, unet_pair, vae_pair, vision_pair
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from test_ddim import denoiser, peer_trajectory
from torch import Tensor, nn
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from checkpoints import adapters, clip, fill
from model import attention, context, image_encoder, unet
from model.adapter import IPAdapter
from model.attention import Attention, CrossAttention
from model.context import Context
from model.image_encoder import ImageConfig, ImageEncoder
from model.layers import Downsample, ResBlock, SpatialTransformer
from model.text_encoder import TextConfig, TextEncoder
from model.unet import UNetConfig
from model.vae import VAEConfig
from sampling import guidance
from sampling.ddim import ddim, ddim_times
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule

TOLERANCE = 1e-11  # measured: right 1.3e-13 and less, wrong 4.9e-6 and more
# One width for all levels, so that no mistake with the adapter's keys shows in a shape.
UNET = UNetConfig(channels=(16, 16), depth=(1, 1), heads=(2, 2), res_blocks=1, context_dim=12, groups=4)
TEXT, VAE = TextConfig(width=12, layers=3, heads=2), VAEConfig(channels=(8, 12), res_blocks=1, groups=4)
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


def text_folders(text: Any, root: Path) -> list[Path]:
    """The text tower as older and newer libraries write it: with the prefix, with positions beside the weights, bare."""
    text.save_pretrained(root / "written")
    bare = {
        name.removeprefix("text_model."): t for name, t in load_file(root / "written" / "model.safetensors").items()
    }
    prefixed = {f"text_model.{name}": tensor for name, tensor in bare.items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    forms = {"prefix": prefixed, "positions": prefixed | positions, "bare": bare}
    for form, tensors in forms.items():
        (root / form).mkdir()
        save_file(tensors, root / form / "model.safetensors")
        (root / form / "config.json").write_text((root / "written" / "config.json").read_text())
    return [root / form for form in forms]


def averages(mask: Tensor, h: int, w: int) -> Tensor:
    """The mean of a mask, `H W`, over the pixels that each cell of an `h w` grid touches, cell by cell: `1 1 (h w) 1`."""
    rows, columns = (
        [slice(i * size // n, math.ceil((i + 1) * size / n)) for i in range(n)]
        for size, n in zip(mask.shape, (h, w), strict=True)
    )
    return torch.stack([mask[y, x].mean() for y in rows for x in columns]).reshape(1, 1, h * w, 1)


@dataclass(frozen=True, repr=False)
class Stack:
    """Our networks, an adapter and text towers on disk, what they are asked, and the peers' answers to it."""

    pipeline: Pipeline
    adapter: Path
    texts: list[Path]
    pixels: Tensor
    latents: Tensor
    tokens: Tensor
    answers: dict[str, Tensor]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    denoise, (vae, our_vae) = unet_pair(UNET, linear=False), vae_pair(VAE)
    (text, our_text), (image, our_image) = text_pair(TEXT), vision_pair(IMAGE)
    pixels, latents, adapter = randn(2, 3, 16, 16, seed=1), randn(1, 4, 12, 10, seed=2), official(denoise.peer)
    folder = tmp_path_factory.mktemp("mutants")
    path = folder / "adapter.safetensors"
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
    texts = text_folders(text, folder)
    answers = {
        "step": both[:1] + GUIDANCE * (both[1:] - both[:1]),
        "weak step": both[:1] + 0.5 * (both[1:] - both[:1]),
        "text": states,
        "text files": torch.stack([states] * len(texts)),
        "image": seen.image_embeds,
        "fine": seen.hidden_states[-2],
        "encode": vae.encode(pixels).latent_dist.mean * VAE.scale,
        "decode": vae.decode(latents / VAE.scale).sample,
        "trajectory": peer_trajectory(latents, Schedule(spacing="leading"), 30, eta=0.0, exact=True)[-1],
        "preprocess": CLIPImageProcessorPil(**SQUARE)(PHOTO, return_tensors="pt").pixel_values[0],
        "mask": torch.cat([averages(MASK, h, w) for h, w in GRIDS], dim=2),
    }
    pipeline = Pipeline(denoise.ours, our_vae, our_text, Schedule(), our_image)
    return Stack(pipeline, path, texts, pixels, latents, ids, answers)


FUSE = {"step": attention.decoupled}  # how a step combines text and picture


def step(s: Stack, weight: float = GUIDANCE) -> Tensor:
    """One guided step from prompt, negative prompt and two pictures, with the adapter read from its file."""
    adapter = adapters.load_adapter(s.adapter, s.pipeline.unet, IMAGE, dtype=None)
    pipeline = replace(s.pipeline, adapters=(adapter,))
    embedding = pipeline.image(s.pixels)[None]  # type: ignore[misc]
    uncond, cond = pipeline.contexts(PROMPTS[1:], PROMPTS[:1], embedding, LAMBDA, FUSE["step"])
    return guidance.guided(pipeline.unet, uncond, cond, weight)(s.latents, T)


def text_files(s: Stack) -> Tensor:
    """What the tower says, read from each of the files."""
    towers = [clip.load_text_encoder(path, dtype=None) for path in s.texts]
    return torch.stack([text(s.tokens) for text in towers])


CHECKS: dict[str, Callable[[Stack], Tensor]] = {
    "step": step,
    "weak step": lambda s: step(s, 0.5),
    "text": lambda s: s.pipeline.text(s.pipeline.text.tokenize(PROMPTS)),
    "text files": text_files,
    "image": lambda s: s.pipeline.image(s.pixels),  # type: ignore[misc]
    "fine": lambda s: s.pipeline.image.fine(s.pixels),  # type: ignore[union-attr]
    "encode": lambda s: s.pipeline.vae.encode(s.pixels),
    "decode": lambda s: s.pipeline.vae.decode(s.latents),
    "trajectory": lambda s: (
        list(ddim(denoiser, s.latents, s.pipeline.schedule, ddim_times(s.pipeline.schedule, 30)))[-1].x
    ),
    "preprocess": lambda s: s.pipeline.image.preprocess(PHOTO),  # type: ignore[union-attr]
    "mask": lambda s: torch.cat(context.pyramid(MASK, *GRIDS[0], levels=len(GRIDS)), dim=2),
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


def softmax_of_keys(m: pytest.MonkeyPatch, _: Stack) -> None:
    """`q @ k.T.softmax()`, as the official tool for attention maps has it."""
    m.setattr(attention, "attention", lambda q, k, v, _=None: q @ k.mT.softmax(-1) @ v)


def mid_in_execution_order(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = adapters.adapter_names

    def names(ours: Any, unet: Any) -> dict[str, tuple[str, ...]]:
        layer = re.compile(r"to_[kv]\.(\d+)")
        return {
            k: (re.sub(r"r\.\d+", f"r.{2 * int(found[1]) + 1}", v),) if (found := layer.match(k)) else (v,)
            for k, (v,) in real(ours, unet).items()
        }

    m.setattr(adapters, "adapter_names", names)


def sum_after_to_out(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = CrossAttention.forward

    def forward(self: CrossAttention, x: Tensor, context: Context) -> Tensor:
        z, q = real(self, x, replace(context, image=())), self.split(self.to_q(x))
        for source in context.at(self.layer):
            z = z + LAMBDA * self.merge(attention.attention(q, source.k, source.v))
        return z

    m.setattr(CrossAttention, "forward", forward)


def one_softmax(m: pytest.MonkeyPatch, _: Stack) -> None:
    m.setitem(FUSE, "step", attention.concatenated)


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


def image_heads(m: pytest.MonkeyPatch, s: Stack) -> None:
    """Their number is not in the weights, and any that divides the width fits."""
    for module in s.pipeline.image.modules():  # type: ignore[union-attr]
        if isinstance(module, nn.MultiheadAttention):
            m.setattr(module, "num_heads", 4)


def processor_of_torchvision(m: pytest.MonkeyPatch, _: Stack) -> None:
    peer = CLIPImageProcessor(**SQUARE)
    m.setattr(ImageEncoder, "preprocess", lambda _, image: peer(image, return_tensors="pt").pixel_values[0])


def grid_guessed(m: pytest.MonkeyPatch, _: Stack) -> None:
    """From the number of queries and the mask's own sides, as diffusers guesses it."""
    real = context.pyramid

    def pyramid(mask: Tensor, h: int, w: int, levels: int) -> list[Tensor]:
        grids = []
        for n in (level.shape[2] for level in real(mask, h, w, levels)):
            rows = int(math.sqrt(n * mask.shape[0] / mask.shape[1]))
            rows += n % rows != 0
            grids += real(mask, rows, n // rows, levels=1)
        return grids

    m.setattr(context, "pyramid", pyramid)


def no_guidance_up_to_one(m: pytest.MonkeyPatch, _: Stack) -> None:
    """As in diffusers: below 1 the condition alone decides."""
    real = guidance.guided
    m.setattr(guidance, "guided", lambda unet, uncond, cond, w: real(unet, uncond, cond, max(w, 1.0)))


def text_prefix(prefix: str) -> Mutant:
    def mutate(m: pytest.MonkeyPatch, _: Stack) -> None:
        real = clip.text_names
        m.setattr(clip, "text_names", lambda ours, config, _: real(ours, config, prefix))

    return mutate


def absent_is_zero(m: pytest.MonkeyPatch, s: Stack) -> None:
    """Reads the prefixed names from every file and takes what is there, as `strict=False` does."""
    read = fill._read
    text_prefix("text_model.")(m, s)
    m.setattr(fill, "check", lambda *_: None)
    m.setattr(
        fill,
        "_read",
        lambda file, theirs, like, *how: (
            read(file, theirs, like, *how) if theirs[0] in file else torch.zeros(like.shape, dtype=torch.float64)
        ),
    )


def positions_are_weights(m: pytest.MonkeyPatch, _: Stack) -> None:
    m.setattr(fill, "_EXTRA", re.compile("(?!)"))


def mask_is_a_buffer(m: pytest.MonkeyPatch, _: Stack) -> None:
    """open_clip's own causal mask, which no file holds and a module built on the meta device lacks."""
    real = TextEncoder.__init__

    def init(self: TextEncoder, config: TextConfig) -> None:
        real(self, config)
        self.clip.attn_mask = self.clip.build_causal_mask()

    m.setattr(TextEncoder, "__init__", init)


def crop_rounded_up(m: pytest.MonkeyPatch, _: Stack) -> None:
    real = image_encoder.centre_square
    m.setattr(image_encoder, "centre_square", lambda image, *how: ImageOps.mirror(real(ImageOps.mirror(image), *how)))


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "heads: attention_head_dim read as the width of a head": ("step", head_width_for_heads),
    "no 1/sqrt(d)": ("step", no_root_of_d),
    "softmax of the keys, not of the product": ("step", softmax_of_keys),
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
    "text files: the prefix expected, what is absent left at zero": ("text files", absent_is_zero),
    "text: gelu for quick_gelu": ("text", lambda m, _: m.setattr(QuickGELU, "forward", lambda self, x: F.gelu(x))),
    "image: quick_gelu for gelu": ("image", lambda m, _: m.setattr(nn.GELU, "forward", QuickGELU.forward)),
    "image: another number of heads": ("image", image_heads),
    "image embedding normalised": ("image", normalised),
    "fine features after post-layernorm": ("fine", norm_of_fine_features),
    "picture cropped with the margin rounded up": ("preprocess", crop_rounded_up),
    "picture prepared by torchvision": ("preprocess", processor_of_torchvision),
    "mask: the grid guessed from the number of queries": ("mask", grid_guessed),
    "no guidance at a weight below 1": ("weak step", no_guidance_up_to_one),
    "30 steps spaced as LDM does": ("trajectory", schedule(spacing="ldm")),
    "alpha is 1 after the last step": ("trajectory", schedule(final_one=True)),
}


@pytest.mark.parity("diffusers UNet2DConditionModel, AutoencoderKL, DDIMScheduler", TOLERANCE)
@pytest.mark.parity("transformers CLIPTextModel, CLIPVisionModelWithProjection, CLIPImageProcessorPil", TOLERANCE)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_rejected(stack: Stack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check, mutate = MUTANTS[name]
    right = error(stack, check)
    mutate(monkeypatch, stack)
    wrong = error(stack, check)
    assert right < TOLERANCE
    assert wrong > 100 * TOLERANCE


REFUSED: dict[str, tuple[Mutant, str]] = {
    "the text tower's prefix never read": (text_prefix(""), "it lacks embeddings.*, but holds text_model"),
    "the text tower's prefix always read": (text_prefix("text_model."), "it lacks text_model.*, but holds emb"),
    "position_ids taken for weights": (positions_are_weights, r"also holds .*\.position_ids"),
    "the causal mask left on the meta device": (mask_is_a_buffer, r"not filled: clip\.attn_mask"),
}


@pytest.mark.parity("transformers CLIPTextModel", TOLERANCE)
@pytest.mark.parametrize("name", REFUSED)
def test_mutants_that_misread_files_are_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A strict load stops them before there is a number to compare."""
    mutate, sentence = REFUSED[name]
    assert error(stack, "text files") < TOLERANCE
    mutate(monkeypatch, stack)
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        error(stack, "text files")


# In float32 a fixed bound says little, because the error depends on the weights: the bar is twice the peer's own.


def exact_embedding(t: Tensor, dim: int = UNET.channels[0]) -> Tensor:
    """The timestep embedding in float64, where diffusers has float32 in any case."""
    args = t.double()[:, None] * 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([args.cos(), args.sin()], dim=-1)


def prediction() -> tuple[Tensor, Tensor, Tensor]:
    """(ours, the peer's, the truth) of one call of the UNet, with weights and inputs that float32 can hold."""
    both, t = unet_pair(UNET, linear=False), torch.tensor([981, 500, 21])
    x, text = randn(3, 4, 12, 10, seed=1).float(), randn(3, 7, UNET.context_dim, seed=2).float()
    with torch.no_grad():
        ours, theirs = both.ours.float()(x, t, Context(text)), both.peer.float()(x, t, text).sample
        exact = both.peer.double()
        exact.time_proj.forward = exact_embedding
        return ours, theirs, exact(x.double(), t, text.double()).sample


def alphas() -> tuple[Tensor, Tensor, Tensor]:
    """(ours, the peer's, the truth) of alpha-bar."""
    peer = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Schedule().alphas, peer.alphas_cumprod, (1 - betas).cumprod(0)


def half_embedding(m: pytest.MonkeyPatch) -> None:
    def embedding(t: Tensor, dim: int) -> Tensor:
        args = t.half()[:, None] * torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2)).half()
        return torch.cat([args.cos(), args.sin()], dim=-1)

    m.setattr(unet, "timestep_embedding", embedding)


def half_alphas(m: pytest.MonkeyPatch) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    m.setattr(Schedule, "alphas", property(lambda _: (1 - betas).half().cumprod(0).float()))


ISLANDS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor, Tensor]], Callable[[pytest.MonkeyPatch], None]]] = {
    "timestep embedding in half precision": (prediction, half_embedding),
    "alpha-bar in half precision": (alphas, half_alphas),
}


@pytest.mark.parity("diffusers UNet2DConditionModel, DDIMScheduler, float32", "2 times the peer's own")
@pytest.mark.parametrize("name", ISLANDS)
def test_half_precision_where_float32_is_needed_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    measure, mutate = ISLANDS[name]
    ours, theirs, truth = measure()
    bar = 2 * max_error(theirs.double(), truth)
    mutate(monkeypatch)
    wrong = measure()[0]
    assert max_error(ours.double(), truth) <= bar
    assert max_error(wrong.double(), truth) > 100 * bar
