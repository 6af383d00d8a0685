"""The VAE in strips: large feature maps wait in main memory, and a strip of rows at a time visits the device.

A tile that is decoded by itself has GroupNorms of its own, and its attention sees the tile alone, so its colours differ: with the mini VAE
by up to 80 grey levels, also after feathering. Here each layer runs over all strips before the next one starts. So every GroupNorm has the
statistics of the whole map, every convolution reads the rows beside its strip, and there are no seams: nothing differs but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.layers import Downsample, ResBlock, Upsample
from model.vae import VAE, Decoder, Encoder

AREA = 64 * 64  # latent positions up to which a map is computed whole: one picture of 512 x 512
STRIP = 1 << 24  # numbers in a strip, 64 MB in float32
Rows = Callable[..., Tensor]


def in_strips(vae: VAE) -> VAE:
    """Return a VAE with the same weights that encodes and decodes large pictures in strips.

    The device holds the weights, one strip (of STRIP numbers, and a few more rows) with its intermediate results, and the maps of the
    size of the latents, on which the middle of the network runs whole. Main memory holds up to three maps of the picture's size.
    """
    with torch.device("meta"):
        sparing = VAE(vae.config)
        sparing.encoder, sparing.decoder = StripEncoder(vae.config), StripDecoder(vae.config)
    sparing.load_state_dict(vae.state_dict(), assign=True)
    return sparing.eval().requires_grad_(False)


class StripEncoder(Encoder):
    """The encoder, which computes what comes before its middle in strips if the picture is large."""

    def forward(self, x: Tensor) -> Tensor:
        resamples = sum(isinstance(block, Downsample) for block in self.down)
        if x[:, 0].numel() <= AREA * 4**resamples:
            return super().forward(x)
        h, device = over_strips(self.conv_in, x.cpu(), to=x.device), x.device
        for block in self.down:
            h = block_in_strips(block, h, device)
        h = h.to(device)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class StripDecoder(Decoder):
    """The decoder, which computes what comes after its middle in strips if the latents are large. The picture is in main memory."""

    def forward(self, z: Tensor) -> Tensor:
        if z[:, 0].numel() <= AREA:
            return super().forward(z)
        h, device = self.conv_in(z), z.device
        for block in self.mid:
            h = block(h)
        h = h.cpu()
        for block in self.up:
            h = block_in_strips(block, h, device)
        act = norm_silu(self.norm_out, h, device)
        return over_strips(lambda rows: self.conv_out(act(rows)), h, to=device)


def block_in_strips(block: nn.Module, x: Tensor, to: torch.device) -> Tensor:
    """Apply a ResBlock without an embedding, a Downsample or an Upsample to a map in main memory. `to`: the device that computes."""
    if not isinstance(block, ResBlock):
        return over_strips(block, x, to=to, halo=2, factor=2 if isinstance(block, Upsample) else 0.5)
    first = norm_silu(block.norm1, x, to)
    h = over_strips(lambda rows: block.conv1(first(rows)), x, to=to)
    second = norm_silu(block.norm2, h, to)
    return over_strips(lambda rows, inner: block.skip(rows) + block.conv2(second(inner)), x, h, to=to)


def strips(x: Tensor, grows: float = 1) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the rows of each strip, whose size grows to STRIP numbers. Their number is even, so that it can be halved."""
    height, row = x.shape[-2], grows * x[..., 0, :].numel()
    rows = 2 * max(1, int(STRIP / (2 * row)))
    yield from ((first, min(first + rows, height)) for first in range(0, height, rows))


def over_strips(f: Rows, *maps: Tensor, to: torch.device, halo: int = 1, factor: float = 1) -> Tensor:
    """Apply `f` to maps `b c H W` of equal height, strip by strip, and return a map in main memory.

    `f` gives `factor` times the rows that it reads. It sees `halo` rows more on either side, an even number if `factor` is not 1, so
    that its zero padding is used only at the edges of the map.
    """
    out, height = torch.empty(0), maps[0].shape[-2]
    for first, end in strips(max(maps, key=torch.numel), max(1, factor**2)):
        top = max(0, first - halo)
        rows = f(*(each[..., top : end + halo, :].to(to) for each in maps))
        start, stop = int(first * factor), int(end * factor)
        if first == 0:
            out = rows.new_empty((*rows.shape[:2], int(height * factor), rows.shape[-1]), device="cpu")
        offset = int((first - top) * factor)
        out[..., start:stop, :] = rows[..., offset : offset + stop - start, :]
    return out


def norm_silu(norm: nn.GroupNorm, x: Tensor, to: torch.device) -> Rows:
    """Return silu(norm(.)) for rows of a map `b c H W`, with the mean and variance of the whole map.

    The variance of all strips is the mean of v_i + (m_i - m)^2, where m_i and v_i are the mean and variance of strip i, and m is the mean
    of all m_i. Both means have the sizes of the strips as weights.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for first, end in strips(x):
        rows = rearrange(x[..., first:end, :].to(to, kind), "b (g c) h w -> b g (c h w)", g=norm.num_groups)
        parts.append(torch.stack([*torch.var_mean(rows, dim=-1, correction=0), rows.new_full(rows.shape[:2], (end - first) / x.shape[-2])]))
    variances, means, weights = torch.stack(parts, dim=1)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(0)

    def per_channel(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)[..., None, None]

    scale = norm.weight.to(kind)[:, None, None] * per_channel((variance + norm.eps).rsqrt())
    shift = norm.bias.to(kind)[:, None, None] - per_channel(mean) * scale
    return lambda rows: F.silu((rows.to(kind) * scale + shift).to(x.dtype))
