"""From an image embedding to image tokens c_i."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class ImageProjection(nn.Module):
    """c_i = LayerNorm(W e + b) as N tokens (section 3.2.1): the trainable linear layer and norm of Figure 2."""

    def __init__(self, image_dim: int = 1024, context_dim: int = 768, tokens: int = 4) -> None:
        super().__init__()
        self.image_dim, self.context_dim, self.tokens = image_dim, context_dim, tokens
        self.proj = nn.Linear(image_dim, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """`b e` -> `b n c`. Raises ValueError when the embedding comes from another encoder."""
        if embedding.shape[-1] != self.image_dim:
            raise ValueError(
                f"this adapter reads image embeddings of width {self.image_dim}, but the image encoder gives "
                f"{embedding.shape[-1]}: use the encoder that it was trained with"
            )
        out: Tensor = self.norm(rearrange(self.proj(embedding), "b (n c) -> b n c", n=self.tokens))
        return out
