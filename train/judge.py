"""Stage 6: the judge, a network that reads concept, background, palette and placement from a picture.  `python -m train judge`

It is trained only on rendered pictures, slightly blurred and noised, never on output of a model that it measures.
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
from checkpoints.files import check_output
from model.layers import ResBlock
from train.card import WORLD_LICENCE, card
from train.colour import srgb_to_lab
from train.data import OnTheFly
from train.encode import renderer
from train.loop import Plan, run
from train.randomness import seeded
from train.vae import bytes_to_tensor
from train.world import BACKGROUNDS, CONCEPTS, SIZE, Scene, Split, World, pictures

PHASES = (Plan("judge", steps=1800, batch=64, lr=1e-3, decay=0.7, validate_every=450),)
FIRST = 20_000_000  # index of the first training scene; no other stage uses scenes from here on


@dataclass(frozen=True)
class Reading:
    """What the judge sees in a batch of pictures.

    `concept`: `b 64` and `background`: `b 10` logits; `palette`: `b 2 3` CIELAB; `placement`: `b 3`, centre (x, y) and side of
    the drawing in pixels.
    """

    concept: Tensor
    background: Tensor
    palette: Tensor
    placement: Tensor

    def score(self, concept: Tensor, background: Tensor, palette: Tensor) -> dict[str, float]:
        """Return the shares of correct concepts and backgrounds, and the mean palette error."""
        return {
            "concept": float((self.concept.argmax(dim=1) == concept).float().mean()),
            "background": float((self.background.argmax(dim=1) == background).float().mean()),
            "palette_error": float(delta_e(self.palette, palette).mean()),
        }


def lab_of(x: Tensor) -> Tensor:
    """Convert pictures `b 3 h w` in [-1, 1] to the CIELAB colours of their pixels, `b (h w) 3`."""
    rgb = rearrange((x.detach().cpu().clamp(-1, 1) + 1) / 2, "b c h w -> b (h w) c").double().numpy()
    return torch.from_numpy(srgb_to_lab(rgb)).float().to(x.device)


class Judge(nn.Module):
    """Map pictures `b 3 64 64` in [-1, 1] to a Reading.

    The network does not regress the palette. For each of the two colours it predicts a softmax over all pixels; the colour is the
    average CIELAB value under it.
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

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Reading:
        """Read any number of pictures `b 3 64 64`; values outside [-1, 1] are clamped."""
        parts = [self(part) for part in pictures.clamp(-1, 1).split(256)]
        return Reading(*(torch.cat([getattr(part, name) for part in parts]) for name in Reading.__dataclass_fields__))


def ground_truth(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return what a perfect judge would read: `concept` and `background`, indices `b`; `palette` and `placement` as in Reading."""
    return {
        "concept": torch.tensor([scene.concept for scene in scenes]),
        "background": torch.tensor([scene.background for scene in scenes]),
        "palette": torch.stack([torch.from_numpy(scene.palette) for scene in scenes]).float(),
        "placement": torch.tensor([[s.x + s.size / 2, s.y + s.size / 2, s.size] for s in scenes]),
    }


def delta_e(a: Tensor, b: Tensor) -> Tensor:
    """Compute the palette error: the CIE76 difference, averaged over the two colours. `b 2 3` -> `b`."""
    return (a - b).norm(dim=-1).mean(dim=-1)


JudgeBatch = tuple[Tensor, dict[str, Tensor]]


def batch_of(split: Split, batch: int, step: int) -> JudgeBatch:
    world = World(split)
    scenes = [world[FIRST + i] for i in range(step * batch, (step + 1) * batch)]
    return bytes_to_tensor(pictures(scenes)), ground_truth(scenes)


def judge_loss(judge: Judge, batch: JudgeBatch, generator: torch.Generator) -> dict[str, Tensor]:
    """Add the two cross-entropies, the palette error / 20 and the placement error / 10, on blurred and noised pictures."""
    x, true = batch
    blur = torch.rand(len(x), 1, 1, 1, generator=generator) * 0.6
    x = x.lerp(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1), blur)
    x = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    reading = judge(x)
    concept = F.cross_entropy(reading.concept, true["concept"])
    background = F.cross_entropy(reading.background, true["background"])
    palette = delta_e(reading.palette, true["palette"]).mean() / 20
    placement = (reading.placement - true["placement"]).abs().mean() / 10
    return {"loss": concept + background + palette + placement, "palette": palette.detach() * 20}


def train(
    folder: Path, weights: Path, phases: tuple[Plan, ...] = PHASES, command: str = "python -m train judge"
) -> None:
    """Train the judge; write `weights`/judge.safetensors and its card."""
    out = weights / "judge.safetensors"
    check_output(out)
    with seeded(phases[0].seed):
        judge = Judge()
    x, true = batch_of("val", 1000, 0)
    log, made_from = list[dict[str, Any]](), {"pictures": renderer()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Judge)
        return module.read(x).score(true["concept"], true["background"], true["palette"])

    for plan in phases:
        data, loss = OnTheFly(functools.partial(batch_of, "train", plan.batch)), functools.partial(judge_loss, judge)
        log += run(plan, judge, data, loss, validate, folder, made_from=made_from)[1]
    cards.save(judge, out, card(phases, log, command, {"data": "the mini world"}, WORLD_LICENCE))


def load_judge(path: Path) -> Judge:
    """Load a judge. Raises ValueError or OSError if the file is missing or is not a judge."""
    return cards.load(path, Judge, None)
