"""Which of two equal ways to compute a product is faster. tests/test_attention.py holds the two equal, gradients included."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2**16  # queries times keys


def fused_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's fused attention beats the equation as it is written.

    It does, except for small maps that a CPU trains through: there the backward pass of the fused kernel is slower.
    """
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return not trained or q.device.type != "cpu" or q.shape[-2] * k.shape[-2] > SMALL
