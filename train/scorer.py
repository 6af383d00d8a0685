"""Stage 7: a second CLIP, used only to compute CLIP-I and CLIP-T (eval/clip_score.py).  `python -m train scorer`

It differs from the CLIP of train/clip.py, which adapters read, in patch size, width, seed and training pictures. So an adapter is not
rewarded for quirks of its own encoder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from checkpoints import cards
from checkpoints.files import check_output
from model.image_encoder import MINI_IMAGE
from train.card import WORLD_LICENCE, card
from train.clip import CLIP, MINI_TEXT, train_towers
from train.judge import FIRST, PICTURES
from train.plan import Plan
from train.randomness import seeded

PHASES = (Plan("clip_score", 6_000, 128, 1e-3, decay=0.7, weight_decay=0.05, bf16=True, seed=50, validate_every=6_000),)
TEXT = replace(MINI_TEXT, width=96, layers=3, output_dim=192)
IMAGE = replace(MINI_IMAGE, width=24, heads=12, output_dim=192, stem_pool=True)  # the pool doubles the size of a patch


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train scorer",
    pictures: int = PICTURES,
) -> None:
    """Train both towers; write score_text.safetensors and score_image.safetensors, with cards, to the folder `weights`."""
    files = weights / "score_text.safetensors", weights / "score_image.safetensors"
    for file in files:
        check_output(file)
    with seeded(phases[0].seed):
        towers = CLIP(TEXT, IMAGE)
    log = train_towers(towers, folder, phases, pictures, FIRST)
    scorer_card = card(phases, log, command, {"data": f"the mini world, {pictures} pictures"}, WORLD_LICENCE)
    for tower, file in zip((towers.text, towers.image.eval()), files, strict=True):
        cards.save(tower, file, scorer_card)
