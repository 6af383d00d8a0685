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
from einops import rearrange
from torch import Tensor, nn

from checkpoints import cards
from model.layers import ResBlock
from train.colour import srgb_to_lab
from train.loop import Plan, card, run
from train.vae import to_tensor
from train.world import BACKGROUNDS, CONCEPTS, SIZE, Scene, Split, World, pictures

PLAN = Plan("judge", steps=1800, batch=64, lr=1e-3, decay=0.7, validate_every=450)


@dataclass(frozen=True)
class Reading:
    """What a batch of pictures shows. `concept`: `b 64` and `background`: `b 10` logits; `palette`: `b 2 3` CIELAB;
    `placement`: `b 3`, the drawing's centre (x, y) and side in pixels."""

    concept: Tensor
    background: Tensor
    palette: Tensor
    placement: Tensor


def lab_of(x: Tensor) -> Tensor:
    """Pictures `b 3 h w` in [-1, 1] to the CIELAB colours of their pixels, `b (h w) 3`."""
    rgb = rearrange((x.detach().cpu().clamp(-1, 1) + 1) / 2, "b c h w -> b (h w) c").double().numpy()
    return torch.from_numpy(srgb_to_lab(rgb)).float().to(x.device)


class Judge(nn.Module):
    """`b 3 64 64` in [-1, 1] to a Reading.

    The palette is not guessed: the network only says where each of the two colours is (a softmax over all pixels), and the
    colour is the mean CIELAB value of the pixels there.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160), key: int = 32) -> None:
        super().__init__()
        self.stages, self.keys = nn.ModuleList(), nn.ModuleList([nn.Conv2d(3, key, 3, padding=1)])
        width = 3
        for out in widths:
            conv = nn.Conv2d(width, out, 3, stride=2, padding=1)
            self.stages.append(nn.Sequential(conv, ResBlock(out, out, None, 8, 1e-5)))
            self.keys.append(nn.Conv2d(out, key, 1))
            width = out
        self.norm = nn.GroupNorm(8, key)
        self.hidden = nn.Linear(width * 16, 256)
        self.heads = nn.Linear(256, len(CONCEPTS) + len(BACKGROUNDS) + 3)
        self.query = nn.Linear(256, 2 * key)

    def forward(self, x: Tensor) -> Reading:
        h, key = x, self.keys[0](x)
        for stage, to_key in zip(self.stages, self.keys[1:], strict=True):
            h = stage(h)
            key = key + F.interpolate(to_key(h), size=key.shape[-2:])
        h = F.silu(self.hidden(h.flatten(1)))
        concept, background, placement = self.heads(h).split([len(CONCEPTS), len(BACKGROUNDS), 3], dim=1)
        query = rearrange(self.query(h), "b (n c) -> b n c", n=2)
        logits = torch.einsum("bnc,bchw->bnhw", query, F.silu(self.norm(key))) / query.shape[-1] ** 0.5
        where = logits.flatten(2).softmax(dim=-1)
        return Reading(concept, background, where @ lab_of(x), SIZE * placement)


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
    cards.save(judge, weights / "judge.safetensors", card((plan,), log, "python -m eval judge"))


def load(path: Path) -> Judge:
    return cards.load(path, Judge, None)


def summary(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in values.items())
