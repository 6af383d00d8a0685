"""Weights of the cross-attention layers: presets, and diffusers' names of the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from model.unet import UNetConfig
from sampling.fields import Preset

Blocks = Mapping[str, Any]  # the dict of diffusers' `set_ip_adapter_scale`


def attention_layers(config: UNetConfig) -> list[tuple[str, str, int]]:
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
    attentions = attention_layers(config)
    if layers is None:
        return [1.0] * len(attentions)
    if isinstance(layers, str):
        if layers not in get_args(Preset):
            raise ValueError(f"layers must be {', '.join(get_args(Preset))}, or weights in JSON, not {layers}")
        layers = preset(layers, config)
    if not isinstance(layers, Mapping):
        if len(layers) != len(attentions) or not all(isinstance(weight, int | float) for weight in layers):
            raise ValueError(f"this UNet has {len(attentions)} cross-attention layers: give one number per layer, not {layers}")
        return [float(weight) for weight in layers]
    _check(layers, attentions)
    weights = []
    for part, block, attention in attentions:
        weight = layers.get(part, 0.0)
        weight = weight.get(block, 0.0) if isinstance(weight, Mapping) else weight
        each = weight if isinstance(weight, list | tuple) else [weight]
        count = 1 + max(a for p, b, a in attentions if (p, b) == (part, block))
        if len(each) not in (1, count) or not all(isinstance(weight, int | float) for weight in each):
            raise ValueError(f"{part} {block} has {count} attentions: give one number, or a list of {count}, not {weight}")
        weights.append(float(each[attention if len(each) > 1 else 0]))
    return weights


def _check(blocks: Blocks, attentions: Sequence[tuple[str, str, int]]) -> None:
    """Raise ValueError if a named block does not exist in this UNet. (diffusers ignores some of these names.)"""
    for part, value in blocks.items():
        names = {block for p, block, _ in attentions if p == part}
        unknown = set(value) - names if isinstance(value, Mapping) else set()
        if not names or unknown:
            place = part if not names else f"{part} {min(unknown)}"
            places = sorted({f"{p} {block}".strip() for p, block, _ in attentions})
            raise ValueError(f"this UNet has no cross-attention in {place}, only in {', '.join(places)}")
