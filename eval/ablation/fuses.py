"""Ways to combine text and image between a sum and a joint softmax. Tier B of the ablation compares them, to find the cause.

A_t and A_i are what attention reads from the text and from the image prompt. In a joint softmax they share the weight,

Z = g A_t + (1 - g) A_i,   g = sigmoid(logsumexp(Q K^T / sqrt d) - logsumexp(Q K'^T / sqrt d))

so the image weakens the text, and the text weakens the image. Here, only one of the two happens, or both are weakened by a learned number.
Each function has the signature of `model.attention.decoupled`, and reads one image prompt. Tier D varies the joint softmax: `even_odds`
and `unpadded`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.adapter import IPAdapter
from model.attention import attention, concatenated
from model.context import Context
from model.image_projection import Projection
from model.source import Source
from model.text_encoder import TextEncoder
from model.unet import UNet
from sampling.lambdas import set_lambda


def gate(q: Tensor, text: Source, image: Source) -> Tensor:
    """Compute g, the share of a joint softmax that goes to the text where lambda is 1, `b h n 1`, in at least float32."""
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = [(q @ source.k.mT / math.sqrt(q.shape[-1])).to(exact) for source in (text, image)]
    text_mass, image_mass = (each.logsumexp(dim=-1, keepdim=True) for each in logits)
    return torch.sigmoid(text_mass - image_mass)


def text_yields(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """Z = g A_t + lambda A_i: the image weakens the text, as in a joint softmax, but the text does not weaken the image."""
    (source,) = image
    return gate(q, text, source).to(q) * attention(q, text.k, text.v) + source.scale_for(q) * attention(q, source.k, source.v)


def image_yields(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """Z = A_t + lambda (1 - g) A_i: the text weakens the image, as in a joint softmax, but the image does not weaken the text."""
    (source,) = image
    share = source.scale_for(q) * (1 - gate(q, text, source)).to(q)
    return attention(q, text.k, text.v) + share * attention(q, source.k, source.v)


def mixed(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """Z = (1 - mu) A_t + mu A_i. mu stands in place of lambda; `MixedAdapter` learns it."""
    (source,) = image
    mu = source.scale_for(q)
    return (1 - mu) * attention(q, text.k, text.v) + mu * attention(q, source.k, source.v)


def even_odds(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """`concatenated`, with lambda times m / n for m text tokens and n image tokens, as if there were as many of both."""
    (source,) = image
    odds = text.k.shape[-2] / source.k.shape[-2]
    return concatenated(q, text, [replace(source, scale=source.scale_for(q) * odds)])


def unpadded(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """`concatenated` without the padding of the text: the tokens that `WithoutPadding` sets to zero, and so their keys."""
    (source,) = image
    padding = (text.k == 0).all(dim=-1)[:, :, None]
    parts = [q.new_zeros(padding.shape).masked_fill(padding, -math.inf), source.log_scales(q)]
    shape = torch.broadcast_shapes(*(part.shape[:3] for part in parts))
    log_odds = torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], dim=-1)
    return attention(q, torch.cat([text.k, source.k], dim=-2), torch.cat([text.v, source.v], dim=-2), log_odds)


class WithoutPadding(TextEncoder):
    """A text encoder that sets the tokens after the first end token to zero."""

    @classmethod
    def of(cls, text: TextEncoder) -> WithoutPadding:
        """Copy a text encoder."""
        copy = cls(text.config)
        copy.load_state_dict(text.state_dict())
        return copy.to(next(text.parameters())).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        is_end = tokens == self.tokenize("")[0, 1].to(tokens)
        return super().forward(tokens) * (is_end.cumsum(dim=1) - is_end.long() == 0)[..., None]


class MixedAdapter(IPAdapter):
    """An adapter for `mixed`, with a trained mu for each layer and head. All start at 1/2."""

    def __init__(self, unet: UNet, image_projection: Projection) -> None:
        super().__init__(unet, image_projection)
        self.mix = nn.ParameterList(torch.zeros(heads) for heads in self.heads)  # mu = sigmoid(mix)

    @property
    def mu(self) -> list[Tensor]:
        """Return mu of each layer, `1 h 1 1`."""
        return [mix.sigmoid().view(1, -1, 1, 1) for mix in self.mix]

    def forward(self, context: Context, features: Tensor, scale: float | Tensor = 1.0) -> Context:
        """Return `context` with one more image prompt, whose lambda is mu. `scale` is not used."""
        return set_lambda(super().forward(context, features), self.mu)
