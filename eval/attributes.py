"""The judge: a small network that reads a picture's concept, background, palette and placement off its pixels.

It learns from true pictures only, lightly blurred and noised, and never meets the models under test.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights_convert
from model.layers import ResBlock
from train.loop import Plan, card, run
from train.vae import to_tensor
from train.world import BACKGROUNDS, CONCEPTS, SIZE, Scene, Split, World, pictures

PLAN = Plan("judge", steps=900, batch=64, lr=2e-3, decay=0.8, validate_every=450)
PALETTE_MEAN, PALETTE_STD = (65.0, 0.0, 0.0), (10.0, 35.0, 35.0)


@dataclass(frozen=True)
class Reading:
    """What a batch of pictures shows. `concept`: `b 64` and `background`: `b 10` logits; `palette`: `b 2 3` CIELAB;
    `placement`: `b 3`, the drawing's centre (x, y) and side in pixels."""

    concept: Tensor
    background: Tensor
    palette: Tensor
    placement: Tensor


class Judge(nn.Module):
    """`b 3 64 64` in [-1, 1] to a Reading."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160)) -> None:
        super().__init__()
        layers, width = [], 3
        for out in widths:
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1), ResBlock(out, out, None, 8, 1e-5)]
            width = out
        self.trunk = nn.Sequential(*layers)
        self.hidden = nn.Linear(width * 16, 256)
        self.heads = nn.Linear(256, len(CONCEPTS) + len(BACKGROUNDS) + 6 + 3)

    def forward(self, x: Tensor) -> Reading:
        h = F.silu(self.hidden(self.trunk(x).flatten(1)))
        concept, background, palette, placement = self.heads(h).split([len(CONCEPTS), len(BACKGROUNDS), 6, 3], dim=1)
        palette = palette.view(-1, 2, 3) * palette.new_tensor(PALETTE_STD) + palette.new_tensor(PALETTE_MEAN)
        return Reading(concept, background, palette, SIZE * placement)


def truth(scenes: list[Scene]) -> dict[str, Tensor]:
    return {
        "concept": torch.tensor([scene.concept for scene in scenes]),
        "background": torch.tensor([scene.background for scene in scenes]),
        "palette": torch.stack([torch.from_numpy(scene.palette) for scene in scenes]).float(),
        "placement": torch.tensor(
            [[scene.x + scene.size / 2, scene.y + scene.size / 2, scene.size] for scene in scenes]
        ),
    }


def delta_e(a: Tensor, b: Tensor) -> Tensor:
    """Palette error: CIE76 colour difference, the mean over the pair. `b 2 3` -> `b`."""
    return (a - b).norm(dim=-1).mean(dim=-1)


Batch = tuple[Tensor, dict[str, Tensor]]


def batch_of(split: Split, batch: int, step: int) -> Batch:
    world = World(split)
    scenes = [world[20_000_000 + i] for i in range(step * batch, (step + 1) * batch)]
    return to_tensor(pictures(scenes)), truth(scenes)


def judge_loss(judge: Judge, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    x, true = batch
    blur = torch.rand(len(x), 1, 1, 1, generator=generator) * 0.6
    x = x.lerp(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1), blur)
    x = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    read = judge(x)
    concept = F.cross_entropy(read.concept, true["concept"])
    background = F.cross_entropy(read.background, true["background"])
    palette = delta_e(read.palette, true["palette"]).mean() / 20
    placement = (read.placement - true["placement"]).abs().mean() / 10
    return {"loss": concept + background + palette + placement, "palette": palette.detach() * 20}


@torch.no_grad()
def read(judge: Judge, pictures: Tensor) -> Reading:
    """Reads any number of pictures `b 3 64 64` in [-1, 1]."""
    parts = [judge(part) for part in pictures.clamp(-1, 1).split(256)]
    return Reading(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("concept", "background", "palette", "placement")
        )
    )


def score(reading: Reading, concept: Tensor, background: Tensor, palette: Tensor) -> dict[str, float]:
    """Shares of right concepts and backgrounds, and the mean palette error."""
    return {
        "concept": float((reading.concept.argmax(dim=1) == concept).float().mean()),
        "background": float((reading.background.argmax(dim=1) == background).float().mean()),
        "palette_error": float(delta_e(reading.palette, palette).mean()),
    }


def train(folder: Path, weights: Path, plan: Plan = PLAN) -> None:
    torch.manual_seed(plan.seed)
    judge = Judge()
    x, true = batch_of("val", 1000, 0)

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Judge)
        return score(read(module, x), true["concept"], true["background"], true["palette"])

    _, log = run(
        plan,
        judge,
        functools.partial(batch_of, "train", plan.batch),
        functools.partial(judge_loss, judge),
        validate,
        folder,
    )
    weights_convert.save(judge, weights / "judge.safetensors", card(plan, log, "python -m eval judge"))


def load(path: Path) -> Judge:
    weights_convert.read_card(path)
    with torch.device("meta"):
        judge = Judge()
    return weights_convert.fill(judge, weights_convert.read_tensors(path))


def summary(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in values.items())
