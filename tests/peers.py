"""What the parity tests share: random peaky weights, and pairs of equal networks, a peer's and ours."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from checkpoints.configs import diffusers_config
from checkpoints.diffusers_folder import text_settings, vision_settings
from checkpoints.names import TRANSPOSED, Names, image_names, map_names, text_names, unet_rows, vae_rows
from eval.peers.official import peer_autoencoder
from model.image_encoder import ImageConfig, ImageEncoder
from model.text_encoder import END, START, TextConfig, TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

M = TypeVar("M", bound=nn.Module)
PEAKY = re.compile(r"(to_q|to_k|q_proj|k_proj|to_k_ip\.\d+)\.weight$")


def max_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a - b).detach().abs().max())


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomise(module: M, seed: int = 0, peaky: float = 2.0) -> M:
    """Random float64 weights, norms and biases too, so that nothing is trivially 0 or 1.

    Queries and keys are made times `peaky`, so that softmaxes are far from flat: 2 gives logits of deviation 4. With 4
    they have 16, and a deep network then turns its last bit (1e-15) into 1e-7: fit for single layers only.
    """
    generator = torch.Generator().manual_seed(seed)
    module.double().eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if weight.ndim > 1:
            weight.copy_(noise * weight[0].numel() ** -0.5 * (peaky if PEAKY.search(name) else 1.0))
        else:
            weight.copy_((1.0 if re.search(r"norm\w*\.weight$", name) else 0.0) + 0.3 * noise)
    return module


def from_peer(ours: M, names: Names, peer: Mapping[str, Tensor]) -> M:
    """Puts a peer's weights into a module of ours, all of them: q, k, v joined, projections turned, 1x1 convolutions as matrices."""
    state = ours.double().state_dict()
    assert names.keys() == state.keys()
    assert sorted(name for theirs in names.values() for name in theirs) == sorted(peer)
    for name, theirs in names.items():
        tensor = torch.cat([peer[n] for n in theirs])
        tensor = tensor.T if theirs[0] in TRANSPOSED else tensor
        state[name] = tensor[:, :, 0, 0] if tensor.ndim > state[name].ndim else tensor
    ours.load_state_dict(state)
    return ours.eval().requires_grad_(False)


@dataclass(frozen=True)
class UNetPair:
    """One network twice: diffusers' and ours, with equal weights, in float64."""

    peer: Any
    ours: UNet


Pair = Callable[[str], UNetPair]  # of the fixture `pair`, by name


def unet_pair(config: UNetConfig, linear: bool, seed: int = 0) -> UNetPair:
    """`linear`: the peer's 1x1 convolutions are matrices (SD 2, SDXL)."""
    settings = diffusers_config(config) | {"use_linear_projection": linear}
    peer, ours = randomise(UNet2DConditionModel.from_config(settings), seed), UNet(config)
    return UNetPair(peer, from_peer(ours, map_names(ours.state_dict(), unet_rows(config), 1), peer.state_dict()))


# Small relatives of the three base models: every rule of the big ones, at a few thousand weights a layer.
SMALL_SD15 = UNetConfig(channels=(16, 24, 32, 32), heads=(4, 4, 4, 4), context_dim=12, groups=4)
SMALL_SD21 = UNetConfig(channels=(16, 32, 48, 48), heads=(2, 4, 6, 6), context_dim=20, groups=8, prediction="v")
SMALL_SDXL = UNetConfig(
    channels=(16, 32, 48),
    depth=(0, 2, 3),
    mid_depth=3,
    heads=(2, 4, 6),
    context_dim=24,
    groups=8,
    added_dim=6 * 8 + 10,
    added_time_dim=8,
)
SMALL_ONE = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=6, groups=4)
SMALL_UNETS = {
    "sd15": (SMALL_SD15, False),
    "sd21": (SMALL_SD21, True),
    "sdxl": (SMALL_SDXL, True),
    "one_block": (SMALL_ONE, True),
}


def vae_pair(config: VAEConfig, seed: int = 0) -> tuple[Any, VAE]:
    peer, ours = randomise(peer_autoencoder(config), seed), VAE(config)
    return peer, from_peer(ours, map_names(ours.state_dict(), vae_rows(config), 1), peer.state_dict())


def clip_words() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary with its own names for start and end, and its merges, from open_clip's file."""
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : START - 511]
    words = {word: token for word, token in SimpleTokenizer().encoder.items() if token < START}
    return words | {"<|startoftext|>": START, "<|endoftext|>": END}, merges


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    words, merges = clip_words()
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=words, merges=pairs, pad_token=pad, model_max_length=77)


def text_pair(config: TextConfig) -> tuple[Any, TextEncoder]:
    """With a small vocabulary its last tokens are start and end, as in CLIP's."""
    size = len(config.vocabulary) or config.vocab_size
    sizes = CLIPTextConfig(
        vocab_size=size,
        **text_settings(config),
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    peer = randomise((CLIPTextModelWithProjection if config.output_dim else CLIPTextModel)(sizes))
    ours, state = TextEncoder(config), peer.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in state) else ""
    return peer, from_peer(ours, text_names(ours.state_dict(), config, prefix), state)


def vision_pair(config: ImageConfig) -> tuple[Any, ImageEncoder]:
    peer = randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_settings(config))))
    ours = ImageEncoder(config)
    return peer, from_peer(ours, image_names(ours.state_dict(), config), peer.state_dict())


def official_projection(
    form: str, image_dim: int, context_dim: int, tokens: int = 16, width: int = 768, heads: int = 12
) -> dict[str, tuple[int, ...]]:
    """The shapes of `image_proj` in the released files of IP-Adapter Plus and Full, by their names."""

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    if form == "Full":
        hidden = linear("proj.0", image_dim, image_dim)
        return hidden | linear("proj.2", context_dim, image_dim) | norm("proj.3", context_dim)
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, tokens, width)}
    shapes |= linear("proj_in", width, image_dim) | linear("proj_out", context_dim, width)
    shapes |= norm("norm_out", context_dim)
    for i in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            shapes |= norm(f"layers.{i}.{name}", width)
        for name, out, into in (
            ("0.to_q", 64 * heads, width),
            ("0.to_kv", 2 * 64 * heads, width),
            ("0.to_out", width, 64 * heads),
            ("1.1", 4 * width, width),
            ("1.3", width, 4 * width),
        ):
            shapes[f"layers.{i}.{name}.weight"] = (out, into)
    return shapes


def number_of(module: nn.Module) -> tuple[int, int]:
    """How many parameters, in how many tensors."""
    return sum(p.numel() for p in module.parameters()), len(module.state_dict())


def inputs(config: UNetConfig, h: int, w: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a timestep for each, text tokens."""
    return (
        randn(batch, 4, h, w, seed=1),
        torch.tensor([7, 981, 500])[:batch],
        randn(batch, 5, config.context_dim, seed=2),
    )


def added_inputs(config: UNetConfig, batch: int = 2) -> tuple[dict[str, Tensor], Tensor | None]:
    """SDXL's two further conditions as diffusers takes them, and the vector that the paper's authors make of them."""
    if not config.added_dim:
        return {}, None
    pooled, sizes = randn(batch, config.added_dim - 6 * 8, seed=3), torch.arange(6.0 * batch).reshape(batch, 6) * 37
    embedded = get_timestep_embedding(sizes.flatten(), 8, flip_sin_to_cos=True, downscale_freq_shift=0).reshape(
        batch, -1
    )
    return {"text_embeds": pooled, "time_ids": sizes}, torch.cat([pooled, embedded.double()], dim=1)
