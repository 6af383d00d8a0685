"""Choose the faster of two equivalent attention kernels. tests/test_attention.py checks that their outputs and
gradients agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2**16  # number of query-key pairs up to which the plain kernel trains faster on a CPU


def fused_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's fused attention is faster than the equation as written.

    It is, except when a CPU trains through a small attention map: the fused kernel's backward pass is slower there.
    """
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return not trained or q.device.type != "cpu" or q.shape[-2] * k.shape[-2] > SMALL
