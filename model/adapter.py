"""IP-Adapter: a function from a picture to one (K', V') for each cross-attention layer.

K' = c_i W'_k and V' = c_i W'_v depend on the picture only, not on the latents or the timestep, so they are computed once
and ride in the Context. The UNet gets no new modules.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import Source
from model.context import Context
from model.image_projection import Projection
from model.unet import UNet


def _copy(text: nn.Linear) -> nn.Linear:
    own = nn.Linear(text.in_features, text.out_features, bias=False, device=text.weight.device, dtype=text.weight.dtype)
    with torch.no_grad():
        own.weight.copy_(text.weight)
    return own


class IPAdapter(nn.Module):
    """The trainable part of Figure 2: the projection and, for each layer, W'_k and W'_v, which start as the text's (3.2.2).

    With `own_projections=False` the frozen W_k, W_v of the UNet are used instead (the ablation's other axis).
    """

    def __init__(self, unet: UNet, image_projection: Projection, own_projections: bool = True) -> None:
        super().__init__()
        layers = unet.cross_attentions()
        if image_projection.context_dim != unet.config.context_dim:
            raise ValueError(
                f"the adapter's tokens are {image_projection.context_dim} wide, but this UNet reads a context of {unet.config.context_dim}"
            )
        self.image_projection = image_projection
        self.heads = [layer.heads for layer in layers]
        self.own_projections = own_projections
        if own_projections:
            self.to_k, self.to_v = nn.ModuleList(), nn.ModuleList()
            for layer in layers:
                self.to_k.append(_copy(layer.to_k))
                self.to_v.append(_copy(layer.to_v))
        else:
            self.shared = tuple((layer.to_k, layer.to_v) for layer in layers)  # a tuple: not submodules of the adapter

    def projections(self) -> list[tuple[nn.Module, nn.Module]]:
        """(W'_k, W'_v) of each cross-attention layer, in execution order."""
        return list(zip(self.to_k, self.to_v, strict=True)) if self.own_projections else list(self.shared)

    def tokens(self, embedding: Tensor) -> Tensor:
        """Image tokens c_i, `b n c`. Of several pictures the tokens are joined, so they share one softmax.

        `embedding`: `b e` or `b k e`; of fine features `b m e` or `b k m e`.
        """
        pictures = embedding if embedding.ndim == 3 + self.image_projection.fine else embedding[:, None]
        tokens = self.image_projection(pictures.flatten(0, 1))
        return rearrange(tokens, "(b k) n c -> b (k n) c", b=len(pictures))

    def forward(self, context: Context, embedding: Tensor, scale: float | Tensor = 1.0) -> Context:
        """Adds a picture to a Context. `embedding`: as `tokens` takes it. `scale`: lambda of all layers, as Source has it.

        A dropped picture is a zero embedding (section 3.2.3): its tokens are LayerNorm(bias), not zeros. For fine features
        it is zero pixels through the encoder.
        """
        tokens = self.tokens(embedding)

        def split(x: Tensor, heads: int) -> Tensor:
            return rearrange(x, "b m (h d) -> b h m d", h=heads)

        sources = tuple(
            Source(split(to_k(tokens), heads), split(to_v(tokens), heads), scale)
            for heads, (to_k, to_v) in zip(self.heads, self.projections(), strict=True)
        )
        return replace(context, image=(*context.image, sources))
