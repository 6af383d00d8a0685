"""lambda of Eq. 8 as data: the strength of an image prompt for each layer, step and region.

Lambda is not stored in the modules. It sets the scales of a Context; if it varies over steps, each step gets its own Context.
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
Level = float | Tensor  # lambda of one layer (`Source.scale`)
Move = Callable[[Context, float], Context]  # (context, t) -> the Context of timestep t


@dataclass(frozen=True)
class Lambda:
    """lambda(i, l, p) = scale_i layers_l mask_p, for step i, cross-attention layer l and position p in the picture (Eq. 8).

    `scale`: a number, or one number per step that runs. `layers`: see `layer_weights`. `mask`: the strength at each position,
    `H W` in [0, 1]; it is stretched to the size of the picture and averaged over the area of each query.

    Lambda is 0 outside the range [start, end]. Step i of n (i from 0) is inside if start <= i / n and (i + 1) / n <= end. For
    example, with 10 steps, end = 0.5 keeps steps 0 to 4, and start = 0.5 keeps steps 5 to 9. The official SDXL pipeline and
    diffusers' `control_guidance_start`, `control_guidance_end` use the same rule. diffusers' `IPAdapterScaleCutoffCallback(r)`
    keeps one step more, because it runs after step int(n r); this corresponds to end = (int(n r) + 1) / n.

    Raises ValueError if the range or the mask is invalid.
    """

    scale: float | tuple[float, ...] = 1.0
    layers: str | Blocks | Sequence[float] | None = None  # a string is a Preset
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start and end of an image prompt must satisfy 0 <= start < end <= 1, not {self.start} and {self.end}"
            )
        if self.mask is not None and (self.mask.ndim != 2 or not 0 <= self.mask.min() <= self.mask.max() <= 1):
            raise ValueError(f"the mask of an image prompt must be `H W` in [0, 1]; its shape is {tuple(self.mask.shape)}")

    @property
    def still(self) -> bool:
        """Whether lambda is the same in every step."""
        return isinstance(self.scale, int | float) and (self.start, self.end) == (0, 1)

    def at(self, step: int, steps: int) -> float:
        """Return the factor that multiplies `by_layer` in step `step` of `steps`."""
        if not isinstance(self.scale, int | float) and len(self.scale) != steps:
            raise ValueError(f"{len(self.scale)} values of lambda for {steps} steps: give one value per step that runs")
        if step / steps < self.start or (step + 1) / steps > self.end:
            return 0.0
        return 1.0 if isinstance(self.scale, int | float) else self.scale[step]

    def by_layer(self, config: UNetConfig, grid: tuple[int, int], weight: float = 1.0) -> list[Level]:
        """Return the part of lambda that is the same in all steps, times `weight`, for each layer of a UNet.

        `grid`: (h, w) of the latents. The entries are numbers, or maps if there is a mask.
        """
        scale = weight * (self.scale if isinstance(self.scale, int | float) else 1.0)
        weights = [scale * each for each in layer_weights(self.layers, config)]
        if self.mask is None:
            return list(weights)
        maps, depth = pyramid(self.mask, *grid, len(config.channels)), len(config.channels) - 1
        # the level of a layer: down blocks count from the finest level, up blocks from the deepest; the middle is the deepest
        blocks = [(part, int(block.removeprefix("block_") or 0)) for part, block, _ in places(config)]
        levels = [i if part == "down" else depth - i for part, i in blocks]
        return [each * maps[level] if each else 0.0 for each, level in zip(weights, levels, strict=True)]


def places(config: UNetConfig) -> list[tuple[str, str, int]]:
    """List (part, block, attention) of each cross-attention layer in execution order, with diffusers' names: ("up", "block_1", 0)."""

    def side(part: str, depths: Sequence[int], attentions: int) -> list[tuple[str, str, int]]:
        return [(part, f"block_{i}", a) for i, n in enumerate(depths) for a in range(attentions) for _ in range(n)]

    down, up = side("down", config.depth, config.res_blocks), side("up", config.depth[::-1], config.res_blocks + 1)
    return [*down, *[("mid", "", 0)] * config.mid_depth, *up]


def preset(name: str, config: UNetConfig) -> Blocks:
    """Return the blocks of a preset: "style" or "layout" of InstantStyle (arXiv 2404.02733), or "finest". Other blocks get 0.

    InstantStyle uses the deepest level with cross-attention. SDXL, as in the paper, uses only the second attention of a block:
    style is `up block_0 [0, 1, 0]`, layout is `down block_2 [0, 1]`. SD 1.5 follows InvokeAI: style is all of `up block_1`,
    layout is all of `down block_2` and the middle. We extend this rule to SD 2.1 and to the mini UNet, whose layout block is
    `down block_1`. "finest" is our own preset: the finest level with cross-attention, down and up. In the mini world, it
    carries the colours.
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
    """Return the weight of each cross-attention layer, in execution order.

    `layers`: None (all weights are 1), one number per layer, the name of a `preset`, or a dict in the format of diffusers'
    `set_ip_adapter_scale`: {"down" | "up": x or {"block_i": x}, "mid": x}, where x is a number, or a list with one number per
    attention of a block. Blocks that are not named get 0. Raises ValueError if `layers` does not fit this UNet.
    """
    found = places(config)
    if layers is None:
        return [1.0] * len(found)
    if isinstance(layers, str):
        if layers not in get_args(Preset):
            raise ValueError(f"layers must be {', '.join(get_args(Preset))}, or weights in JSON, not {layers}")
        layers = preset(layers, config)
    if not isinstance(layers, Mapping):
        if len(layers) != len(found) or not all(isinstance(weight, int | float) for weight in layers):
            raise ValueError(
                f"this UNet has {len(found)} cross-attention layers: give one number per layer, not {layers}"
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
            raise ValueError(f"{part} {block} has {attentions} attentions: give one number, or a list of {attentions}, not {weight}")
        weights.append(float(each[attention if len(each) > 1 else 0]))
    return weights


def _check(blocks: Blocks, found: Sequence[tuple[str, str, int]]) -> None:
    """Raise ValueError if a named block does not exist in this UNet. (diffusers ignores some of these names.)"""
    for part, value in blocks.items():
        known = {block for p, block, _ in found if p == part}
        strange = set(value) - known if isinstance(value, Mapping) else set()
        if not known or strange:
            named = part if not known else f"{part} {min(strange)}"
            raise ValueError(f"this UNet has no cross-attention in {named}, only in {sorted({p[:2] for p in found})}")


def unmoved(context: Context, t: float) -> Context:
    """Return the same Context for every timestep."""
    return context


def moving(lambdas: Sequence[object], times: Sequence[float]) -> Move:
    """Return a function that computes the Context of a timestep. It multiplies lambda of image prompt i by `lambdas[i].at`.

    `times`: the timesteps of all steps, in order. Factors that vary over steps are always tensors, even if they are 0 or 1, so
    that a compiled UNet needs only one graph.
    """
    step = {t: i for i, t in enumerate(times)}
    varying = [lam if isinstance(lam, Lambda) and not lam.still else None for lam in lambdas]

    def move(context: Context, t: float) -> Context:
        factors = [None if lam is None else lam.at(step[t], len(times)) for lam in varying]
        for factor in factors:
            check_sign(context.fuse, factor or 0.0)
        pairs = zip(context.image, factors, strict=True)
        return replace(context, image=tuple(_times(sources, factor) for sources, factor in pairs))

    return move if any(varying) else unmoved


def set_lambda(context: Context, levels: Sequence[Level]) -> Context:
    """Set the lambda of each layer for the last image prompt of a Context; maps move to its device.

    Raises ValueError unless there is one per layer, or if `fuse` cannot use one of them.
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
