"""Context: what a UNet is conditioned on (text, image prompts, SDXL's added vector), in one immutable value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model.attention import Fuse, decoupled
from model.source import Source


@dataclass(frozen=True)
class Context:
    """Everything that a UNet is conditioned on besides the timestep.

    `text`: text tokens c_t, `b m c`. `image`: for each image prompt, one Source per cross-attention layer, in execution
    order. `fuse`: how cross-attention combines text and image prompts. `added`: the vector that SDXL embeds and adds to
    the timestep embedding, made of the pooled text and the image sizes, `b a`.

    An adapter maps a Context to a new Context, so adapters can be chained and no state is stored on a module.
    """

    text: Tensor
    image: tuple[tuple[Source, ...], ...] = ()
    fuse: Fuse = decoupled
    added: Tensor | None = None

    def at(self, layer: int) -> tuple[Source, ...]:
        """Return the image sources of one cross-attention layer."""
        return tuple(prompt[layer] for prompt in self.image)


def _cat_scale(a: Source, b: Source) -> float | Tensor:
    """lambda for the rows of `a` followed by those of `b`; a plain number when both have the same."""
    if isinstance(a.scale, int | float) and isinstance(b.scale, int | float) and a.scale == b.scale:
        return a.scale
    both = [torch.as_tensor(source.scale, dtype=source.k.dtype, device=source.k.device) for source in (a, b)]
    top, bottom = (scale if scale.ndim else scale.reshape(1, 1, 1, 1) for scale in both)
    shape = torch.broadcast_shapes(top.shape[1:], bottom.shape[1:])
    return torch.cat([top.expand(len(a.k), *shape), bottom.expand(len(b.k), *shape)])


def stack(uncond: Context, cond: Context) -> Context:
    """Build one Context for a classifier-free guidance batch: the rows of `uncond`, then those of `cond`.

    Raises ValueError unless both have the same number of image prompts and the same `fuse`, and either both or neither
    have `added`.
    """
    if len(uncond.image) != len(cond.image):
        raise ValueError(
            f"one side has {len(uncond.image)} image prompts, the other {len(cond.image)}: add the null image, or an image prompt "
            "with scale 0, to the side with fewer"
        )
    if uncond.fuse is not cond.fuse:
        raise ValueError("the two sides combine text and image prompts differently: give both the same `fuse`")
    if (uncond.added is None) != (cond.added is None):
        raise ValueError("only one side has the added conditioning vector: give it to both")
    image = tuple(
        tuple(Source(torch.cat([a.k, b.k]), torch.cat([a.v, b.v]), _cat_scale(a, b)) for a, b in zip(u, c, strict=True))
        for u, c in zip(uncond.image, cond.image, strict=True)
    )
    added = None if uncond.added is None or cond.added is None else torch.cat([uncond.added, cond.added])
    return replace(cond, text=torch.cat([uncond.text, cond.text]), image=image, added=added)


def rows(context: Context, part: slice) -> Context:
    """Return some rows of a Context that has no image prompts."""
    return replace(context, text=context.text[part], added=None if context.added is None else context.added[part])


def pyramid(mask: Tensor, h: int, w: int, levels: int = 4) -> list[Tensor]:
    """Resample a mask to lambda, `b 1 n 1`, for each level of a UNet with latents of size `h x w`, finest level first.

    `mask`: `H W` or `b H W`. Its values are lambda: 0 turns the image prompt off, and fractions are allowed. Each query
    gets the mean of the mask over its area. Each level is half the size of the one before, rounded up as in the UNet's
    strided convolutions, so the grids match at any size.
    """
    mask, maps = (mask if mask.ndim == 3 else mask[None])[:, None], []
    for _ in range(levels):
        area = F.interpolate(mask if mask.is_floating_point() else mask.float(), (h, w), mode="area")
        maps.append(rearrange(area, "b 1 h w -> b 1 (h w) 1"))
        h, w = (h + 1) // 2, (w + 1) // 2
    return maps
