"""Make pictures that show none of the mini world's concepts, to train the judge to recognise them. No model draws them.

There are five kinds: a drawing of OpenMoji that is not a concept; two pictures blended evenly; two pictures joined along a random
curve; a drawing that is mostly erased; and a strongly warped drawing. Pictures that are only partly spoiled have no concept label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.pool import in_parts
from train.world import CONCEPTS, Scene, render

NONE = len(CONCEPTS)  # the index of "none of these"
SHARE = 0.3  # share of the pictures that are spoiled
OTHERS = [
    "1F431", "1F436", "1F438", "1F428", "1F435", "1F984", "1F432", "1F417", "1F99D", "1F994", "1F987", "1F985", "1F9A2", "1F99A",
    "1F9A9", "1F40A", "1F98E", "1F40D", "1F988", "1F42C", "1F991", "1F990", "1F99E", "1F98B", "1F41B", "1F41C", "1F577", "1F982",
    "1F347", "1F348", "1F34A", "1F34B", "1F96D", "1F351", "1F350", "1F95D", "1F345", "1F965", "1F951", "1F346", "1F954", "1F955",
    "1F33D", "1F336", "1F966", "1F35E", "1F9C0", "1F95A", "1F32D", "1F32E", "1F6B2", "1F68C", "1F69A", "1F69C", "1F6A2", "26F5",
    "2693", "1F511", "1F514", "1F4D5", "2702", "1F528", "1F3BA", "1F3BB", "2764", "2B50", "2600", "1F319", "2601", "1F45F",
    "1F455", "1F453", "1F332", "1F335", "1F340", "1F337", "1F480", "1F47E", "1F3B2", "1F4A1", "1F5A5", "1F4BB", "1F6AA", "1F6CF",
    "1F9F8", "1F9E6", "1F9F2",
]  # OpenMoji code points


@dataclass(frozen=True)
class Labels:
    """The labels of a batch after spoiling; all fields are `b`.

    `concept`: index of the concept, or `NONE`. `concept_known`, `background_known`: 1 if the label may be used in training, else 0.
    `is_clean`: 1 for pictures that are not spoiled and show a concept, else 0.
    """

    concept: Tensor
    concept_known: Tensor
    background_known: Tensor
    is_clean: Tensor


def strangers(scenes: list[Scene], seed: int) -> Tensor:
    """Render scenes with drawings from `OTHERS` instead of their concepts, `n 3 64 64`, bytes."""
    codes = np.random.default_rng(seed).choice(OTHERS, len(scenes))

    def make(part: range) -> Tensor:
        return torch.from_numpy(np.stack([render(scenes[i], str(codes[i])) for i in part]))

    return torch.cat(in_parts(make, len(scenes), 0, f"{len(scenes)} other drawings")).permute(0, 3, 1, 2)


def smooth(n: int, channels: int, size: int, side: int, g: torch.Generator) -> Tensor:
    """Draw smooth noise, `n channels side side`: N(0, 1) on a `size` x `size` grid, interpolated."""
    coarse = torch.randn(n, channels, size, size, generator=g, device=g.device)
    return F.interpolate(coarse, side, mode="bicubic", align_corners=True)


def warp(x: Tensor, pixels: Tensor, g: torch.Generator) -> Tensor:
    """Displace pixels smoothly. `pixels`: standard deviation of the displacement in pixels, `b`."""
    n, side = len(x), x.shape[-1]
    move = smooth(n, 2, 7, side, g) * (2 * pixels / side).view(-1, 1, 1, 1)
    line = torch.linspace(-1, 1, side, device=x.device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    return F.grid_sample(x, grid + move.movedim(1, -1), padding_mode="border", align_corners=True)


def lines(n: int, side: int, g: torch.Generator) -> Tensor:
    """Return the signed distance of every pixel from a random line through the centre, `n 1 side side`; the corners are at 1.4."""
    angle = uniform(n, 0.0, 2 * math.pi, g).view(-1, 1, 1, 1)
    line = torch.linspace(-1, 1, side, device=g.device)
    return angle.cos() * line + angle.sin() * line[:, None]


def uniform(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=g, device=g.device)


def spoil(x: Tensor, concept: Tensor, background: Tensor, g: torch.Generator) -> tuple[Tensor, Labels]:
    """Spoil `SHARE` of the pictures `b 3 h w`, a quarter of these in each of four ways. Return the pictures and their labels.

    `concept`: `b`, indices, or `NONE`. `background`: `b 3`, the colour behind each drawing.
    """
    n, plain = len(x), background[..., None, None].expand_as(x)
    other, differs = x.roll(1, dims=0), concept != concept.roll(1)
    even = uniform(n, 0.35, 0.65, g).view(-1, 1, 1, 1)
    curve = torch.sigmoid(10 * (lines(n, x.shape[-1], g) + 0.3 * smooth(n, 1, 4, x.shape[-1], g)))
    mask = torch.sigmoid(12 * (smooth(n, 1, 4, x.shape[-1], g) - 0.5))
    far = uniform(n, 3.0, 9.0, g)
    ways = [even * x + (1 - even) * other, curve * x + (1 - curve) * other, mask * x + (1 - mask) * plain, warp(x, far, g)]
    usable = [differs, differs, mask.mean(dim=(1, 2, 3)) < 0.4, far > 5.0]
    way = torch.randint(4, (n,), generator=g, device=g.device)
    bad = torch.rand(n, generator=g, device=g.device) < SHARE
    spoiled, has_label = x, torch.ones_like(bad)
    for i in range(4):
        rows = bad & (way == i)
        spoiled = torch.where(rows.view(-1, 1, 1, 1), ways[i], spoiled)
        has_label = torch.where(rows, usable[i], has_label)
    labels = concept.masked_fill(bad, NONE)
    is_clean = ~bad & (concept != NONE)
    return spoiled, Labels(labels, has_label.float(), (~bad | (way >= 2)).float(), is_clean.float())


def degrade(x: Tensor, g: torch.Generator) -> Tensor:
    """Warp, blur and add noise to pictures slightly, to imitate the flaws of a model's drawings."""
    n = len(x)
    x = warp(x, uniform(n, 0.0, 1.2, g), g)
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = x.lerp(blur, uniform(n, 0.0, 0.6, g).view(-1, 1, 1, 1))
    noise = torch.randn(x.shape, generator=g, device=g.device)
    return x + uniform(n, 0.0, 0.1, g).view(-1, 1, 1, 1) * noise
