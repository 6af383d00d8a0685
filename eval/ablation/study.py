"""The settings of an ablation and the locations of its files (docs/ablation-protocol.md).

All forms are trained with the recipe of train/adapter.py at a constant learning rate, from the same initial projection, on the same
pictures in the same order with the same noise. They differ only in what `forms.Form` says.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints.files import read_json
from eval import clip_score
from eval.ablation.forms import IP_ADAPTER, SIMPLE, TIER_A
from eval.bench import Bench
from eval.device import processor
from eval.prompts import Prompts
from sampling.loading import load
from train.captioned import captioned_files, split
from train.card import ROOT, code_version
from train.fingerprint import fingerprint
from train.judge import load_judge
from train.plan import Plan
from train.setting import Setting, TrainingSource, prepare

SPLITS = {"validation": 1, "test": 3, "confirm": 6}  # sets of prompts, and their seeds
RATE_SEED = 1000  # seed of the trainings that test a learning rate
SOURCES = ("model", "sampling", "train")  # packages whose source files affect the digits


@dataclass(frozen=True)
class Study:
    """The size of a study; the defaults are those of the protocol.

    `seeds`: number of adapters of `IP_ADAPTER` and `SIMPLE`; `other_seeds`: of the other forms. `prompts`: number of test prompts, and of
    validation prompts; there are twice as many to confirm. `few`: number of lambdas at earlier checkpoints.
    """

    steps: int = 8000
    batch: int = 32
    rates: tuple[float, ...] = (5e-4, 1.5e-3, 4.5e-3)
    seeds: int = 5
    other_seeds: int = 3
    prompts: int = 128
    few: int = 4
    draw_steps: int = 12
    guidance: float = 4.0
    forms: tuple[str, ...] = TIER_A
    level: float = 0.8
    resamples: int = 20_000
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps < 16 or self.prompts < 2 or min(self.seeds, self.other_seeds, self.batch, *self.rates) <= 0:
            raise ValueError("--steps must be at least 16, --prompts at least 2; --seeds, --batch and --rates must be positive")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Study:
        """Build a Study from a results file, which stores tuples as lists."""
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**settings)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The numbers of steps after which adapters are kept: each is twice the one before."""
        return tuple(self.steps // 2**i for i in (4, 3, 2, 1, 0))

    @property
    def rate_steps(self) -> int:
        """The number of steps after which learning rates are compared."""
        return self.steps // 4

    def seeds_of(self, form: str) -> range:
        return range(self.seeds if form in (IP_ADAPTER, SIMPLE) else min(self.seeds, self.other_seeds))

    def runs(self, *forms: str) -> list[tuple[str, int]]:
        """List (form, seed) of the adapters of these forms, all forms of a seed before the next seed."""
        return [(form, seed) for seed in range(self.seeds) for form in forms if seed in self.seeds_of(form)]

    def plan(self, form: str, seed: int, rate: float) -> Plan:
        """Return the plan for one adapter. The learning rate is constant after the warm-up."""
        name = f"{form}-{seed}" if seed < RATE_SEED else f"{form}-rate-{rate:g}"
        often = max(1, self.steps // 8)
        settings: dict[str, Any] = {"warmup": max(1, self.steps // 80), "decay": 0.0, "ema": 0.999, "bf16": True}
        return Plan(name, self.steps, self.batch, rate, **settings, seed=seed, device=self.device, save_every=often, validate_every=often)

    def hours(self) -> float:
        """Estimate the hours on one core of a CPU, at 49 ms per training picture and 0.1 s per drawing of the mini world."""
        runs = len(self.runs(*self.forms))
        steps = runs * self.steps + len(self.forms) * len(self.rates) * self.rate_steps
        grids = 10 * (5 * runs + 2 * 2 * self.seeds + len(self.forms))  # four tasks, finest layers; confirmation; validation
        few = self.few * (4 * runs + len(self.forms) * len(self.rates))
        return (0.049 * self.batch * steps + 0.1 * self.prompts * (grids + few)) / 3600


# A tiny study that runs everything in minutes; its numbers are meaningless.
SMOKE = Study(steps=16, batch=4, rates=(1e-3, 3e-3), seeds=2, other_seeds=1, prompts=4, few=2, draw_steps=2, resamples=200)
SIZES = ("seeds", "other_seeds", "forms", "device", "level", "resamples")  # settings that change no unit of work


@dataclass(frozen=True)
class Workspace:
    """A study, its inputs and the locations of its files.

    `source`: base model and pictures. `adapters`: folder of the finished adapters. `state`: folder of all other files, with one
    subfolder per value of `made_from`. `scorer`: the name of a CLIP (`clip_score.find`). `made_from`: see `with_fingerprints`. `command`:
    the command that the cards of the adapters name.
    """

    study: Study
    source: TrainingSource
    adapters: Path
    state: Path
    scorer: str
    made_from: dict[str, Any] = field(default_factory=dict)
    command: str = "python -m eval ablation"

    @property
    def work(self) -> Path:
        """The folder for unfinished and intermediate work."""
        return self.state / hashlib.sha256(json.dumps(self.made_from).encode()).hexdigest()[:8]

    @property
    def made(self) -> dict[str, str]:
        """The commit of the code and the name of the processor or GPU, for what is computed now."""
        return made_on(self.study.device)

    def adapter(self, plan: Plan, step: int) -> Path:
        """Return the file of an adapter after some steps of its training."""
        if step == self.study.steps and plan.seed < RATE_SEED:
            return self.adapters / f"{plan.name}.safetensors"
        return self.work / f"{plan.name}-{step}.safetensors"

    def card(self, plan: Plan, step: int) -> dict[str, Any]:
        """Return the card of an adapter after some steps of its training, or {} if the adapter does not exist."""
        path = self.adapter(plan, step)
        return read_json(path.with_suffix(".json")) if path.exists() else {}

    def bench(self, split: str = "test") -> Bench:
        """Build the bench that draws and scores a set of prompts. For a user's pictures, the prompts are the held-out pictures."""
        return _bench_once(self.source, self.scorer, self.study, split, self.state)

    def with_fingerprints(self) -> Workspace:
        """Return a copy with `made_from` set: fingerprints of the weights, the data, the scorer and the source files, and the settings."""
        bench = self.bench()
        parts = {name: getattr(bench.pipeline, name) for name in ("unet", "vae", "text", "image")} | {"judge": bench.judge}
        own = self.source.data
        data = self.source.pictures if own is None else captioned_files(own, self.state / "cache").made_from()
        weights = {name: fingerprint(part) for name, part in parts.items() if part is not None}
        settings = {key: value for key, value in asdict(self.study).items() if key not in SIZES}
        made_from = {**weights, "data": data, "scorer": bench.scorer.name, "source": source_hash(), "settings": settings}
        return replace(self, made_from=json.loads(json.dumps(made_from)))

    def setting(self) -> Setting:
        """Prepare the base model and pictures that all forms are trained on."""
        return _prepare_once(self.source, self.state, self.study.device)


def source_hash(paths: Iterable[Path] | None = None) -> str:
    """Hash source files, by default those of `SOURCES`, to eight hex digits."""
    digest = hashlib.sha256()
    for path in sorted(paths or (path for package in SOURCES for path in (ROOT / package).rglob("*.py"))):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


@functools.cache
def made_on(device: str) -> dict[str, str]:
    """Return the commit of the code and the name of the processor or GPU."""
    return {"commit": code_version(), "processor": processor(device)}


@functools.lru_cache(maxsize=len(SPLITS))  # per process
def _bench_once(source: TrainingSource, scorer: str, study: Study, split_name: str, state: Path) -> Bench:
    if split_name != "test":
        bench = _bench_once(source, scorer, study, "test", state)
        n = study.prompts * (2 if split_name == "confirm" else 1)
        return bench if source.data else replace(bench, prompts=Prompts.of_the_world(n, SPLITS[split_name]))
    pipeline, judge = load(source.base, (), source.image_encoder, device=study.device), None
    if source.data is None:
        prompts = Prompts.of_the_world(study.prompts, SPLITS[split_name])
        judge = load_judge(source.base / "judge.safetensors").to(study.device)
    else:
        held_out = split(captioned_files(source.data, state / "cache"))[1]
        prompts = Prompts.of_files([held_out[i] for i in range(min(study.prompts, len(held_out)))], pipeline.native_size[0])
    return Bench(pipeline, prompts, clip_score.find(scorer, study.device), judge, study.draw_steps, study.guidance)


@functools.cache  # once per process
def _prepare_once(source: TrainingSource, folder: Path, device: str) -> Setting:
    return prepare(source, folder, device)
