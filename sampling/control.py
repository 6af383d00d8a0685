"""Structure control while drawing: ControlNets and T2I-Adapters with their hints, bound to the passes of the UNet.

A ControlNet reads the text and never an image prompt, so it gets a Context of its own. The residuals of several controls
are added. In guess mode a ControlNet acts on the conditional pass alone, and more weakly at the fine levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoints.controls import Control as Network
from model.context import Context
from model.controlnet import ControlNet
from model.t2i import T2IAdapter, residuals
from model.unet import Residuals, UNetConfig
from sampling.fields import inside
from sampling.guidance import Control, Side
from sampling.lambdas import step_at

Act = Callable[[Tensor, float, Side], Residuals]


@dataclass(frozen=True)
class Hint:
    """The hint of one control, and how strongly and when the control acts.

    `picture`: a Pillow picture of any size, or `1 c H W` or `b c H W` in [0, 1]. `scale` multiplies all residuals. Of the n
    steps that run, the control acts in step i (from 0) where start <= i / n and (i + 1) / n <= end, as in diffusers.
    `guess`: guess mode. Raises ValueError unless 0 <= start < end <= 1.
    """

    picture: Image.Image | Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start and end of a control must satisfy 0 <= start < end <= 1, not {self.start} to {self.end}")

    def acts(self, step: int, steps: int) -> bool:
        """Return whether the control acts in step `step` of `steps`."""
        return inside(step, steps, self.start, self.end)

    def check(self, network: Network) -> None:
        """Raise ValueError if the hint asks for guess mode of a T2I-Adapter."""
        if self.guess and isinstance(network, T2IAdapter):
            raise ValueError("guess mode is for a ControlNet: leave out --guess for a T2I-Adapter")

    def pixels(self, network: Network, size: tuple[int, int]) -> Tensor:
        """Convert the hint to the network's input, `b c H W` in [0, 1]. A picture is resized to `size` (height, width).

        Raises ValueError when a tensor has another size or number of channels.
        """
        channels, like = network.config.hint_channels, next(network.parameters())
        if isinstance(self.picture, Image.Image):
            return to_pixels(self.picture, channels, size).to(like)
        if tuple(self.picture.shape[1:]) != (channels, *size):
            expected = f"b {channels} {size[0]} {size[1]}"
            raise ValueError(f"this control reads hints of shape {expected}, but one of {tuple(self.picture.shape)} is given")
        return self.picture.to(like)


def to_pixels(picture: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    """Convert a picture to `1 c H W` in [0, 1]: to grey or RGB, then resized with a Lanczos filter, as in diffusers."""
    height, width = size
    small = picture.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.atleast_3d(np.asarray(small, dtype=np.float32)) / 255).permute(2, 0, 1)[None]


def ladder(count: int) -> list[float]:
    """Return the weights of guess mode, finest level first and the middle last: 10^(i / (n - 1) - 1), from 0.1 to 1.

    This is diffusers' rule. The official code uses 0.825^(n - 1 - i), which is up to 0.6 % lower.
    """
    return [10 ** (i / (count - 1) - 1) for i in range(count)]


def scale_residuals(residuals: Residuals, weights: Sequence[float]) -> Residuals:
    """Multiply the residuals of a ControlNet by `weights`: one for each skip, and the last for the middle."""
    assert residuals.mid is not None
    return Residuals([w * skip for w, skip in zip(weights, residuals.skips, strict=False)], weights[-1] * residuals.mid)


def total(parts: Sequence[Residuals]) -> Residuals:
    """Add the residuals of several controls. Each may lack any of the three kinds."""
    skips = [part.skips for part in parts if part.skips]
    mids = [part.mid for part in parts if part.mid is not None]
    stages = sorted({stage for part in parts for stage in part.hidden})
    hidden = {stage: reduce(add, [part.hidden[stage] for part in parts if stage in part.hidden]) for stage in stages}
    return Residuals([reduce(add, each) for each in zip(*skips, strict=True)], reduce(add, mids) if mids else None, hidden)


def _controlnet(network: ControlNet, hint: Hint, pixels: Tensor, contexts: Mapping[Side, Context]) -> Act:
    texts = {side: replace(context, image=()) for side, context in contexts.items()}
    pooled = network.config.pooled
    count = len(network.stage_channels) + 1
    weights = [hint.scale * w for w in (ladder(count) if hint.guess and not pooled else [1.0] * count)]

    def act(x: Tensor, t: float, side: Side) -> Residuals:
        if side != "cond" and (hint.guess or pooled):
            return Residuals()
        latents = x[:, : network.config.in_channels]  # an inpainting UNet also reads a mask and a picture
        return scale_residuals(network(latents, torch.tensor(t), texts[side], pixels), weights)

    return act


def _t2i(network: T2IAdapter, hint: Hint, pixels: Tensor, unet: UNetConfig) -> Act:
    features = [hint.scale * feature for feature in network(pixels)]

    def act(x: Tensor, t: float, side: Side) -> Residuals:
        return residuals([feature.expand(len(x), -1, -1, -1) for feature in features], unet)

    return act


def bind(
    networks: Sequence[Network],
    hints: Sequence[Hint],
    unet: UNetConfig,
    contexts: Mapping[Side, Context],
    size: tuple[int, int],
    times: Sequence[float],
) -> Control | None:
    """Return the `control` of `guided` for these networks and their hints, or None if there are no networks.

    `contexts` has the Context of each side, `size` is (height, width) of the pictures, `times` are the timesteps that run.
    In each step, `control` is called once for a side. A T2I-Adapter runs here, once. Raises ValueError if hints and networks do not
    fit together.
    """
    if len(networks) != len(hints):
        raise ValueError(f"{len(hints)} hints for {len(networks)} controls: give one per control")
    step_of, acts = {side: step_at(times) for side in contexts}, list[Act]()
    for network, hint in zip(networks, hints, strict=True):
        hint.check(network)
        pixels = hint.pixels(network, size)
        if isinstance(network, ControlNet):
            acts.append(_controlnet(network, hint, pixels, contexts))
            continue
        if any(side % network.config.unshuffle for side in size):
            raise ValueError(f"this T2I-Adapter needs a width and height that are multiples of {network.config.unshuffle}")
        acts.append(_t2i(network, hint, pixels, unet))

    def control(x: Tensor, t: float, side: Side) -> Residuals:
        step, pairs = step_of[side](t), zip(hints, acts, strict=True)
        return total([act(x, t, side) for hint, act in pairs if hint.acts(step, len(times))])

    return control if acts else None
