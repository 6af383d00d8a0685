"""The paper's claim, measured: decoupled against concatenated.  `python -m eval ablation`

Two questions that the paper's comparison (section 4.4.1, Figure 10) asks at once: whose keys and values read the image tokens,
and whose softmax weighs them. Every form is trained by the recipe of train/adapter.py from the same initial projection, on the
same pictures in the same order with the same noise; only `fuse` and `own` differ. A rate for each form comes from one small
grid, by how much a picture tells after a short run. What they draw is read by eval/tasks.py. (The simple adapter with as many
parameters has more tokens, so its projection starts as another.)

Work is shared out to processes of one thread each, so that no number depends on how many cores a machine has. A unit of work
(a rate, an adapter, ...) is done once: what it found is kept in a file, and all of them in results/ablation.json, from which
another machine goes on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.files import read_json, write_json
from eval import attributes, clip_score
from eval.mass import image_mass
from eval.tasks import TASKS, Bench, Prompts, Row, drawing_of
from model.adapter import IPAdapter
from model.attention import Fuse, concatenated, decoupled
from sampling.pipeline import load
from train import adapter as training
from train import checkpoint
from train.adapter import Setting, Source
from train.data import captioned_files, fingerprint
from train.loop import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """One way to let a picture in. `own`: W'_k and W'_v of its own, or the text's; `wide`: tokens enough for as many
    parameters as those have."""

    name: str
    own: bool
    fuse: Fuse
    lambdas: tuple[float, ...]
    few: tuple[float, ...]  # of them, for the parts of the training
    wide: bool = False


SUM = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (0.5, 1.0)  # lambda scales what is read
ODDS = (1 / 4096, 1 / 512, 1 / 64, 1 / 8, 1.0, 8.0, 64.0), (1 / 8, 8.0)  # lambda scales the odds of being looked at
FORMS = {
    "ip_adapter": Form("IP-Adapter: own projections, own softmax", True, decoupled, *SUM),
    "shared": Form("the text's projections, own softmax", False, decoupled, *SUM),
    "concatenated": Form("own projections, joint softmax", True, concatenated, *ODDS),
    "simple": Form("the simple adapter: the text's projections, joint softmax", False, concatenated, *ODDS),
    "simple_wide": Form("the simple adapter with as many parameters", False, concatenated, *ODDS, wide=True),
}
# The paper's comparison: the second minus the first is the primary difference.
BASELINE, PRIMARY = "ip_adapter", "simple"
SHARES = (0.25, 0.5, 1.0)
MASS_PROMPTS = 32


@dataclass(frozen=True)
class Study:
    """How much of everything; the defaults are the published run. `seeds` grow one by one, up to `most_seeds`, until the
    primary difference is known to `half_width`."""

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

    def plan(self, form: str, seed: int, rate: float) -> Plan:
        often: dict[str, Any] = {"save_every": 50, "validate_every": round(self.steps * SHARES[0])}
        settings: dict[str, Any] = {"warmup": 50, "ema": 0.98, "bf16": True, "seed": seed, "device": self.device}
        return Plan(f"{form}-{seed}", self.steps, self.batch, rate, **settings, **often)

    def rate_plan(self, form: str, rate: float) -> Plan:
        steps = self.rate_steps
        return replace(self.plan(form, 1000, rate), name=f"{form}-rate-{rate:g}", steps=steps, validate_every=steps)


SMOKE = Study(
    steps=8,
    batch=4,
    rates=(1e-3, 3e-3),
    rate_steps=4,
    seeds=2,
    most_seeds=2,
    prompts=4,
    draw_steps=2,
    check_steps=3,
    resamples=50,
)


@dataclass(frozen=True)
class Place:
    """Where a study finds its base and the CLIP that scores it (`clip_score.find`), and keeps its work: `shipped` the finished
    adapters, `state` all else, in a folder for what everything is `made_from`."""

    source: Source
    shipped: Path
    state: Path
    scorer: str
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.state / hashlib.sha256(json.dumps(self.made_from).encode()).hexdigest()[:8]

    def adapter(self, form: str, seed: int, share: float = 1.0) -> Path:
        name = f"{form}-{seed}"
        return self.shipped / f"{name}.safetensors" if share == 1 else self.work / f"{name}-{share:g}.safetensors"

    def card(self, form: str, seed: int, share: float = 1.0) -> dict[str, Any]:
        path = self.adapter(form, seed, share)
        return read_json(path.with_suffix(".json")) if path.exists() else {}

    def bench(self, study: Study) -> Bench:
        source, judge = self.source, None
        pipeline = load(source.base, (), source.image_encoder, device=study.device)
        if source.data is None:
            prompts, judge = Prompts.of_the_world(study.prompts), attributes.load(source.base / "judge.safetensors")
        else:
            held_out = captioned_files(source.data)[::50][: study.prompts]
            prompts = Prompts.of_files(held_out, pipeline.native_size[0])
        scorer = clip_score.find(self.scorer, study.device)
        return Bench(pipeline, prompts, scorer, judge, study.draw_steps, study.guidance)

    def found(self, bench: Bench) -> Place:
        """The same, knowing what everything is made from: weights by their fingerprints, the data, the CLIP."""
        parts = {name: getattr(bench.pipeline, name) for name in ("unet", "vae", "text", "image")}
        data = None if self.source.data is None else captioned_files(self.source.data)
        listed = [[file.name, text] for file, text in data or []]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:8] if data else self.source.pictures
        weights = {name: fingerprint(part) for name, part in parts.items() if part is not None}
        return replace(self, made_from={**weights, "data": digest, "scorer": bench.scorer.name})

    def setting(self, study: Study) -> Setting:
        return prepared(self.source, self.state, study.device)


@functools.cache
def prepared(source: Source, folder: Path, device: str) -> Setting:
    """What every form is trained on; once in a process, as nothing changes it."""
    return training.prepare(source, folder, device)


def as_many(setting: Setting) -> int:
    """The tokens of which a projection has about as many parameters as one of the usual number beside W'_k and W'_v."""

    def size(own: bool, tokens: int | None = None) -> int:
        return sum(p.numel() for p in setting.adapter(own, tokens).parameters())

    one, two = size(False, 1), size(False, 2)
    return 1 + round((size(True) - one) / (two - one))


def untrained(setting: Setting, form: Form, seed: int) -> IPAdapter:
    """What a form starts from: of one seed, all forms with as many tokens have the same projection."""
    tokens = as_many(setting) if form.wide else None
    torch.manual_seed(seed)
    return setting.adapter(form.own, tokens)


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, which has no tuples."""
    return dict(json.loads(json.dumps(data)))


def kept(path: Path, key: dict[str, Any], make: Callable[[], T]) -> T:
    """make(), or what it gave when it was last called for the same key; a value that JSON holds, as the key."""
    if path.exists() and (found := read_json(path))["key"] == plain(key):
        value: T = found["value"]
        return value
    value = make()
    write_json(path, {"key": key, "value": value})
    return value


def try_rate(place: Place, study: Study, form: str, rate: float) -> float | None:
    """How much a picture tells after a short run at this rate (seed 1000), `gain_shuffled` of train/adapter.py; None if the loss
    was not finite."""
    plan, form_ = study.rate_plan(form, rate), FORMS[form]

    def make() -> float | None:
        setting = place.setting(study)
        try:
            _, log = training.fit(setting, untrained(setting, form_, 1000), plan, place.work, form_.fuse)
        except FloatingPointError:
            return None
        return float(log[-1]["gain_shuffled"])

    return kept(place.work / f"{plan.name}.json", {"plan": asdict(plan)}, make)


def gains_of(row: dict[str, Any]) -> dict[str, Any]:
    """The step of a row of a training's log, and what it says of held-out pictures."""
    return {key: row[key] for key in ("step", "held_out", "gain_zero", "gain_shuffled")}


def train(place: Place, study: Study, form: str, seed: int, rate: float) -> None:
    """Trains one adapter; writes what it is after each share of its steps, where that is not there."""
    plan, fuse = study.plan(form, seed, rate), FORMS[form].fuse
    settings, state = plain({"made_from": place.made_from, **asdict(plan)}), place.work / f"{plan.name}.pt"
    missing = [share for share in SHARES if place.card(form, seed, share).get("settings") != settings]
    if not missing:
        return
    if (found := checkpoint.load(state)) and found["step"] > round(missing[0] * plan.steps):
        state.unlink()  # what a share was can't be had from a state that is past it
    setting = place.setting(study)
    for share in SHARES:
        start = untrained(setting, FORMS[form], seed)
        adapter, log = training.fit(setting, start, plan, place.work, fuse, until=round(share * plan.steps))
        size, gains = sum(p.numel() for p in adapter.parameters()), [gains_of(row) for row in log if "held_out" in row]
        card = {"command": "python -m eval ablation", "settings": settings, "parameters": size, "gains": gains}
        if share in missing:
            save_adapter(adapter, setting.pipeline.unet, place.adapter(form, seed, share), card)


def score(place: Place, study: Study, form: str, seed: int) -> list[Row]:
    """Every row of one adapter; those of the conflict also after the parts of its training."""
    form_, bench = FORMS[form], place.bench(study)
    rows: list[Row] = []
    for share in SHARES:
        adapter = load_adapter(place.adapter(form, seed, share), bench.pipeline.unet).to(study.device)
        where = {"form": form, "seed": seed, "share": share}
        for task in TASKS if share == 1 else ("conflict",):
            rows += bench.cell(task, adapter, form_.fuse, form_.few if share < 1 else lambdas_of(form_, task), **where)
    return rows + bench.controls(adapter, form_.fuse, **where)


def lambdas_of(form: Form, task: str) -> tuple[float, ...]:
    return form.lambdas if task == "conflict" else (1.0,)


def unit(place: Place, study: Study, form: str, seed: int, rate: float) -> list[Row]:
    """Trains an adapter, draws with it, and reads what it drew."""

    def make() -> list[Row]:
        train(place, study, form, seed, rate)
        return score(place, study, form, seed)

    path, key = place.work / f"rows-{form}-{seed}.json", key_of(study, form, seed, rate)
    if place.card(form, seed).get("settings") != plain({"made_from": place.made_from, **key["plan"]}):
        path.unlink(missing_ok=True)  # rows of an adapter that is not the shipped one could not be drawn again
    return kept(path, key, make)


def key_of(study: Study, form: str, seed: int, rate: float) -> dict[str, Any]:
    """What the rows of an adapter depend on, beside what everything is made from."""
    form_ = FORMS[form]
    drawing = {key: getattr(study, key) for key in ("prompts", "draw_steps", "guidance")}
    return {"plan": asdict(study.plan(form, seed, rate)), **drawing, "lambdas": (form_.lambdas, form_.few)}


def masses(place: Place, study: Study, form: str, rate: float) -> list[Row]:
    """`image_mass` of a joint softmax, seed 0: untrained, and after each share of the training."""

    def make() -> list[Row]:
        train(place, study, form, 0, rate)
        bench = place.bench(study).first(MASS_PROMPTS)
        unet = bench.pipeline.unet
        adapters = {0.0: untrained(place.setting(study), FORMS[form], 0)}
        adapters |= {share: load_adapter(place.adapter(form, 0, share), unet) for share in SHARES}
        rows = ((share, image_mass(bench, adapter.to(study.device))) for share, adapter in adapters.items())
        return [{"form": form, "share": share, **row} for share, found in rows for row in found]

    key = key_of(study, form, 0, rate) | {"first": MASS_PROMPTS}
    return kept(place.work / f"mass-{form}.json", key, make)


def anchors(place: Place, study: Study) -> list[Row]:
    key = {key: getattr(study, key) for key in ("prompts", "draw_steps", "guidance")}
    return kept(place.work / "anchors.json", key, lambda: place.bench(study).anchors())


def checked(place: Place, study: Study, form: str, rate: float) -> list[Row]:
    """The first of a form's `few` rows again, seed 0, drawn in `check_steps`: are so few steps enough to compare?"""

    def make() -> list[Row]:
        bench, form_ = replace(place.bench(study), steps=study.check_steps), FORMS[form]
        adapter = load_adapter(place.adapter(form, 0), bench.pipeline.unet).to(study.device)
        where = {"form": form, "seed": 0, "share": 1.0, "steps": study.check_steps}
        return bench.cell("conflict", adapter, form_.fuse, form_.few[:1], **where)

    return kept(place.work / f"steps-{form}.json", key_of(study, form, 0, rate) | {"steps": study.check_steps}, make)


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; what waits is dropped when something is raised."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def shared_out(pool: ProcessPoolExecutor, work: Mapping[Any, Callable[[], T]], what: str) -> dict[Any, T]:
    """The results of picklable calls, by their names, in order."""
    futures = {name: pool.submit(call) for name, call in work.items()}
    for done in tqdm(as_completed(futures.values()), total=len(futures), desc=what, position=0):
        done.result()
    return {name: future.result() for name, future in futures.items()}


def best_rate(gains: Mapping[float, float | None], form: str) -> float:
    """The rate of the highest gain. Raises ValueError where no loss was finite."""
    finite = {rate: gain for rate, gain in gains.items() if gain is not None}
    if not finite:
        raise ValueError(f"the loss of {form} is not finite at any rate: give lower --rates")
    return max(finite, key=finite.__getitem__)


def go_on(place: Place, results: Mapping[str, Any]) -> None:
    """Puts the units of a results file where they are looked for, if they were made from the same and others are not there."""
    for name, found in results["units"].items() if results["made_from"] == place.made_from else ():
        if not (path := place.work / f"{name}.json").exists():
            write_json(path, found)


def evaluate(place: Place, study: Study, bench: Bench, jobs: int) -> dict[str, Any]:
    """Does every unit of work that is not done; returns them all, and what is needed to read them."""
    joint = [form for form in study.forms if FORMS[form].fuse is concatenated]
    grid = list(itertools.product(study.forms, study.rates))
    pairs = list(itertools.product(range(study.seeds), study.forms))  # what is done early is already a comparison
    tried = {study.rate_plan(form, rate).name: partial(try_rate, place, study, form, rate) for form, rate in grid}
    names = [*tried, "anchors", *(f"rows-{form}-{seed}" for seed, form in pairs), *(f"mass-{form}" for form in joint)]
    names += [f"steps-{form}" for form in (BASELINE, PRIMARY)]
    if not all((place.work / f"{name}.json").exists() for name in names):
        place.setting(study)  # computed once, before many processes want it
    with workers(jobs) as pool:
        gains = dict(zip(grid, shared_out(pool, tried, "rates").values(), strict=True))
        rates = {form: best_rate({rate: gains[form, rate] for rate in study.rates}, form) for form in study.forms}
        work: dict[str, Callable[[], list[Row]]] = {"anchors": partial(anchors, place, study)}
        work |= {f"rows-{form}-{seed}": partial(unit, place, study, form, seed, rates[form]) for seed, form in pairs}
        shared_out(pool, work, "adapters")
        more = {f"mass-{form}": partial(masses, place, study, form, rates[form]) for form in joint}
        more |= {f"steps-{form}": partial(checked, place, study, form, rates[form]) for form in (BASELINE, PRIMARY)}
        shared_out(pool, more, "image mass, more steps")
    cards = {form: [place.card(form, seed) for seed in range(study.seeds)] for form in study.forms}
    return {
        "made_from": place.made_from,
        "study": asdict(study),
        "scorer": bench.scorer.name,
        **asked(bench.prompts),
        "rates": {
            form: {"chosen": rates[form], "gains": {f"{rate:g}": gains[form, rate] for rate in study.rates}}
            for form in study.forms
        },
        "parameters": {form: each[0]["parameters"] for form, each in cards.items()},
        "gains": {form: [card["gains"] for card in each] for form, each in cards.items()},
        "units": {name: read_json(place.work / f"{name}.json") for name in names},
    }


def asked(prompts: Prompts) -> dict[str, Any]:
    """What was asked of every form, and where it is known what is right."""
    found: dict[str, Any] = {
        "prompts": {"agreeing": prompts.own, "conflict": prompts.other, "seeds": list(range(len(prompts.own)))}
    }
    if prompts.truth is not None:
        own = attributes.truth(prompts.truth.references)
        found["truth"] = {
            "wanted": {"concept": prompts.truth.concept.tolist(), "background": prompts.truth.background.tolist()},
            "own": {key: own[key].tolist() for key in ("concept", "background")},
            "drawing": [drawing_of(scene) for scene in prompts.truth.references],
        }
    return found
