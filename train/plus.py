"""Stage 5: IP-Adapter Plus, which reads the image encoder's fine features (Figure 11).  `python -m train plus`

The recipe is that of train/adapter.py. In the mini world, Plus is initialised from the trained adapter (`initialise_from`); on a user's
pictures it starts from random weights, or from the file given by `--from`.
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
from model.features import FINE, GLOBAL
from train import adapter
from train.adapter import Outcome, Recipe
from train.data import Data
from train.fingerprint import fingerprint
from train.loop import run
from train.loss import drops
from train.pairs import Batch, EncodedPairs
from train.plan import Plan
from train.setting import Setting, TrainingSource, encode

RATE = 3e-4  # at 1e-3 a Resampler forgets its initialisation
PLAN = replace(adapter.PLAN, name="ip_adapter_plus", steps=5_000, lr=RATE, validate_every=2_500, seed=3)
BEGIN = Recipe("ip_adapter_plus_begin", 3_000, 128, 2e-3, 100, 0.7, validate_every=3_000, says=PLAN.says)
PHASES = BEGIN, PLAN
PairedBatch = tuple[Batch, Batch]


class _PairedData:
    """Batches of the same pictures in two encodings: embeddings and fine features."""

    def __init__(self, embeddings: Data[Batch], features: Data[Batch]) -> None:
        self.parts = embeddings, features

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> PairedBatch:
        embeddings, features = (part.batch(step, rank, world_size) for part in self.parts)
        return embeddings, features


def initialise_from(
    source: IPAdapter,
    plus: IPAdapter,
    plan: Plan,
    embeddings: tuple[EncodedPairs, EncodedPairs | None],
    features: tuple[EncodedPairs, EncodedPairs | None],
    folder: Path,
    made_from: dict[str, Any] | None = None,
) -> None:
    """Initialise Plus from a trained global adapter: copy W'_k and W'_v, and fit its tokens by least squares.

    Token j of Plus's N tokens learns to equal token j mod n of the n tokens of `source`. Attention over n keys equals attention over
    N / n copies of each, so Plus then draws what `source` draws, and training by Eq. 6 continues from there. (From random weights, a
    Resampler learns slowly, because the gradient of Eq. 6 is mostly noise.) `embeddings` and `features` hold the training and
    held-out pairs of the same pictures. The log holds `explained`, the explained share of the held-out tokens' variance.
    """
    plus.to_k.load_state_dict(source.to_k.state_dict())
    plus.to_v.load_state_dict(source.to_v.state_dict())

    def tokens(batch: PairedBatch, drop: Tensor) -> tuple[Tensor, Tensor]:
        pooled, fine = (part.images(drop) for part in batch)
        with torch.no_grad():
            goal = source.tokens(pooled)
        own = plus.tokens(fine)
        return own, repeat(goal, "b n c -> b (r n) c", r=own.shape[1] // goal.shape[1])

    def loss(batch: PairedBatch, g: torch.Generator) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(*tokens(batch, drops(len(batch[0]), g)[1]))}

    def validate(_: nn.Module) -> dict[str, float]:
        assert embeddings[1] is not None and features[1] is not None
        rows = torch.arange(len(features[1]))
        with torch.no_grad():
            batch = embeddings[1].at(rows).to(plan.device), features[1].at(rows).to(plan.device)
            own, goal = tokens(batch, torch.zeros(len(rows), dtype=torch.bool, device=plan.device))
        return {"explained": 1 - float(F.mse_loss(own, goal) / goal.var(dim=0, correction=0).mean())}

    data = _PairedData(*(pairs[0].batches(plan.batch, plan.seed) for pairs in (embeddings, features)))
    made_from = {**(made_from or {}), "adapter that Plus begins as": fingerprint(source)}
    run(plan, plus.image_projection, data, loss, validate, folder, 0, made_from=made_from)


def starts_from_global(source: TrainingSource) -> bool:
    """Return whether Plus is initialised from the adapter in the base folder."""
    return source.data is None and source.start is None


def phases_for(source: TrainingSource) -> tuple[Recipe, ...]:
    """Return the phases of training, as `adapter.phases_for` does."""
    return adapter.phases_for(source, PHASES if starts_from_global(source) else (PLAN,), PLAN)


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Recipe, ...] = PHASES,
    source: TrainingSource | None = None,
    command: str = "python -m train plus",
) -> Outcome:
    """Train Plus, as `adapter.train` does. In the mini world, the first phase is `initialise_from`.

    Raises FileNotFoundError if the global adapter is missing; the message names the command that trains it.
    """
    source = source or TrainingSource(base=weights, reads=FINE)
    if not starts_from_global(source):
        return adapter.train(folder, weights, phases, source, command)
    begin, *others = phases
    start = source.base / "ip_adapter.safetensors"
    if not start.exists():
        raise FileNotFoundError(f"{start} is missing, and Plus is initialised from it: run `python -m train adapter` first")

    def initialise(setting: Setting, plus: IPAdapter) -> tuple[Plan, ...]:
        start_adapter = load_adapter(start, setting.pipeline.unet).to(begin.device)
        embeddings = encode(setting.pipeline, source.picture_sets(None, 0, phases[0].says), folder, GLOBAL)
        initialise_from(start_adapter, plus, begin, embeddings, (setting.pairs, setting.held_out), folder, setting.made_from)
        return (begin,)

    return adapter.train(folder, weights, tuple(others), source, command, initialise)
