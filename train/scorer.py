"""Stage 7: a second CLIP, used only to compute CLIP-I and CLIP-T (eval/clip_score.py).  `python -m train scorer`

It differs from the CLIP of train/clip.py, which adapters read, in patch size, width, seed and training pictures. So an adapter is not
rewarded for quirks of its own encoder.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from checkpoints import cards
from checkpoints.files import check_output
from model.image_encoder import MINI_IMAGE
from train import clip
from train.card import WORLD_LICENCE, card
from train.data import OnTheFly
from train.encode import renderer
from train.loop import Plan, run
from train.randomness import seeded

PHASES = (Plan("clip_score", 1500, 128, 1e-3, decay=0.7, weight_decay=0.05, bf16=True, seed=50, validate_every=500),)
TEXT = replace(clip.MINI_TEXT, width=96, layers=3, output_dim=192)
IMAGE = replace(MINI_IMAGE, width=24, heads=12, output_dim=192, stem_pool=True)  # the pool doubles the size of a patch


def train(
    folder: Path, weights: Path, phases: tuple[Plan, ...] = PHASES, command: str = "python -m train scorer"
) -> None:
    """Train both towers; write score_text.safetensors and score_image.safetensors, with cards, to the folder `weights`."""
    files = weights / "score_text.safetensors", weights / "score_image.safetensors"
    for file in files:
        check_output(file)
    with seeded(phases[0].seed):
        towers = clip.CLIP(TEXT, IMAGE)
    log, made_from = list[dict[str, Any]](), {"pictures": renderer()}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, clip.CLIP)
        return clip.probe(module.image)

    for plan in phases:
        data, loss = OnTheFly(functools.partial(clip.batch_of, towers.text, plan)), functools.partial(clip.clip_loss, towers)
        log += run(plan, towers, data, loss, validate, folder, made_from=made_from)[1]
    scorer_card = card(phases, log, command, {"data": "the mini world"}, WORLD_LICENCE)
    for tower, file in zip((towers.text, towers.image.eval()), files, strict=True):
        cards.save(tower, file, scorer_card)
