"""Attention (Eq. 3), decoupled cross-attention (Eq. 5 and 8), and the ablation's concatenated keys and values.

Cross-attention reads from *sources*: pairs of keys and values. The text is one source, and each image prompt is
another. `decoupled` applies a separate softmax to each source and adds the results. `concatenated` applies one softmax
to the keys of all sources. They have the same signature, so an experiment can swap one for the other.

Axes: `b n c` for tokens and `b h n d` for heads, with `n` queries and `m` keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.kernels import fused_is_faster
from model.source import Source

if TYPE_CHECKING:
    from model.context import Context


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt d + bias) V  (Eq. 3).

    `q`: `b h n d`. `k`, `v`: `b h m d`. `bias`: broadcasts to `b h n m`.
    """
    if fused_is_faster(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return (logits if bias is None else logits + bias).softmax(dim=-1).to(v) @ v


def decoupled(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """Z = softmax(Q K^T / sqrt d) V  +  lambda * softmax(Q K'^T / sqrt d) V'     (Eq. 5, with lambda of Eq. 8)

    `q`: `b h n d`. Each source in `image` adds one such lambda term. Returns `b h n d`.
    """
    z = attention(q, text.k, text.v)
    for source in image:
        if not source.off:
            z = z + source.scale_for(q) * attention(q, source.k, source.v)
    return z


def concatenated(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """Z = softmax(Q [K; K']^T / sqrt d) [V; V']: one softmax over all keys, for the ablation (section 4.4.1).

    lambda multiplies exp(logit) of K': log lambda is added to the logits. lambda = 0 leaves the source out. Raises
    ValueError when lambda is a negative number; `check_sign` checks tensors where a Context is made.

    For one query and one image prompt, text and image compete: Z = g A_text + (1 - g) A_image, with
    g = sigmoid(logsumexp(Q K^T / sqrt d) - logsumexp(Q K'^T / sqrt d) - log lambda).
    """
    image = [source for source in image if not source.off]
    k = torch.cat([text.k, *(source.k for source in image)], dim=-2)
    v = torch.cat([text.v, *(source.v for source in image)], dim=-2)
    numbers = [source.scale for source in image if isinstance(source.scale, int | float)]
    for number in numbers:
        check_sign(concatenated, number)
    if numbers == [1] * len(image):
        return attention(q, k, v)
    log_odds = [q.new_zeros(1, 1, 1, text.k.shape[-2]), *(source.log_scales(q) for source in image)]
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in log_odds))
    return attention(q, k, v, torch.cat([part.expand(*shape, part.shape[-1]) for part in log_odds], dim=-1))


Fuse = Callable[[Tensor, Source, Sequence[Source]], Tensor]


def check_sign(fuse: Fuse, scale: float | Tensor) -> None:
    """Raise ValueError when `fuse` is `concatenated` and lambda is negative. Call it outside of steps, since it waits for a GPU."""
    if fuse is concatenated and bool((scale < 0).any() if isinstance(scale, Tensor) else scale < 0):
        raise ValueError("the joint softmax takes log lambda, so lambda must not be negative")


class Attention(nn.Module):
    """The projections of multi-head attention: Q = x W_q, K = c W_k, V = c W_v, and the output projection `to_out`."""

    def __init__(self, dim: int, context_dim: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """Split the heads: `b n c` -> `b h n d`."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def merge(self, z: Tensor) -> Tensor:
        """Concatenate the heads and apply W_out: `b h n d` -> `b n c`. The sources have been summed already."""
        return self.to_out(rearrange(z, "b h n d -> b n (h d)"))


class SelfAttention(Attention):
    """Attention from tokens `b n c` to themselves."""

    def __init__(self, dim: int, heads: int, bias: bool = False) -> None:
        super().__init__(dim, dim, heads, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(attention(self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))))


class CrossAttention(Attention):
    """Attention from tokens `b n c` to a Context. `layer` is its index in execution order (down, mid, up)."""

    def __init__(self, dim: int, context_dim: int, heads: int, layer: int) -> None:
        super().__init__(dim, context_dim, heads)
        self.layer = layer

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = self.split(self.to_q(x))
        text = Source(self.split(self.to_k(context.text)), self.split(self.to_v(context.text)))
        return self.merge(context.fuse(q, text, context.at(self.layer)))
