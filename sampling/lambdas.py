"""lambda of Eq. 8 as data: the strength of an image prompt for each layer, step and region.

Lambda is not stored in the modules. It sets the scales of a Context; if it varies over steps, each step gets its own Context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from torch import Tensor

from model.attention import check_sign
from model.context import Context, pyramid
from model.source import Source
from model.unet import UNetConfig
from sampling.fields import inside
from sampling.layer_weights import Blocks, attention_layers, layer_weights

LayerLambda = float | Tensor  # lambda of one layer (`Source.scale`)
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
            raise ValueError(f"start and end of an image prompt must satisfy 0 <= start < end <= 1, not {self.start} and {self.end}")
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
        if not inside(step, steps, self.start, self.end):
            return 0.0
        return 1.0 if isinstance(self.scale, int | float) else self.scale[step]

    def by_layer(self, config: UNetConfig, grid: tuple[int, int], weight: float = 1.0) -> list[LayerLambda]:
        """Return the part of lambda that is the same in all steps, times `weight`, for each layer of a UNet.

        `grid`: (h, w) of the latents. The entries are numbers, or maps if there is a mask.
        """
        scale = weight * (self.scale if isinstance(self.scale, int | float) else 1.0)
        weights = [scale * each for each in layer_weights(self.layers, config)]
        if self.mask is None:
            return list(weights)
        maps, depth = pyramid(self.mask, *grid, len(config.channels)), len(config.channels) - 1
        # the level of a layer: down blocks count from the finest level, up blocks from the deepest; the middle is the deepest
        blocks = [(part, int(block.removeprefix("block_") or 0)) for part, block, _ in attention_layers(config)]
        levels = [i if part == "down" else depth - i for part, i in blocks]
        return [each * maps[level] if each else 0.0 for each, level in zip(weights, levels, strict=True)]


def keep_context(context: Context, t: float) -> Context:
    """Return the same Context for every timestep."""
    return context


def step_at(times: Sequence[float]) -> Callable[[float], int]:
    """Return a function from a timestep to the index of its step, to be called once in each step.

    DPM-Solver++ with Karras spacing visits some timesteps twice. Steps with the same timestep take turns.
    """
    steps: dict[float, list[int]] = {}
    for i, t in enumerate(times):
        steps.setdefault(t, []).append(i)
    turns = {t: cycle(each) for t, each in steps.items()}
    return lambda t: next(turns[t])


def moving(lambdas: Sequence[object], times: Sequence[float]) -> Move:
    """Return a function that computes the Context of a timestep. It multiplies lambda of image prompt i by `lambdas[i].at`.

    `times`: the timesteps of all steps, in order; call the function once in each. Factors that vary over steps are always tensors,
    even if they are 0 or 1, so that a compiled UNet needs only one graph.
    """
    step_of = step_at(times)
    varying = [lam if isinstance(lam, Lambda) and not lam.still else None for lam in lambdas]

    def move(context: Context, t: float) -> Context:
        step = step_of(t)
        factors = [None if lam is None else lam.at(step, len(times)) for lam in varying]
        for factor in factors:
            check_sign(context.fuse, factor or 0.0)
        pairs = zip(context.image, factors, strict=True)
        return replace(context, image=tuple(_times(sources, factor) for sources, factor in pairs))

    return move if any(varying) else keep_context


def set_lambda(context: Context, lambdas: Sequence[LayerLambda]) -> Context:
    """Set the lambda of each layer for the last image prompt of a Context; maps move to its device.

    Raises ValueError unless there is one per layer, or if `fuse` cannot use one of them.
    """
    *others, last = context.image
    if len(lambdas) != len(last):
        raise ValueError(f"{len(lambdas)} scales for {len(last)} cross-attention layers")
    for scale in lambdas:
        check_sign(context.fuse, scale)
    scales = [scale.to(last[0].k) if isinstance(scale, Tensor) else scale for scale in lambdas]
    sources = tuple(replace(source, scale=scale) for source, scale in zip(last, scales, strict=True))
    return replace(context, image=(*others, sources))


def as_tensors(context: Context) -> Context:
    """Convert each lambda of a Context to a tensor, even 0 and 1, so that a compiled UNet needs only one graph."""

    def rescale(source: Source) -> Source:
        scale = source.scale
        return source if isinstance(scale, Tensor) else replace(source, scale=source.k.new_full((), scale))

    return replace(context, image=tuple(tuple(map(rescale, sources)) for sources in context.image))


def _times(sources: tuple[Source, ...], factor: float | None) -> tuple[Source, ...]:
    if factor is None:
        return sources

    def rescale(source: Source) -> Tensor:
        number = source.k.new_full((), factor)
        return number * (source.scale.to(number) if isinstance(source.scale, Tensor) else source.scale)

    return tuple(source if source.off else replace(source, scale=rescale(source)) for source in sources)
