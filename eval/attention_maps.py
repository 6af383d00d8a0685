"""Record the attention maps of all cross-attention layers, without changing the model.

`record` hooks these layers and recomputes their maps from their inputs (x, Context). Maps are `b h n m`, with n queries (positions in
the picture) and m keys (tokens). A guidance batch is [uncond, cond].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from eval.hooks import hooked
from model.attention import CrossAttention, Fuse, concatenated, decoupled
from model.context import Context
from model.source import Source
from model.text_encoder import Text, TextEncoder, TextEncoderPair, words_of
from model.unet import UNet


def softmax_maps(q: Tensor, text: Source, image: Sequence[Source], fuse: Fuse) -> tuple[Tensor, ...]:
    """Compute the maps of the text and of each image source, `b h n m`, by calling `fuse` with one-hot values.

    `decoupled`: softmax(Q K^T / sqrt d) of each source, without lambda; the rows of each map sum to 1. `concatenated`: the columns of
    the joint softmax, with lambda; the rows sum to 1 over all sources together.
    """
    sources = [text, *(replace(source, scale=1.0) if fuse is decoupled else source for source in image)]
    keys = [source.k.shape[-2] for source in sources]
    one_hot = torch.eye(sum(keys), dtype=q.dtype, device=q.device).split(keys)
    one_hot_sources = [replace(s, v=v.expand(*s.k.shape[:2], -1, -1)) for s, v in zip(sources, one_hot, strict=True)]
    return torch.split(fuse(q, one_hot_sources[0], one_hot_sources[1:]), keys, dim=-1)


def image_mass(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """Compute 1 - g, the share of a joint softmax that goes to image keys, `b h n`:

    g = sigmoid(logsumexp(Q K^T / sqrt d) - logsumexp(Q K'^T / sqrt d) - log lambda), where K' are the keys of all image sources,
    each with its own lambda.
    """

    def logits(source: Source) -> Tensor:
        lam = torch.as_tensor(source.scale_for(q), dtype=q.dtype, device=q.device)
        return q @ source.k.mT / math.sqrt(q.shape[-1]) + lam.log()

    images = torch.cat([logits(source) for source in image], dim=-1)
    return torch.sigmoid(images.logsumexp(dim=-1) - logits(text).logsumexp(dim=-1))


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """The maps of one cross-attention layer in one call of the UNet, in float32 on the CPU.

    `call`: index of the call within the `with` block. `t`: the timestep of each row. `grid`: the (h, w) of the n queries. `text`,
    `image`: maps `b h n m` (`softmax_maps`). `weights`: the factor of each image source, a number or `b 1 n 1`; it is lambda for
    `decoupled`, and 1 for a joint softmax, whose maps include lambda. `image_mass`: `b h n` for a joint softmax with image sources,
    otherwise None.
    """

    layer: int
    call: int
    t: tuple[int, ...]
    grid: tuple[int, int]
    text: Tensor
    image: tuple[Tensor, ...]
    weights: tuple[float | Tensor, ...]
    image_mass: Tensor | None

    def picture(self, maps: Tensor) -> Tensor:
        """Reshape maps `b h n m` to a picture for each token, `b h m y x`."""
        return rearrange(maps, "b h (y x) m -> b h m y x", y=self.grid[0])


@contextmanager
def record(unet: UNet) -> Iterator[list[LayerMaps]]:
    """Record maps: `with record(unet) as maps:` fills the list with a LayerMaps per layer and call, in execution order.

    The UNet's output does not change by a bit, and the hooks are removed at the end of the block. Grids are the latents' (h, w), halved
    and rounded up at each level, as in `pyramid`. To save memory, clear the list between calls. Do not run a backward pass with
    gradient checkpointing inside the block, since it calls layers twice. Raises ValueError for a compiled UNet.
    """
    if not isinstance(unet, UNet):
        raise ValueError("a compiled UNet does not run hooks: record the original UNet instead")
    maps: list[LayerMaps] = []
    call, t, grids = -1, (), {}

    def begin(_: UNet, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal call, t, grids
        inputs = inspect.signature(UNet.forward).bind(unet, *args, **kwargs).arguments
        b, _, h, w = inputs["x"].shape
        call, t = call + 1, tuple(torch.as_tensor(inputs["t"]).expand(b).tolist())
        sizes = ((-(-h // 2**i), -(-w // 2**i)) for i in range(len(unet.config.channels)))
        grids = {h * w: (h, w) for h, w in sizes}

    @torch.no_grad()
    def look(layer: CrossAttention, args: tuple[Tensor, Context], _: Tensor) -> None:
        x, context = args
        exact = torch.promote_types(x.dtype, torch.float32)
        q, k = (layer.split(out).to(exact) for out in (layer.to_q(x), layer.to_k(context.text)))
        text = Source(k, k)
        image = [replace(source, k=source.k.to(exact)) for source in context.at(layer.layer)]
        of_text, *of_image = (part.float().cpu() for part in softmax_maps(q, text, image, context.fuse))
        mass = image_mass(q, text, image).float().cpu() if context.fuse is concatenated and image else None
        weights = [source.scale_for(q) if context.fuse is decoupled else 1.0 for source in image]
        parts = tuple(w.float().cpu() if isinstance(w, Tensor) else w for w in weights)
        maps.append(LayerMaps(layer.layer, call, t, grids[q.shape[-2]], of_text, tuple(of_image), parts, mass))

    with unet.register_forward_pre_hook(begin, with_kwargs=True), hooked(unet.cross_attentions(), look):
        yield maps


def word_positions(encoder: TextEncoder, prompt: str) -> list[tuple[str, list[int]]]:
    """List the words of a prompt with the positions of their tokens, without words that `encoder.tokenize` drops or cuts off."""
    words, end = [], 1
    for word, pieces in words_of(prompt):
        if not encoder.rows or all(piece in encoder.rows for piece in pieces):
            start, end = end, end + len(pieces)
            words.append((word, list(range(start, min(end, encoder.config.context_length - 1)))))
    return [(word, places) for word, places in words if places]


def finest(maps: Sequence[LayerMaps]) -> Tensor:
    """Average the last row's maps over heads and the layers with the finest grid: `m y x`, text tokens first, then image tokens."""
    grid = max((one.grid for one in maps), key=math.prod)
    fine = [one for one in maps if one.grid == grid]
    return torch.stack(
        [one.picture(torch.cat([one.text, *one.image], dim=-1)[-1:]).mean(dim=1)[0] for one in fine]
    ).mean(dim=0)


Named = list[tuple[str, Tensor]]


def name_maps(text: Text, prompt: str, maps: Tensor) -> tuple[Named, Named]:
    """Name maps `m y x` over all tokens. Return (text, image).

    Text: one map per word, and one for all other positions (start, end, padding). Image: one map per image token. The maps of a word's
    tokens are summed, so the mean of a word's map is its share of the attention to the text.
    """
    encoder = text.first if isinstance(text, TextEncoderPair) else text
    length, words = encoder.config.context_length, word_positions(encoder, prompt)
    rest = sorted(set(range(length)) - {place for _, places in words for place in places})
    word_maps = [(word, maps[places].sum(dim=0)) for word, places in [*words, ("start, end, padding", rest)]]
    return word_maps, [(f"image token {i}", heat) for i, heat in enumerate(maps[length:], 1)]
