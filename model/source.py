"""A source of cross-attention: keys and values, and lambda."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """Keys and values for cross-attention to read, and their weight lambda.

    `k`, `v`: `b h m d`. `scale` is lambda of Eq. 8: a number, or a tensor that broadcasts to `b h n 1`, such as one
    value per sample, `b 1 1 1`, or a mask at this layer's resolution, `b 1 n 1`.
    """

    k: Tensor
    v: Tensor
    scale: float | Tensor = 1.0

    @property
    def off(self) -> bool:
        """Whether lambda is the number 0, so the source can be skipped."""
        return isinstance(self.scale, int | float) and self.scale == 0

    def scale_for(self, q: Tensor) -> float | Tensor:
        """Return lambda in the dtype and on the device of the queries `q`.

        Raises ValueError when it does not broadcast to their `b h n`.
        """
        if not isinstance(self.scale, Tensor):
            return self.scale
        shape, full = tuple(self.scale.shape), (*q.shape[:3], 1)
        if len(shape) not in (0, 4) or any(side not in (1, length) for side, length in zip(shape, full, strict=False)):
            raise ValueError(
                f"lambda of shape {shape} does not broadcast to {full}: pass one value per sample as `b 1 1 1`, and make a mask for the "
                "latents' true (h, w)"
            )
        return self.scale.to(q)

    def log_scales(self, q: Tensor) -> Tensor:
        """Return log lambda for each key, `b h n m`, in the dtype and on the device of `q`. Axes `b`, `h` and `n` may have length 1."""
        scale = self.scale_for(q)
        log = scale.log() if isinstance(scale, Tensor) else q.new_full((), math.log(scale) if scale else -math.inf)
        log = log if log.ndim else log.reshape(1, 1, 1, 1)
        return log.expand(*log.shape[:-1], self.k.shape[-2])
