"""The settings of an ablation and the locations of its files.

All forms are trained with the recipe of train/adapter.py, from the same initial projection, on the same pictures in the same order with
the same noise. They differ only in `fuse` and `own_projections`. (The simple adapter with as many parameters has more tokens, so its
initial projection differs too.)
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints.files import read_json
from eval import clip_score
from eval.ablation.forms import FORMS, SHARES, Form
from eval.bench import Bench
from eval.prompts import Prompts
from model.adapter import IPAdapter
from sampling.loading import load
from train.captioned import captioned_files, split
from train.fingerprint import fingerprint
from train.judge import load_judge
from train.loop import Plan
from train.randomness import seeded
from train.setting import Setting, TrainingSource, prepare


@dataclass(frozen=True)
class Study:
    """The size of a study; the defaults are those of the first study.

    Seeds are added one by one, from `seeds` to `most_seeds`, until the half-width of the primary difference's interval is at
    most `half_width`.
    """

    steps: int = 500
    batch: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 9e-3, 27e-3)
    rate_steps: int = 100
    seeds: int = 5
    most_seeds: int = 10
    half_width: float = 3.0
    prompts: int = 128
    draw_steps: int = 12
    check_steps: int = 50
    guidance: float = 4.0
    forms: tuple[str, ...] = tuple(FORMS)
    level: float = 0.8
    resamples: int = 2000
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps < 4 or min(self.seeds, self.prompts, self.batch, *self.rates) <= 0:
            raise ValueError("--steps must be at least 4; --seeds, --prompts, --batch and --rates must be positive")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Study:
        """Build a Study from a results file, which stores tuples as lists."""
        given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**given)

    def plan(self, form: str, seed: int, rate: float) -> Plan:
        """Return the plan for one adapter."""
        often: dict[str, Any] = {"save_every": 50, "validate_every": round(self.steps * SHARES[0])}
        settings: dict[str, Any] = {"warmup": 50, "ema": 0.98, "bf16": True, "seed": seed, "device": self.device}
        return Plan(f"{form}-{seed}", self.steps, self.batch, rate, **settings, **often)

    def rate_plan(self, form: str, rate: float) -> Plan:
        """Return the plan of the short training that tests a learning rate."""
        steps = self.rate_steps
        return replace(self.plan(form, 1000, rate), name=f"{form}-rate-{rate:g}", steps=steps, validate_every=steps)


# A tiny study that runs everything in minutes; its numbers are meaningless.
SMOKE = Study(steps=8, batch=4, rates=(1e-3, 3e-3), rate_steps=4, seeds=2, most_seeds=2, prompts=4, draw_steps=2, check_steps=3)


@dataclass(frozen=True)
class Workspace:
    """The inputs of a study and the locations of its files.

    `source`: base model and pictures. `shipped`: folder of the finished adapters. `state`: folder of all other files, with one
    subfolder per value of `made_from`. `scorer`: the name of a CLIP (`clip_score.find`). `made_from`: see `fingerprinted`.
    """

    source: TrainingSource
    shipped: Path
    state: Path
    scorer: str
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """The folder for unfinished and intermediate work."""
        return self.state / hashlib.sha256(json.dumps(self.made_from).encode()).hexdigest()[:8]

    def adapter(self, form: str, seed: int, share: float = 1.0) -> Path:
        """Return the file of an adapter after a share of its training."""
        name = f"{form}-{seed}"
        return self.shipped / f"{name}.safetensors" if share == 1 else self.work / f"{name}-{share:g}.safetensors"

    def card(self, form: str, seed: int, share: float = 1.0) -> dict[str, Any]:
        """Return the card of an adapter after a share of its training, or {} if the adapter does not exist."""
        path = self.adapter(form, seed, share)
        return read_json(path.with_suffix(".json")) if path.exists() else {}

    def bench(self, study: Study) -> Bench:
        """Build the bench that draws and scores. For a user's pictures, the prompts are the held-out pictures."""
        return _bench_once(self.source, self.scorer, study, self.state)

    def fingerprinted(self, bench: Bench) -> Workspace:
        """Return a copy with `made_from` set: fingerprints of the weights, the data and the scorer."""
        parts = {name: getattr(bench.pipeline, name) for name in ("unet", "vae", "text", "image")}
        own = self.source.data
        data = self.source.pictures if own is None else captioned_files(own, self.state / "cache").made_from()
        weights = {name: fingerprint(part) for name, part in parts.items() if part is not None}
        return replace(self, made_from={**weights, "data": data, "scorer": bench.scorer.name})

    def setting(self, study: Study) -> Setting:
        """Prepare the base model and pictures that all forms are trained on."""
        return _prepare_once(self.source, self.state, study.device)

    def shipped_pictures(self) -> int | None:
        """Return the number of pictures that the adapter in the base folder was trained on, from its card; None if unknown."""
        card = self.source.base / "ip_adapter.json"
        phases = read_json(card).get("settings") if card.is_file() else None
        return sum(phase["steps"] * phase["batch"] * phase["accumulate"] for phase in phases) if phases else None


@functools.lru_cache(maxsize=1)  # once per process
def _bench_once(source: TrainingSource, scorer: str, study: Study, state: Path) -> Bench:
    pipeline, judge = load(source.base, (), source.image_encoder, device=study.device), None
    if source.data is None:
        prompts, judge = Prompts.of_the_world(study.prompts), load_judge(source.base / "judge.safetensors")
    else:
        held_out = split(captioned_files(source.data, state / "cache"))[1]
        prompts = Prompts.of_files([held_out[i] for i in range(min(study.prompts, len(held_out)))], pipeline.native_size[0])
    return Bench(pipeline, prompts, clip_score.find(scorer, study.device), judge, study.draw_steps, study.guidance)


@functools.cache  # once per process
def _prepare_once(source: TrainingSource, folder: Path, device: str) -> Setting:
    return prepare(source, folder, device)


def untrained_adapter(setting: Setting, form: Form, seed: int) -> IPAdapter:
    """Build the initial adapter of a form. With the same seed, forms with the same number of tokens get the same projection."""
    tokens = _as_many_parameters(setting) if form.wide else None
    with seeded(seed):
        return setting.adapter(form.own_projections, tokens)


def _as_many_parameters(setting: Setting) -> int:
    """Return the number of tokens for which the projection has about as many parameters as all of IP-Adapter."""

    def size(own: bool, tokens: int | None = None) -> int:
        return sum(p.numel() for p in setting.adapter(own, tokens).parameters())

    one, two = size(False, 1), size(False, 2)
    return 1 + round((size(True) - one) / (two - one))
