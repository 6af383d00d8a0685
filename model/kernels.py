"""Fast kernels: for attention and, for inference on a CPU, for convolutions and matrix products (used by model/fast.py).

tests/test_attention.py and tests/test_fast.py check that the results agree with the equations as written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SMALL = 2**16  # number of query-key pairs up to which the plain kernel trains faster on a CPU
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}  # the points of F(2x2) and F(4x4), besides infinity
STRIP = 64  # number of tiles that are transformed at a time, so that they stay in the cache


def fused_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether PyTorch's fused attention is faster than the equation as written.

    It is, except when a CPU trains through a small attention map: the fused kernel's backward pass is slower there.
    """
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return not training or q.device.type != "cpu" or q.shape[-2] * k.shape[-2] > SMALL


def cook_toom(points: Sequence[float], r: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the matrices A^T `m n`, G `n r` and B^T `n n` of F(m, r), in float64.

    F(m, r) computes m outputs of a filter with r taps from n = m + r - 1 products (Eq. 6 of arXiv 1509.09308):

    Y = A^T [(G g) * (B^T d)]

    The matrices follow from n - 1 `points` a_i and the point at infinity, which is the last row or column (Cook-Toom):

    A^T_ji = a_i^j,   G_ij = a_i^j / prod_{k != i} (a_i - a_k),   B^T_i = the coefficients of prod_{k != i} (x - a_k).
    """
    a = np.array(points)
    n, m = len(a) + 1, len(a) + 2 - r
    powers, infinity = np.vander(a, n, increasing=True), np.eye(n)[-1:]
    scale = np.prod(a[:, None] - a + np.eye(n - 1), axis=1, keepdims=True)
    products = [np.append(np.poly(np.delete(a, i))[::-1], 0) for i in range(n - 1)]
    at = np.concatenate([powers[:, :m], infinity[:, -m:]]).T
    g = np.concatenate([powers[:, :r] / scale, infinity[:, -r:]])
    bt = np.stack([*products, np.poly(a)[::-1]])
    return torch.tensor(at.copy()), torch.tensor(g), torch.tensor(bt)


class Winograd(nn.Module):
    """A 3x3 convolution by F(m x m, 3 x 3) (Lavin and Gray, arXiv 1509.09308, Eq. 8, summed over channels as in Eq. 12):

    Y = A^T [sum_c (G g G^T) * (B^T d B)] A

    for each tile d of n x n = (m + 2) x (m + 2) inputs, which gives m x m outputs. Written as a vector, B^T d B is kron(B^T, B^T) d, with
    the Kronecker product, so both transforms are matrix products, and the sum over channels is one matrix product for each of the n^2
    products. G g G^T is computed once, in float64. The weights take n^2 / 9 of their memory: 1.8 for m = 2, and 4 for m = 4.
    """

    def __init__(self, conv: nn.Conv2d, m: int) -> None:
        super().__init__()
        (at, g, bt), weight = cook_toom(POINTS[m]), conv.weight.detach()
        assert conv.bias is not None
        self.m, self.out_channels, self.bias = m, conv.out_channels, conv.bias.detach()
        self.at, self.bt = (torch.kron(matrix, matrix).to(weight.dtype) for matrix in (at, bt))
        taps = rearrange(weight, "o c y x -> (y x) (c o)").double()
        products = torch.kron(g, g) @ taps
        self.weight = products.view(-1, conv.in_channels, conv.out_channels).to(weight.dtype)  # n^2 c o

    def forward(self, x: Tensor) -> Tensor:
        m, n = self.m, self.m + 2
        b, _, h, w = x.shape
        rows, columns = -(-h // m), -(-w // m)  # of tiles
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, columns * m + 1 - w, 1, rows * m + 1 - h))
        tiles = x.unfold(1, n, m).unfold(2, n, m).permute(4, 5, 0, 1, 2, 3)  # n n b rows columns c
        y = x.new_empty(b, rows * m, columns * m, self.out_channels)
        out = y.view(b, rows, m, columns, m, -1).permute(2, 4, 0, 1, 3, 5)  # m m b rows columns o
        for i, j in _strips(b, rows, columns):
            torch.add(self.outputs(tiles[:, :, i, j]), self.bias, out=out[:, :, i, j])
        return y[:, :h, :w].permute(0, 3, 1, 2)

    def outputs(self, tiles: Tensor) -> Tensor:
        """Map the inputs of tiles, `n n ... c`, to their outputs, `m m ... o`, without the bias."""
        products, channels, _ = self.weight.shape
        inputs = torch.mm(self.bt, tiles.reshape(products, -1)).view(products, -1, channels)
        sums = torch.bmm(inputs, self.weight).view(products, -1)
        return torch.mm(self.at, sums).view(self.m, self.m, *tiles.shape[2:-1], -1)


def _strips(b: int, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """Divide `b` pictures of `rows` x `columns` tiles into strips (pictures, rows) of about STRIP tiles; keep small pictures whole."""
    if rows * columns <= STRIP:
        return [(slice(0, b), slice(0, rows))]
    step = max(1, STRIP // columns)
    return [(slice(i, i + 1), slice(j, j + step)) for i in range(b) for j in range(0, rows, step)]


def packs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN is available and multiplies packed weights of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """x W^T + b, fused with one more operation. The layout of W is optimised for an x of `rows` rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.packed = packs(weight.dtype)
        weight = weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """x W^T + b, plus another tensor of the same shape."""
        if self.packed and plus is not None:
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, self.bias, "add"))
        if self.packed:
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))
        y = F.linear(x, self.weight, self.bias)
        return y if plus is None else plus + y

    def gelu(self, x: Tensor) -> Tensor:
        """gelu(x W^T + b), exact."""
        if self.packed:
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none"))
        return F.gelu(F.linear(x, self.weight, self.bias))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """(x W^T + b) * factor."""
        if self.packed:
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul"))
        return F.linear(x, self.weight, self.bias) * factor


class Pointwise(PackedLinear):
    """A 1x1 convolution as a matrix product."""

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous(), plus).permute(0, 3, 1, 2)


class PackedConv(nn.Module):
    """A convolution with weights in oneDNN's own layout, optimised for inputs of `side` x `side`."""

    def __init__(self, conv: nn.Conv2d, side: int) -> None:
        super().__init__()
        assert conv.bias is not None and not isinstance(conv.padding, str)
        self.settings = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        size = [2, conv.in_channels, side, side]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.settings, size)
        self.bias = conv.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.settings, "none", [], ""))
