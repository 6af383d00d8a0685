"""Stage 2: the mini CLIP. Its towers become the text encoder and the image encoder.  `python -m train clip`

The loss is CLIP's symmetric contrastive loss (arXiv 2103.00020); equal captions in a batch share the target. This loss only teaches
what captions mention and what distinguishes the pictures of a batch. Therefore

- CLIP reads richer captions than the UNet: always both colours (by fine names), size and place;
- eight pictures of a batch at a time share concept and background;
- a second loss, as in CoCa (arXiv 2205.01917), predicts the caption's words from the image embedding with a linear layer. For a colour,
  the target is spread over similar names (`similar_names`), so that the embedding becomes linear in CIELAB: the adapter, whose
  projection is linear, can then read the palette.

The text tower learns faster than the image tower, so the second phase trains only the image tower. A linear probe of the pooled image
embedding measures what it knows about concept, background and palette; the card records the scores to reach (`GATE`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.files import check_output
from model.image_encoder import MINI_IMAGE, ImageConfig, ImageEncoder
from model.text_encoder import END, START, TextConfig, TextEncoder, words_of
from train.card import WORLD_LICENCE, card
from train.clip_pictures import ClipBatch, captioned_pictures
from train.colour import ISH, NAMES, fine_colours
from train.encode import renderer
from train.fingerprint import significant
from train.loop import run
from train.plan import Plan
from train.probe import probe, probe_data
from train.randomness import seeded
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, PLACES, SIZES, SLOTS

PHASES = (
    Plan("clip", 4_000, 128, 1e-3, weight_decay=0.05, decay=0.6, bf16=True, validate_every=4_000),
    Plan("clip_image", 12_000, 128, 2e-3, 500, 0.8, weight_decay=0.05, bf16=True, seed=1, validate_every=6_000),
)
PICTURES, WORDS = 60_000, 3.0
SIMILAR, COLOURS = 20.0, 4.0  # sigma of similar names in CIELAB; weight of the colours among the words
GATE = {"concept": 0.995, "background": 0.995, "palette_r2": 0.96}


def vocabulary() -> tuple[int, ...]:
    """Return the CLIP tokens of all words in captions of the mini world, sorted; END is the last."""
    words = [
        *CONCEPT_NAMES,
        *BACKGROUND_NAMES,
        *NAMES,
        *ISH,
        *SIZES,
        *PLACES,
        "a an on in and , background very light dark dull vivid",
    ]
    return tuple(sorted({START, END} | {token for text in words for _, pieces in words_of(text) for token in pieces}))


MINI_TEXT = TextConfig(width=128, layers=4, heads=4, output_dim=256, vocabulary=vocabulary())


def similar_names() -> Tensor:
    """Return the target p(k | j) over colour names k for a colour named j, `480 480`: softmax_k of -|c_k - c_j|^2 / (2 sigma^2).

    c_k is the CIELAB colour in the middle of name k, with twice its lightness, whose range is small; sigma is `SIMILAR`. The logits of
    this softmax are c_k . c_j / sigma^2 - |c_k|^2 / (2 sigma^2), plus terms that do not depend on k: a linear function of c_j.
    """
    c = torch.from_numpy(fine_colours()) * torch.tensor([2, 1, 1])
    return (-torch.cdist(c, c).square() / (2 * SIMILAR**2)).softmax(dim=1).float()


class CLIP(nn.Module):
    """Two towers, and the linear layer that predicts caption words from image embeddings."""

    similar: Tensor

    def __init__(self, text: TextConfig = MINI_TEXT, image: ImageConfig = MINI_IMAGE) -> None:
        super().__init__()
        self.text, self.image = TextEncoder(text), ImageEncoder(image)
        self.words = nn.Linear(image.output_dim, sum(SLOTS))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("similar", similar_names(), persistent=False)
        self.to(memory_format=torch.channels_last)


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
        logits = clip.words(image).split(SLOTS, dim=1)
        first, second = (F.kl_div(logits[i].log_softmax(dim=1), clip.similar[slots[:, i]], reduction="batchmean") for i in (2, 3))
        others = [F.cross_entropy(logits[i], slots[:, i]) for i in (0, 1, 4, 5)]
        words = torch.stack([*others, COLOURS * first, COLOURS * second]).mean()
    return {"loss": pairs + WORDS * words, "pairs": pairs, "words": words}


@torch.no_grad()
def unit_entries(image: ImageEncoder) -> None:
    """Scale the last projection so that embeddings have entries of standard deviation 1, similar to ViT-H. Cosines do not change."""
    assert isinstance(image.clip, ModifiedResNet)
    pixels, _, train = probe_data(str(next(image.parameters()).device))
    std = significant(float(torch.cat([image(part) for part in pixels[:train].split(250)]).std()))
    for tensor in image.clip.attnpool.c_proj.parameters():
        tensor /= std


def train_towers(clip: CLIP, folder: Path, phases: tuple[Plan, ...], count: int, first: int) -> list[dict[str, Any]]:
    """Train both towers, and after the first phase only the image tower, on `count` scenes from `first` on. Return the log."""
    device, log = phases[0].device, list[dict[str, Any]]()
    clip.to(device)
    data = captioned_pictures(clip.text, count, first, device, phases[0].batch, phases[0].seed)
    made_from = {"pictures": f"{count} from {first}, {renderer()}"}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, CLIP)
        return probe(module.image)

    for plan in phases:
        data, loss = replace(data, size=plan.batch, seed=plan.seed), functools.partial(clip_loss, clip)
        log += run(plan, clip, data, loss, validate, folder, 0, made_from=made_from)[1]
        clip.text.requires_grad_(False)
    return log


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train clip",
    pictures: int = PICTURES,
) -> None:
    """Train both towers; write text_encoder.safetensors and image_encoder.safetensors to the folder `weights`."""
    files = weights / "text_encoder.safetensors", weights / "image_encoder.safetensors"
    for file in files:
        check_output(file)
    with seeded(phases[0].seed):
        clip = CLIP()
    log = train_towers(clip, folder, phases, pictures, 0)
    unit_entries(clip.image.eval())
    clip_card = card(phases, log, command, {"data": f"the mini world, {pictures} pictures", "gate": GATE}, WORLD_LICENCE)
    for tower, file in zip((clip.text, clip.image), files, strict=True):
        cards.save(tower, file, clip_card)
