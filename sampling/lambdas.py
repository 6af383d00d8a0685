"""lambda of Eq. 8 as data: how strongly an image prompt acts, by layer, by step and by region.

Nothing is stored on a module: a Lambda gives the scales of a Context, and for steps that differ a new Context with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor

from model.attention import check_sign
from model.context import Context, pyramid
from model.source import Source
from model.unet import UNetConfig
from sampling.request import Preset

Blocks = Mapping[str, Any]  # the dict of diffusers' `set_ip_adapter_scale`
Level = float | Tensor  # lambda of one layer, as Source has it
Move = Callable[[Context, int], Context]  # a Context to that of timestep t


@dataclass(frozen=True)
class Lambda:
    """lambda(i, l, p) = scale_i layers_l mask_p: in step i, cross-attention layer l, at place p of the picture (Eq. 8).

    `scale` is a number, or one for each step that runs. `layers` is what `layer_weights` reads. `mask`, `H W` in [0, 1], is
    where the image prompt acts, soft values allowed; it is stretched over the picture, and averaged over each query's area.

    Step i of the n that run (from 0) is on where all of it lies in the range: start <= i / n and (i + 1) / n <= end; else
    lambda is 0. So end = 0.5 of 10 steps is steps 0 to 4, start = 0.5 steps 5 to 9. That is the rule of the official SDXL
    pipeline and of diffusers' `control_guidance_start`, `control_guidance_end`. diffusers' `IPAdapterScaleCutoffCallback(r)`
    acts after step int(n r), which is thus still on: one step more, end = (int(n r) + 1) / n.
    Raises ValueError for a range or a mask that is none.
    """

    scale: float | tuple[float, ...] = 1.0
    layers: str | Blocks | Sequence[float] | None = None  # a string is a Preset
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"an image prompt acts from start to end, 0 <= start < end <= 1, not {self.start} to {self.end}"
            )
        if self.mask is not None and (self.mask.ndim != 2 or not 0 <= self.mask.min() <= self.mask.max() <= 1):
            raise ValueError(f"the mask of an image prompt is `H W` in [0, 1], not of shape {tuple(self.mask.shape)}")

    @property
    def still(self) -> bool:
        """Every step has the same lambda."""
        return isinstance(self.scale, int | float) and (self.start, self.end) == (0, 1)

    def at(self, step: int, steps: int) -> float:
        """The factor of `by_layer` in step `step` of `steps`."""
        if not isinstance(self.scale, int | float) and len(self.scale) != steps:
            raise ValueError(f"{len(self.scale)} values of lambda for {steps} steps: give one for each step that runs")
        if step / steps < self.start or (step + 1) / steps > self.end:
            return 0.0
        return 1.0 if isinstance(self.scale, int | float) else self.scale[step]

    def by_layer(self, config: UNetConfig, grid: tuple[int, int], weight: float = 1.0) -> list[Level]:
        """What all steps share, times `weight`, for each layer of a UNet whose latents are `grid`: numbers, with a mask maps."""
        scale = weight * (self.scale if isinstance(self.scale, int | float) else 1.0)
        weights = [scale * each for each in layer_weights(self.layers, config)]
        if self.mask is None:
            return list(weights)
        maps, depth = pyramid(self.mask, *grid, len(config.channels)), len(config.channels) - 1
        # the level of a layer: a block's own on the way down, counted backwards on the way up, the deepest in the middle
        blocks = [(part, int(block.removeprefix("block_") or 0)) for part, block, _ in places(config)]
        levels = [i if part == "down" else depth - i for part, i in blocks]
        return [each * maps[level] if each else 0.0 for each, level in zip(weights, levels, strict=True)]


def places(config: UNetConfig) -> list[tuple[str, str, int]]:
    """(part, block, attention) of each cross-attention layer in execution order, by diffusers' names: ("up", "block_1", 0)."""

    def side(part: str, depths: Sequence[int], attentions: int) -> list[tuple[str, str, int]]:
        return [(part, f"block_{i}", a) for i, n in enumerate(depths) for a in range(attentions) for _ in range(n)]

    down, up = side("down", config.depth, config.res_blocks), side("up", config.depth[::-1], config.res_blocks + 1)
    return [*down, *[("mid", "", 0)] * config.mid_depth, *up]


def preset(name: str, config: UNetConfig) -> Blocks:
    """Blocks that a picture acts in: InstantStyle's two (arXiv 2404.02733), of the deepest level with cross-attention, or the finest's.

    In SDXL, from the paper, the second attention alone: style is `up block_0 [0, 1, 0]`, layout `down block_2 [0, 1]`. For
    SD 1.5 the rule is InvokeAI's: style is all of `up block_1`, layout all of `down block_2` and the middle. Its layers in
    the same place of SD 2.1 and of the mini UNet (`up block_1`, and `down block_1` with the middle) are ours by analogy.
    "finest" is ours: all of the finest level with cross-attention, down and up, which in the mini world carries the colours.
    """
    levels = [level for level, depth in enumerate(config.depth) if depth]
    if name == "finest":
        return {"down": {f"block_{levels[0]}": 1.0}, "up": {f"block_{len(config.depth) - 1 - levels[0]}": 1.0}}
    deepest = levels[-1]
    down, up = f"block_{deepest}", f"block_{len(config.depth) - 1 - deepest}"
    if config.added_dim:  # SDXL
        return {"up": {up: [0.0, 1.0, 0.0]}} if name == "style" else {"down": {down: [0.0, 1.0]}}
    return {"up": {up: 1.0}} if name == "style" else {"down": {down: 1.0}, "mid": 1.0}


def layer_weights(layers: str | Blocks | Sequence[float] | None, config: UNetConfig) -> list[float]:
    """A weight for each cross-attention layer in execution order: all 1 for None, or a list of them, or by blocks.

    Blocks are as diffusers' `set_ip_adapter_scale` reads them: {"down" | "up": a number, or a list with one for each attention
    of every block, or {"block_i": either}, "mid": a number}. What is not named is 0. A preset is `preset`'s blocks.
    Raises ValueError when they do not fit this UNet.
    """
    found = places(config)
    if layers is None:
        return [1.0] * len(found)
    if isinstance(layers, str):
        if layers not in get_args(Preset):
            raise ValueError(f"layers are {', '.join(get_args(Preset))}, or weights in JSON, not {layers}")
        layers = preset(layers, config)
    if not isinstance(layers, Mapping):
        if len(layers) != len(found) or not all(isinstance(weight, int | float) for weight in layers):
            raise ValueError(
                f"this UNet has {len(found)} cross-attention layers: give one number for each, not {layers}"
            )
        return [float(weight) for weight in layers]
    _check(layers, found)
    weights = []
    for part, block, attention in found:
        weight = layers.get(part, 0.0)
        weight = weight.get(block, 0.0) if isinstance(weight, Mapping) else weight
        each = weight if isinstance(weight, list | tuple) else [weight]
        attentions = 1 + max(a for p, b, a in found if (p, b) == (part, block))
        if len(each) not in (1, attentions) or not all(isinstance(weight, int | float) for weight in each):
            raise ValueError(f"{part} {block} has {attentions} attentions: give it a number or that many, not {weight}")
        weights.append(float(each[attention if len(each) > 1 else 0]))
    return weights


def _check(blocks: Blocks, found: Sequence[tuple[str, str, int]]) -> None:
    """Raises ValueError for names of blocks that this UNet does not have. (diffusers ignores some.)"""
    for part, value in blocks.items():
        known = {block for p, block, _ in found if p == part}
        strange = set(value) - known if isinstance(value, Mapping) else set()
        if not known or strange:
            named = part if not known else f"{part} {min(strange)}"
            raise ValueError(f"this UNet has no cross-attention in {named}: it has {sorted({p[:2] for p in found})}")


def unmoved(context: Context, t: int) -> Context:
    """Every timestep reads the same Context."""
    return context


def moving(lambdas: Sequence[object], times: Sequence[int]) -> Move:
    """The Context of each timestep of `times`: lambda of each image prompt, times `Lambda.at` of its own of `lambdas`.

    A factor that varies is a tensor, also where it is 0 or 1, so a compiled UNet is one graph for all of them.
    """
    step = {t: i for i, t in enumerate(times)}
    varying = [lam if isinstance(lam, Lambda) and not lam.still else None for lam in lambdas]

    def move(context: Context, t: int) -> Context:
        factors = [None if lam is None else lam.at(step[t], len(times)) for lam in varying]
        for factor in factors:
            check_sign(context.fuse, factor or 0.0)
        pairs = zip(context.image, factors, strict=True)
        return replace(context, image=tuple(_times(sources, factor) for sources, factor in pairs))

    return move if any(varying) else unmoved


def set_lambda(context: Context, levels: Sequence[Level]) -> Context:
    """Set the lambda of each layer for the last image prompt of a Context, maps on its device.

    Raises ValueError unless there is one for each layer, and when `fuse` can't take one.
    """
    *others, last = context.image
    if len(levels) != len(last):
        raise ValueError(f"{len(levels)} scales for {len(last)} cross-attention layers")
    for level in levels:
        check_sign(context.fuse, level)
    placed = [scale.to(last[0].k) if isinstance(scale, Tensor) else scale for scale in levels]
    sources = tuple(replace(source, scale=scale) for source, scale in zip(last, placed, strict=True))
    return replace(context, image=(*others, sources))


def as_tensors(context: Context) -> Context:
    """The same Context with each lambda as a tensor, 0 and 1 too, so a compiled UNet is one graph for all of them."""

    def scaled(source: Source) -> Source:
        scale = source.scale
        return source if isinstance(scale, Tensor) else replace(source, scale=source.k.new_full((), scale))

    return replace(context, image=tuple(tuple(map(scaled, sources)) for sources in context.image))


def _times(sources: tuple[Source, ...], factor: float | None) -> tuple[Source, ...]:
    if factor is None:
        return sources

    def scaled(source: Source) -> Tensor:
        number = source.k.new_full((), factor)
        return number * (source.scale.to(number) if isinstance(source.scale, Tensor) else source.scale)

    return tuple(source if source.off else replace(source, scale=scaled(source)) for source in sources)
