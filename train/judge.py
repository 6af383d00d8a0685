"""Stage 6: the judge, a network that reads concept, background, palette and placement from a picture.  `python -m train judge`

It answers "none of these" (index `NONE`) when a picture shows none of the 64 concepts. It is trained only on rendered pictures, slightly
warped, blurred and noised, and on spoiled ones (train/spoiled.py); never on output of a model that it measures.
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
from train.colour import tensor_to_lab
from train.data import ShuffledBatches
from train.encode import renderer
from train.loop import run
from train.plan import Plan
from train.pool import pixels_of, scenes_of, to_unit
from train.randomness import seeded
from train.spoiled import NONE, degrade, spoil, strangers
from train.world import BACKGROUNDS, SIZE, Scene

PHASES = (Plan("judge", 12_000, 64, 1e-3, 500, 0.7, bf16=True, validate_every=3_000),)
FIRST = 20_000_000  # index of the first training scene; the networks that are measured see none of these
PICTURES, HELD_OUT = 40_000, 1000


@dataclass(frozen=True)
class Reading:
    """What the judge sees in a batch of pictures.

    `concept`: `b 65` (the last is `NONE`) and `background`: `b 10` logits; `palette`: `b 2 3` CIELAB; `placement`: `b 3`, centre
    (x, y) and side of the drawing in pixels.
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
    """Convert pictures `b 3 h w` in [-1, 1] to the CIELAB colours of their pixels, `b (h w) 3`, without gradients."""
    return tensor_to_lab(rearrange((x.detach().clamp(-1, 1) + 1) / 2, "b c h w -> b (h w) c"))


class Judge(nn.Module):
    """Map pictures `b 3 64 64` in [-1, 1] to a Reading.

    The network does not regress the palette. For each of the two colours it predicts a softmax over every second pixel of every second
    row; the colour is the average CIELAB value under it.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 192), key: int = 32) -> None:
        super().__init__()
        self.stages, self.keys = nn.ModuleList(), nn.ModuleList([nn.Conv2d(3, key, 3, stride=2, padding=1)])
        width = 3
        for out in widths:
            conv = nn.Conv2d(width, out, 3, stride=2, padding=1)
            self.stages.append(nn.Sequential(conv, ResBlock(out, out, None, 8, 1e-5)))
            self.keys.append(nn.Conv2d(out, key, 1))
            width = out
        self.norm = nn.GroupNorm(8, key)
        self.hidden = nn.Linear(width * 16, 256)
        self.heads = nn.Linear(256, NONE + 1 + len(BACKGROUNDS) + 3)
        self.query = nn.Linear(256, 2 * key)

    def forward(self, x: Tensor) -> Reading:
        h, key = x, self.keys[0](x)
        for stage, to_key in zip(self.stages, self.keys[1:], strict=True):
            h = stage(h)
            key = key + F.interpolate(to_key(h), size=key.shape[-2:])
        h = F.silu(self.hidden(h.flatten(1)))
        concept, background, placement = self.heads(h).split([NONE + 1, len(BACKGROUNDS), 3], dim=1)
        query = rearrange(self.query(h), "b (n c) -> b n c", n=2)
        logits = torch.einsum("bnc,bchw->bnhw", query, F.silu(self.norm(key))) / query.shape[-1] ** 0.5
        where = logits.flatten(2).float().softmax(dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            palette = where @ lab_of(x.float()[..., ::2, ::2])
        return Reading(concept.float(), background.float(), palette, SIZE * placement.float())

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Reading:
        """Read any number of pictures `b 3 64 64`; values outside [-1, 1] are clamped. The reading is on the CPU."""
        device = self.query.weight.device
        parts = [self(part.to(device)) for part in pictures.clamp(-1, 1).split(256)]
        return Reading(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in Reading.__dataclass_fields__))


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
    return torch.mean((a - b).norm(dim=-1), dim=-1)


JudgeBatch = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Answers:
    """A pool of pictures and what a perfect judge reads from each: `concept`, `background`, `palette`, `placement`, and
    `background_rgb` in [-1, 1]."""

    pixels: Tensor
    truth: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, rows: Tensor) -> JudgeBatch:
        rows = rows.to(self.pixels.device)
        x = to_unit(self.pixels[rows]).contiguous(memory_format=torch.channels_last)
        return x, {name: values[rows] for name, values in self.truth.items()}


def answers(count: int, unknown: int, device: str) -> Answers:
    """Return `count` pictures of the concepts and `unknown` of other drawings, whose concept is `NONE`."""
    scenes, others = scenes_of("train", count, FIRST), scenes_of("train", unknown, FIRST + count)
    pixels = torch.cat([pixels_of("train", count, FIRST), strangers(others, FIRST + count)])
    truth = ground_truth([*scenes, *others])
    truth["concept"][count:] = NONE
    rgb = torch.tensor([scene.background_rgb.tolist() for scene in (*scenes, *others)])
    truth["background_rgb"] = 2 * rgb.float() - 1
    return Answers(pixels.to(device), {name: values.to(device) for name, values in truth.items()})


def judge_loss(judge: Judge, batch: JudgeBatch, g: torch.Generator) -> dict[str, Tensor]:
    """Add the cross-entropies, the palette error / 20 and the placement error / 3: means over the pictures with that label."""
    x, true = batch
    x, labels = spoil(x, true["concept"], true["background_rgb"], g)
    reading = judge(degrade(x, g))

    def mean(errors: Tensor, mask: Tensor) -> Tensor:
        return (errors * mask).sum() / mask.sum().clamp(min=1)

    concept = mean(F.cross_entropy(reading.concept, labels.concept, reduction="none"), labels.concept_known)
    background = mean(F.cross_entropy(reading.background, true["background"], reduction="none"), labels.background_known)
    palette = mean(delta_e(reading.palette, true["palette"]), labels.is_clean)
    placement = mean((reading.placement - true["placement"]).abs().mean(dim=-1), labels.is_clean)
    return {"loss": concept + background + palette / 20 + placement / 3, "palette": palette.detach()}


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train judge",
    pictures: int = PICTURES,
) -> None:
    """Train the judge on `pictures` of the concepts and a fifth as many others; write judge.safetensors to the folder `weights`."""
    out, device, unknown = weights / "judge.safetensors", phases[0].device, pictures // 5
    check_output(out)
    with seeded(phases[0].seed):
        judge = Judge()
    judge.to(memory_format=torch.channels_last)
    judge.to(device)
    pool, true = answers(pictures, unknown, device), ground_truth(scenes_of("val", HELD_OUT, 0))
    x, log = to_unit(pixels_of("val", HELD_OUT, 0)), list[dict[str, Any]]()

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Judge)
        return module.read(x).score(true["concept"], true["background"], true["palette"])

    for plan in phases:
        data, loss = ShuffledBatches(pool, plan.batch, plan.seed), functools.partial(judge_loss, judge)
        log += run(plan, judge, data, loss, validate, folder, 0, made_from={"pictures": f"{len(pool)}, {renderer()}"})[1]
    details = {"data": f"the mini world, {pictures} pictures and {unknown} of other drawings"}
    cards.save(judge, out, card(phases, log, command, details, WORLD_LICENCE))


def load_judge(path: Path) -> Judge:
    """Load a judge. Raises ValueError or OSError if the file is missing or is not a judge."""
    return cards.load(path, Judge, None)
