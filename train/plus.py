"""Stage 5: Plus, which reads the image encoder's fine features (Figure 11).  `python -m train plus`

It is trained as the adapter is (train/adapter.py). In the mini world it begins as the trained adapter, see `begin_as`; on a user's
pictures it begins fresh, or as the file that `--from` names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from checkpoints.adapters import load_adapter
from model.adapter import IPAdapter
from train import adapter
from train.adapter import LAST, Outcome, Recipe
from train.data import Batch, Cached, Data, Pairs
from train.fingerprint import fingerprint
from train.loop import Plan, run
from train.loss import drops, images_of
from train.setting import Setting, Source, encode

PLAN = replace(LAST, name="ip_adapter_plus", steps=12000, lr=3e-4, seed=3)  # at 1e-3 a Resampler forgets what it knows
BEGIN = Recipe("ip_adapter_plus_begin", steps=3000, batch=128, lr=2e-3, decay=0.7, validate_every=1000, says=PLAN.says)
PHASES = BEGIN, PLAN
Both = tuple[Batch, Batch]


class _Both:
    """Batches of the same pictures from two sources: their embeddings, and their fine features."""

    def __init__(self, embeddings: Data[Batch], features: Data[Batch]) -> None:
        self.parts = embeddings, features

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Both:
        embeddings, features = (part.batch(step, rank, world_size) for part in self.parts)
        return embeddings, features


def begin_as(
    known: IPAdapter,
    plus: IPAdapter,
    plan: Plan,
    embeddings: tuple[Pairs, Pairs | None],
    features: tuple[Pairs, Pairs | None],
    folder: Path,
    made_from: dict[str, Any] | None = None,
) -> None:
    """Plus begins as a trained adapter of the base form: W'_k and W'_v are copied, its tokens fitted by least squares.

    Token j of N learns to be `known`'s token j mod n. A softmax over n keys, and one over N / n copies of each, give the same Z:
    Plus then draws what `known` draws, and Eq. 6 goes on from there. (A fresh Resampler learns slowly from Eq. 6, whose
    gradient is mostly noise.) `embeddings` and `features`: of the same pictures, to learn from and held out. The log has
    `explained`, the share of the held-out tokens' variance that is fitted.
    """
    plus.to_k.load_state_dict(known.to_k.state_dict())
    plus.to_v.load_state_dict(known.to_v.state_dict())
    def tokens(batch: Both, drop: Tensor) -> tuple[Tensor, Tensor]:
        seen, fine = (images_of(part, drop).to(plan.device) for part in batch)
        with torch.no_grad():
            goal = known.tokens(seen)
        own = plus.tokens(fine)
        return own, repeat(goal, "b n c -> b (r n) c", r=own.shape[1] // goal.shape[1])

    def loss(batch: Both, g: torch.Generator) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(*tokens(batch, drops(len(batch[0]), g)[1]))}

    def validate(_: nn.Module) -> dict[str, float]:
        assert embeddings[1] is not None and features[1] is not None
        rows = torch.arange(len(features[1]))
        with torch.no_grad():
            own, goal = tokens((embeddings[1].at(rows), features[1].at(rows)), torch.zeros(len(rows), dtype=torch.bool))
        return {"explained": 1 - float(F.mse_loss(own, goal) / goal.var(dim=0, correction=0).mean())}

    data = _Both(*(Cached(pairs[0], plan.batch, plan.seed) for pairs in (embeddings, features)))
    made_from = {**(made_from or {}), "adapter that Plus begins as": fingerprint(known)}
    run(plan, plus.image_projection, data, loss, validate, folder, 0, made_from=made_from)


def begins(source: Source) -> bool:
    """Whether Plus begins as the base folder's adapter."""
    return source.data is None and source.start is None


def phases_for(source: Source) -> tuple[Recipe, ...]:
    """As in train/adapter.py."""
    return adapter.phases_for(source, PHASES if begins(source) else (PLAN,), PLAN)


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Recipe, ...] = PHASES,
    source: Source | None = None,
    command: str = "python -m train plus",
) -> Outcome:
    """As `adapter.train`; where Plus begins as the adapter, the first phase is of `begin_as`.

    Raises FileNotFoundError, naming the command that makes it, when there is no such adapter.
    """
    source = source or Source(base=weights, fine=True)
    if not begins(source):
        return adapter.train(folder, weights, phases, source, command)
    begin, *others = phases
    start = source.base / "ip_adapter.safetensors"
    if not start.exists():
        raise FileNotFoundError(f"{start} is not there, which Plus begins as; `python -m train adapter` trains it")

    def as_the_adapter(setting: Setting, plus: IPAdapter) -> tuple[Plan, ...]:
        known = load_adapter(start, setting.pipeline.unet).to(begin.device)
        embeddings = encode(setting.pipeline, source.listed(None, 0, phases[0].says), folder, fine=False)
        begin_as(known, plus, begin, embeddings, (setting.pairs, setting.held_out), folder, setting.made_from)
        return (begin,)

    return adapter.train(folder, weights, tuple(others), source, command, as_the_adapter)
