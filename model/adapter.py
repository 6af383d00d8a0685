"""IP-Adapter: a function that maps an image embedding to one (K', V') for each cross-attention layer.

K' = c_i W'_k and V' = c_i W'_v depend only on the image, not on the latents or the timestep. They are computed once per
image and passed to the UNet in its Context, so the UNet needs no new modules.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import check_sign
from model.context import Context
from model.features import as_features
from model.image_projection import Projection
from model.source import Source
from model.unet import UNet


def _copy(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        copy.weight.copy_(weight)
    return copy


class IPAdapter(nn.Module):
    """The trainable part of Figure 2: the image projection, and W'_k and W'_v for each cross-attention layer.

    W'_k and W'_v are initialised from the text's W_k and W_v (section 3.2.2). With `own_projections=False` the adapter
    uses the UNet's frozen W_k and W_v instead; the ablation compares the two. Raises ValueError when the projection's
    tokens do not have the width that the UNet's cross-attention reads.
    """

    def __init__(self, unet: UNet, image_projection: Projection, own_projections: bool = True) -> None:
        super().__init__()
        layers = unet.cross_attentions()
        if image_projection.context_dim != unet.config.context_dim:
            raise ValueError(
                f"the adapter's tokens are {image_projection.context_dim} wide, but this UNet reads a context of "
                f"{unet.config.context_dim}: use an adapter made for this UNet"
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
            self.shared = tuple((layer.to_k, layer.to_v) for layer in layers)  # in a tuple, so that they are not submodules

    def projections(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (W'_k, W'_v) of each cross-attention layer, in execution order."""
        return list(zip(self.to_k, self.to_v, strict=True)) if self.own_projections else list(self.shared)

    def tokens(self, features: Tensor) -> Tensor:
        """Compute the image tokens c_i, `b n c`. The tokens of several images are concatenated and share one softmax.

        `features`: `b k m e`, for k images, or global embeddings `b e`.
        """
        pictures = as_features(features)
        tokens = self.image_projection(pictures.flatten(0, 1))
        return rearrange(tokens, "(b k) n c -> b (k n) c", b=len(pictures))

    def forward(self, context: Context, features: Tensor, scale: float | Tensor = 1.0) -> Context:
        """Return `context` with one more image prompt. Raises ValueError if its `fuse` cannot use this lambda.

        `features`: as in `tokens`. `scale`: lambda for all layers, as in Source.

        A dropped picture has the features of the null image (`Features`). The tokens of a zero embedding are
        LayerNorm(bias), not zeros.
        """
        check_sign(context.fuse, scale)
        tokens = self.tokens(features)

        def split(x: Tensor, heads: int) -> Tensor:
            return rearrange(x, "b m (h d) -> b h m d", h=heads)

        sources = tuple(
            Source(split(to_k(tokens), heads), split(to_v(tokens), heads), scale)
            for heads, (to_k, to_v) in zip(self.heads, self.projections(), strict=True)
        )
        return replace(context, image=(*context.image, sources))
