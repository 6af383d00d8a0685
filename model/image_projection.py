"""Projections from features to image tokens c_i: IP-Adapter, Plus and Full for fine-grained features (Figure 11), and FaceID."""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import attention
from model.features import FACE, FACE_AND_FINE, FACE_DIM, FINE, GLOBAL, RAW_FACE, Embedder

HEAD = 64  # width of each head of the Resampler; the shapes of the weights do not determine it


class Projection(nn.Module):
    """Maps the features of an image, `m` vectors `image_dim` wide, to tokens `context_dim` wide. `reads`: how to compute the features."""

    reads: ClassVar[Embedder]

    def __init__(self, image_dim: int, context_dim: int) -> None:
        super().__init__()
        self.image_dim, self.context_dim = image_dim, context_dim

    def forward(self, features: Tensor) -> Tensor:
        """`b m e` -> `b n c`."""
        raise NotImplementedError

    def check(self, features: Tensor) -> None:
        """Raise ValueError when the features are of the wrong kind or have the wrong width."""
        if not self.reads.accepts(features.shape[1]):
            raise ValueError(f"this adapter reads {self.reads.name}, {self.reads.per_picture} for each picture")
        if features.shape[-1] != self.image_dim:
            raise ValueError(
                f"this adapter reads {self.reads.name} of width {self.image_dim}, but the image encoder gives "
                f"{features.shape[-1]}: use the encoder that it was trained with"
            )


class ImageProjection(Projection):
    """IP-Adapter: c_i = LayerNorm(W e + b), split into N tokens (section 3.2.1), the trainable linear layer and norm of
    Figure 2.
    """

    reads = GLOBAL

    def __init__(self, image_dim: int = 1024, context_dim: int = 768, tokens: int = 4) -> None:
        super().__init__(image_dim, context_dim)
        self.tokens = tokens
        self.proj = nn.Linear(image_dim, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`b 1 e` -> `b n c`. Raises ValueError when `check` does."""
        self.check(features)
        return self.norm(rearrange(self.proj(features[:, 0]), "b (n c) -> b n c", n=self.tokens))


class MLPProjection(Projection):
    """IP-Adapter Full: c_i = LayerNorm(W_2 GELU(W_1 x + b_1) + b_2), one token for each token of the image encoder."""

    reads = FINE

    def __init__(self, image_dim: int = 1280, context_dim: int = 768) -> None:
        super().__init__(image_dim, context_dim)
        self.proj = nn.Sequential(
            nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, context_dim), nn.LayerNorm(context_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        """`b m e` -> `b m c`. Raises ValueError when `check` does."""
        self.check(features)
        return self.proj(features)


class Perceiver(nn.Module):
    """One layer of the Resampler: the queries z attend to the image features x and to one another.

    z <- z + W_o attention(W_q z', W_k [x'; z'], W_v [x'; z']), with x' = LayerNorm(x) and z' = LayerNorm(z);
    then z <- z + ff(z). The linear layers have no biases.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_x, self.norm_z = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the new z, `b n c`, from z, `b n c`, and x, `b m c`."""
        normed = self.norm_z(z)
        q = rearrange(self.to_q(normed), "b n (h d) -> b h n d", h=self.heads)
        kv = self.to_kv(torch.cat([self.norm_x(x), normed], dim=1))
        k, v = rearrange(kv, "b m (two h d) -> two b h m d", two=2, h=self.heads)
        z = z + self.to_out(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))
        return z + self.ff(z)


class Resampler(Projection):
    """IP-Adapter Plus: N learned queries attend to the fine features in `depth` layers, and become the tokens c_i."""

    reads: ClassVar[Embedder] = FINE

    def __init__(
        self,
        image_dim: int = 1280,
        context_dim: int = 768,
        tokens: int = 16,
        width: int = 768,
        depth: int = 4,
        heads: int = 12,
    ) -> None:
        super().__init__(image_dim, context_dim)
        self.tokens = tokens
        self.queries = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_in = nn.Linear(image_dim, width)
        self.layers = nn.ModuleList(Perceiver(width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`b m e` -> `b n c`. Raises ValueError when `check` does."""
        self.check(features)
        x, z = self.proj_in(features), self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            z = layer(z, x)
        return self.norm_out(self.proj_out(z))


class RawFaceResampler(Resampler):
    """FaceID Portrait, "unnorm", and InstantID: the Resampler of Plus over one vector, a face embedding that is not normalised."""

    reads = RAW_FACE


class FaceProjection(Projection):
    """FaceID: c_i = LayerNorm(W_2 GELU(W_1 f + b_1) + b_2) of a face embedding f, split into N tokens: 4, for Portrait 16."""

    reads: ClassVar[Embedder] = FACE

    def __init__(self, image_dim: int = FACE_DIM, context_dim: int = 768, tokens: int = 4, width: int = 1024) -> None:
        super().__init__(image_dim, context_dim)
        self.tokens = tokens
        self.proj = nn.Sequential(nn.Linear(image_dim, width), nn.GELU(), nn.Linear(width, tokens * context_dim))
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`b 1 f` -> `b n c`. Raises ValueError when `check` does."""
        self.check(features)
        return self.norm(rearrange(self.proj(features[:, 0]), "b (n c) -> b n c", n=self.tokens))


class FacePlus(FaceProjection):
    """FaceID Plus: the tokens x of FaceID are the queries of a Resampler over the fine features of the face's picture.

    c_i = resampler(x), and with `shortcut`, which is PlusV2, c_i = x + s resampler(x), where s is `structure_scale`: how much of the
    picture's face structure to add to the identity (the official `s_scale`).
    """

    reads = FACE_AND_FINE
    structure_scale = 1.0

    def __init__(
        self,
        image_dim: int = 1280,
        context_dim: int = 768,
        tokens: int = 4,
        width: int = 1024,
        face_dim: int = FACE_DIM,
        depth: int = 4,
        heads: int = 12,
        shortcut: bool = False,
    ) -> None:
        super().__init__(face_dim, context_dim, tokens, width)
        self.image_dim, self.face_dim, self.shortcut = image_dim, face_dim, shortcut
        self.proj_in = nn.Linear(image_dim, context_dim)
        self.layers = nn.ModuleList(Perceiver(context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(context_dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`b 1+m e`, the face in the first `face_dim` numbers of the first row -> `b n c`. Raises ValueError when `check` does."""
        self.check(features)
        face, fine = features[:, 0, : self.face_dim], self.proj_in(features[:, 1:])
        z = tokens = self.norm(rearrange(self.proj(face), "b (n c) -> b n c", n=self.tokens))
        for layer in self.layers:
            z = layer(z, fine)
        z = self.norm_out(self.proj_out(z))
        return tokens + self.structure_scale * z if self.shortcut else z
