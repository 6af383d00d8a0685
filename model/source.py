"""A source of cross-attention: keys and values, and lambda."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """Keys and values for cross-attention to read, and their weight lambda.

    `k`, `v`: `b h m d`. `scale` is lambda of Eq. 8: a number, or a tensor that broadcasts to `b h n d`, such as one
    value per sample, `b 1 1 1`, or a mask at this layer's resolution, `b 1 n 1`.
    """

    k: Tensor
    v: Tensor
    scale: float | Tensor = 1.0

    @property
    def off(self) -> bool:
        """Whether lambda is the number 0, so the source can be skipped."""
        return isinstance(self.scale, int | float) and self.scale == 0

    def weight(self, q: Tensor) -> float | Tensor:
        """Return lambda in the dtype and on the device of the queries `q`.

        Raises ValueError when it does not broadcast to them.
        """
        if not isinstance(self.scale, Tensor):
            return self.scale
        if self.scale.ndim not in (0, 4) or (self.scale.ndim == 4 and self.scale.shape[2] not in (1, q.shape[2])):
            raise ValueError(
                f"lambda of shape {tuple(self.scale.shape)} does not broadcast to {tuple(q.shape)}: pass one value per sample as "
                "`b 1 1 1`, and make a mask for the latents' true (h, w)"
            )
        return self.scale.to(q)
