"""Stage 2: the mini CLIP. Its towers become the text encoder and the image encoder.  `python -m train clip`

The loss is CLIP's symmetric contrastive loss (arXiv 2103.00020); equal captions in a batch share the target. This loss only teaches
what captions mention and what distinguishes the pictures of a batch. Therefore

- CLIP reads richer captions than the UNet: both colours (48 names), size and place;
- eight pictures of a batch at a time share concept and background;
- a second loss, as in CoCa (arXiv 2205.01917), predicts the caption's words from the image embedding with a linear layer.

The text tower learns faster than the image tower, so the later phases train only the image tower. A linear probe of the pooled image
embedding measures what it knows about concept, background and palette; the card records the scores to reach (`GATE`).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.files import check_output
from model.image_encoder import MINI_IMAGE, ImageConfig, ImageEncoder, normalise
from model.text_encoder import END, START, TextConfig, TextEncoder, words_of
from train.card import WORLD_LICENCE, card
from train.colour import NAMES
from train.data import OnTheFly
from train.encode import renderer
from train.loop import Plan, run
from train.randomness import seeded
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, SLOTS, Scene, Split, World, pictures, random_scene

PHASES = (
    Plan("clip", steps=867, batch=128, lr=1e-3, weight_decay=0.05, decay=0.6),
    Plan(
        "clip_image", 2600, 128, 2e-3, warmup=200, decay=0.8, weight_decay=0.05, bf16=True, seed=1, validate_every=700
    ),
    Plan("clip_image_longer", 2400, 128, 2e-3, decay=0.8, weight_decay=0.05, bf16=True, seed=2, validate_every=800),
)
GROUP, WORDS = 8, 3.0
GATE = {"concept": 0.90, "background": 0.95, "palette_r2": 0.80}


def vocabulary() -> tuple[int, ...]:
    """Return the CLIP tokens of all words in captions of the mini world, sorted; END is the last."""
    words = [
        *CONCEPT_NAMES,
        *BACKGROUND_NAMES,
        *NAMES,
        "a an on in and , background small middling large light dark top middle bottom left centre right",
    ]
    return tuple(sorted({START, END} | {token for text in words for _, pieces in words_of(text) for token in pieces}))


MINI_TEXT = TextConfig(width=128, layers=4, heads=4, output_dim=256, vocabulary=vocabulary())


class CLIP(nn.Module):
    """Two towers, and the linear layer that predicts caption words from image embeddings."""

    def __init__(self, text: TextConfig = MINI_TEXT, image: ImageConfig = MINI_IMAGE) -> None:
        super().__init__()
        self.text, self.image = TextEncoder(text), ImageEncoder(image)
        self.words = nn.Linear(image.output_dim, sum(SLOTS))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.to(memory_format=torch.channels_last)


ClipBatch = tuple[Tensor, Tensor, Tensor]


def scenes_of(split: Split, first: int, batch: int) -> list[Scene]:
    """Return the scenes of a batch. Each group of `GROUP` shares the concept and background of its first scene."""
    scenes = [World(split)[first + i] for i in range(batch)]
    firsts = [scenes[i - i % GROUP] for i in range(batch)]
    return [
        scene if scene is leader else random_scene(np.random.default_rng((first, i)), leader.concept, leader.background)
        for i, (scene, leader) in enumerate(zip(scenes, firsts, strict=True))
    ]


def batch_of(text: TextEncoder, plan: Plan, step: int) -> ClipBatch:
    """Return pixels, tokens (three of four captions are rich; trimmed to the longest), and the slots of the rich captions."""
    scenes = scenes_of("train", plan.seed * 1_000_000 + step * plan.batch, plan.batch)
    pixels = normalise(torch.from_numpy(pictures(scenes)).permute(0, 3, 1, 2).float() / 255)
    tokens = text.tokenize([scene.caption if i % 4 == 0 else scene.rich_caption for i, scene in enumerate(scenes)])
    length = int((tokens == tokens[:, -1:]).int().argmax(dim=1).max()) + 1
    return pixels, tokens[:, :length], torch.tensor([scene.slots for scene in scenes])


def contrastive(image: Tensor, text: Tensor, logit_scale: Tensor, same: Tensor) -> Tensor:
    """Average the two cross-entropies over cosine similarities. `same[i, j]` is true if captions i and j are equal."""
    logits = logit_scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = same.float() / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clip_loss(clip: CLIP, batch: ClipBatch, _: torch.Generator) -> dict[str, Tensor]:
    pixels, tokens, slots = batch
    same = (tokens[:, None] == tokens[None]).all(dim=-1)
    image = clip.image(pixels.contiguous(memory_format=torch.channels_last))
    with torch.autocast(image.device.type, enabled=False):
        image = image.float()
        pairs = contrastive(image, clip.text.pooled(tokens), clip.logit_scale, same)
        logits = clip.words(F.normalize(image, dim=-1) * image.shape[-1] ** 0.5).split(SLOTS, dim=1)
        words = torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, slots.T, strict=True)]).mean()
    return {"loss": pairs + WORDS * words, "pairs": pairs, "words": words}


@functools.cache
def probe_data(train: int = 6000, test: int = 1500) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return the pixels of training and then held-out pictures, their ground truth, and the number of training pictures."""
    scenes = [World("train")[10_000_000 + i] for i in range(train)] + [World("val")[i] for i in range(test)]
    truth = {
        "concept": torch.tensor([scene.concept for scene in scenes]),
        "background": torch.tensor([scene.background for scene in scenes]),
        "palette": torch.stack([torch.from_numpy(scene.palette).flatten() for scene in scenes]).float(),
    }
    return normalise(torch.from_numpy(pictures(scenes)).permute(0, 3, 1, 2).float() / 255), truth, train


def classify(x: Tensor, y: Tensor, train: int) -> float:
    """Fit multinomial logistic regression on the first `train` rows; return the accuracy on the rest."""
    linear = nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x[:train]), y[:train]) + 1e-4 * linear.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float((linear(x[train:]).argmax(dim=1) == y[train:]).float().mean())


def regress(x: Tensor, y: Tensor, train: int, ridge: float = 1.0) -> float:
    """Fit ridge regression on the first `train` rows; return R^2 on the rest, averaged over columns."""
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    w = torch.linalg.solve(x[:train].T @ x[:train] + ridge * torch.eye(x.shape[1]), x[:train].T @ y[:train].double())
    residual, total = (
        (x[train:] @ w - y[train:]).square().sum(dim=0),
        (y[train:] - y[train:].mean(dim=0)).square().sum(dim=0),
    )
    return float((1 - residual / total).mean())


@torch.no_grad()
def probe(image: ImageEncoder) -> dict[str, float]:
    """Score linear probes of the pooled embedding on held-out pictures."""
    image.eval()
    pixels, truth, train = probe_data()
    x = torch.cat([image(part.contiguous(memory_format=torch.channels_last)) for part in pixels.split(250)])
    image.train()
    x = (x - x[:train].mean(dim=0)) / x[:train].std(dim=0)
    return {
        "concept": classify(x, truth["concept"], train),
        "background": classify(x, truth["background"], train),
        "palette_r2": regress(x, truth["palette"], train),
    }


@torch.no_grad()
def unit_entries(image: ImageEncoder) -> None:
    """Scale the last projection so that embeddings have entries of standard deviation 1, similar to ViT-H. Cosines do not change."""
    assert isinstance(image.clip, ModifiedResNet)
    pixels, _, train = probe_data()
    std = torch.cat([image(part) for part in pixels[:train].split(250)]).std()
    for tensor in image.clip.attnpool.c_proj.parameters():
        tensor /= std


def train(
    folder: Path, weights: Path, phases: tuple[Plan, ...] = PHASES, command: str = "python -m train clip"
) -> None:
    """Train both towers; write text_encoder.safetensors and image_encoder.safetensors to the folder `weights`."""
    files = weights / "text_encoder.safetensors", weights / "image_encoder.safetensors"
    for file in files:
        check_output(file)
    with seeded(phases[0].seed):
        clip = CLIP()
    log, made_from = list[dict[str, Any]](), {"pictures": renderer()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, CLIP)
        return probe(module.image)

    for plan in phases:
        data, loss = OnTheFly(functools.partial(batch_of, clip.text, plan)), functools.partial(clip_loss, clip)
        _, rows = run(plan, clip, data, loss, validate, folder, made_from=made_from)
        clip.text.requires_grad_(False)
        log += rows
    unit_entries(clip.image.eval())
    clip_card = card(phases, log, command, {"data": "the mini world", "gate": GATE}, WORLD_LICENCE)
    for tower, file in zip((clip.text, clip.image), files, strict=True):
        cards.save(tower, file, clip_card)
