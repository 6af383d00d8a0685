"""The paper's claim, measured: decoupled against concatenated.  `python -m eval ablation`

Two questions that the paper's comparison (section 4.4.1, Figure 10) asks at once: whose keys and values read the image tokens,
and whose softmax weighs them. Every form is trained by the recipe of train/adapter.py from the same initial projection, on the
same pictures in the same order with the same noise; only `fuse` and `own` differ. A rate for each form comes from one small
grid. What they draw is read by eval/tasks.py.

Work is shared out to processes of one thread each, so that no number depends on how many cores a machine has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

import weights_convert
from eval import attributes, clip_score, world
from eval.mass import image_mass
from eval.tasks import Bench, Row
from model.adapter import IPAdapter
from model.attention import Fuse, concatenated, decoupled
from sampling.pipeline import load
from train import adapter as training
from train.adapter import Setting, Source
from train.loop import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """One way to let a picture in. `own`: W'_k and W'_v of its own, or the text's; `tokens`: how many image tokens, if not the
    usual number; `fine`: it reads fine features (Plus)."""

    name: str
    own: bool
    fuse: Fuse
    lambdas: tuple[float, ...]
    few: tuple[float, ...]  # for the tasks and shares that are not the primary endpoint's
    tokens: int | None = None
    fine: bool = False


SUM = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (0.5, 1.0)  # lambda scales what is read
ODDS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0), (1.0, 8.0)  # lambda scales the odds of being looked at
FORMS = {
    "ip_adapter": Form("IP-Adapter: own projections, own softmax", True, decoupled, *SUM),
    "shared": Form("the text's projections, own softmax", False, decoupled, *SUM),
    "concatenated": Form("own projections, joint softmax", True, concatenated, *ODDS),
    "simple": Form("the simple adapter: the text's projections, joint softmax", False, concatenated, *ODDS),
    "simple_wide": Form("the simple adapter with as many parameters", False, concatenated, *ODDS, tokens=10),
    "plus": Form("Plus: fine features, own projections, own softmax", True, decoupled, *SUM, fine=True),
}
SHARES = (0.25, 0.5, 1.0)
MASS_PROMPTS = 32


@dataclass(frozen=True)
class Study:
    """How much of everything; the defaults are the published run."""

    steps: int = 500
    batch: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3, 27e-3)
    rate_steps: int = 100
    seeds: int = 5
    prompts: int = 96
    draw_steps: int = 12
    guidance: float = 4.0
    forms: tuple[str, ...] = tuple(FORMS)
    level: float = 0.8
    resamples: int = 2000

    def plan(self, form: str, seed: int, rate: float) -> Plan:
        every = round(self.steps * SHARES[0])
        name, kept = f"{form}-{seed}", {"ema": 0.98, "save_every": 50, "validate_every": every}
        return Plan(name, self.steps, self.batch, rate, warmup=50, bf16=True, seed=seed, **kept)

    def rate_plan(self, form: str, rate: float) -> Plan:
        steps = self.rate_steps
        return replace(self.plan(form, 1000, rate), name=f"{form}-rate-{rate:g}", steps=steps, validate_every=steps)


SMOKE = Study(steps=8, batch=4, rates=(1e-3, 3e-3), rate_steps=4, seeds=2, prompts=4, draw_steps=2, resamples=50)


@dataclass(frozen=True)
class Place:
    """Where a study finds its base and keeps its work: `shipped` the finished adapters, `state` all else."""

    source: Source
    shipped: Path
    state: Path

    def adapter(self, form: str, seed: int, share: float = 1.0) -> Path:
        name = f"{form}-{seed}"
        return self.shipped / f"{name}.safetensors" if share == 1 else self.state / f"{name}-{share:g}.safetensors"

    def card(self, form: str, seed: int) -> dict[str, Any]:
        return weights_convert.read_json(self.adapter(form, seed).with_suffix(".json"))

    def bench(self, study: Study) -> Bench:
        base = self.source.base
        return Bench.of(base, load(base, ()), study.prompts, study.draw_steps, study.guidance)

    def setting(self, form: str) -> Setting:
        return training.prepare(replace(self.source, fine=FORMS[form].fine), self.state)


def untrained(setting: Setting, form: Form, seed: int) -> IPAdapter:
    """What a form starts from: of one seed, all forms with as many tokens have the same projection."""
    torch.manual_seed(seed)
    return setting.adapter(form.own, form.tokens)


def try_rate(place: Place, study: Study, form: str, rate: float) -> float:
    """How much a picture tells after a short run at this rate (seed 1000): `gain_shuffled` of train/adapter.py."""
    setting, form_ = place.setting(form), FORMS[form]
    start = untrained(setting, form_, 1000)
    _, log = training.fit(setting, start, study.rate_plan(form, rate), place.state, form_.fuse)
    return float(log[-1]["gain_shuffled"])


def train(place: Place, study: Study, form: str, seed: int, rate: float) -> None:
    """Trains one adapter; writes what it is after each share of its steps, unless the files are there."""
    files = {share: place.adapter(form, seed, share) for share in SHARES}
    if all(path.exists() for path in files.values()):
        return
    setting, plan, fuse = place.setting(form), study.plan(form, seed, rate), FORMS[form].fuse
    for share, path in files.items():
        start = untrained(setting, FORMS[form], seed)
        kept, log = training.fit(setting, start, plan, place.state, fuse, until=round(share * plan.steps))
        size, gains = sum(p.numel() for p in kept.parameters()), [row for row in log if "held_out" in row]
        card = {"command": "python -m eval ablation", "settings": asdict(plan), "parameters": size, "gains": gains}
        weights_convert.save_adapter(kept, setting.pipeline.unet, path, card)


def score(place: Place, study: Study, form: str, seed: int) -> list[Row]:
    """Every row of one adapter; those of the conflict also after the parts of its training."""
    form_, bench = FORMS[form], place.bench(study)
    rows: list[Row] = []
    for share in SHARES:
        adapter = weights_convert.load_adapter(place.adapter(form, seed, share), bench.pipeline.unet)
        where = {"form": form, "seed": seed, "share": share}
        whole = share == 1
        rows += bench.cell("conflict", adapter, form_.fuse, form_.lambdas if whole else form_.few, **where)
        if whole:
            for task in ("picture", "agreeing"):
                rows += bench.cell(task, adapter, form_.fuse, form_.few, **where)
            rows += bench.controls(adapter, form_.fuse, **where)
    return rows


def kept(path: Path, made_from: Sequence[Path], study: Study, make: Callable[[], list[Row]]) -> list[Row]:
    """make(), or what it gave when it was last called for the same weights and the same way to draw."""
    digests = [weights_convert.sha256(file) for file in made_from]
    key = {"sha256": digests, "prompts": study.prompts, "steps": study.draw_steps, "guidance": study.guidance}
    if path.exists() and (found := weights_convert.read_json(path))["key"] == key:
        return list(found["rows"])
    rows = make()
    weights_convert.write_json(path, {"key": key, "rows": rows})
    return rows


def rows_of(place: Place, study: Study, form: str, seed: int) -> list[Row]:
    files = [place.adapter(form, seed, share) for share in SHARES]
    return kept(place.state / f"rows-{form}-{seed}.json", files, study, partial(score, place, study, form, seed))


def masses_of(place: Place, study: Study, form: str) -> list[Row]:
    """`image_mass` of a joint softmax, seed 0: untrained, and after each share of the training."""

    def make() -> list[Row]:
        bench = place.bench(study).first(MASS_PROMPTS)
        unet = bench.pipeline.unet
        adapters = {0.0: untrained(place.setting(form), FORMS[form], 0)}
        adapters |= {share: weights_convert.load_adapter(place.adapter(form, 0, share), unet) for share in SHARES}
        return [
            {"form": form, "share": share, **row} for share, one in adapters.items() for row in image_mass(bench, one)
        ]

    files = [place.adapter(form, 0, share) for share in SHARES]
    return kept(place.state / f"mass-{form}.json", files, study, make)


def anchors_of(place: Place, study: Study) -> list[Row]:
    return kept(
        place.state / "anchors.json",
        [place.source.base / "unet.safetensors"],
        study,
        lambda: place.bench(study).anchors(),
    )


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; what waits is dropped when something is raised."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def shared_out(pool: ProcessPoolExecutor, work: Iterable[Callable[[], T]], what: str) -> list[T]:
    """The results of picklable calls, in their order."""
    futures = [pool.submit(call) for call in work]
    for done in tqdm(as_completed(futures), total=len(futures), desc=what, position=0):
        done.result()
    return [future.result() for future in futures]


def rates_of(pool: ProcessPoolExecutor, place: Place, study: Study) -> dict[str, dict[float, float]]:
    """{form: {rate: gain after a short run}}."""
    grid = list(itertools.product(study.forms, study.rates))
    gains = shared_out(pool, [partial(try_rate, place, study, form, rate) for form, rate in grid], "rates")
    found: dict[str, dict[float, float]] = {form: {} for form in study.forms}
    for (form, rate), gain in zip(grid, gains, strict=True):
        found[form][rate] = gain
    return found


def unit(place: Place, study: Study, form: str, seed: int, rate: float) -> list[Row]:
    """Trains an adapter, draws with it, and reads what it drew; what is done is not done again."""
    train(place, study, form, seed, rate)
    return rows_of(place, study, form, seed)


def evaluate(place: Place, study: Study, jobs: int) -> dict[str, Any]:
    """Trains what is missing, draws and reads every cell; what is done is kept in `place` and not done again."""
    place.bench(study)  # what will read the pictures must be there before hours of training
    for fine in {FORMS[form].fine for form in study.forms}:  # once, before many processes want it
        training.prepare(replace(place.source, fine=fine), place.state)
    with workers(jobs) as pool:
        gains = rates_of(pool, place, study)
        rates = {form: max(tried, key=tried.__getitem__) for form, tried in gains.items()}
        units = itertools.product(range(study.seeds), study.forms)  # so that what is done early is already a comparison
        work = [partial(unit, place, study, form, seed, rates[form]) for seed, form in units]
        rows = list(itertools.chain(*shared_out(pool, [*work, partial(anchors_of, place, study)], "adapters")))
        joint = [partial(masses_of, place, study, form) for form in study.forms if FORMS[form].fuse is concatenated]
        masses = list(itertools.chain(*shared_out(pool, joint, "image mass")))
    test = world.task(study.prompts, seed=3)
    own = attributes.truth(test.references)
    cards = {form: [place.card(form, seed) for seed in range(study.seeds)] for form in study.forms}
    return {
        "study": asdict(study),
        "rates": {
            form: {"chosen": rates[form], "gains": {f"{r:g}": x for r, x in gains[form].items()}}
            for form in study.forms
        },
        "parameters": {form: each[0]["parameters"] for form, each in cards.items()},
        "scorer": clip_score.NAME,
        "gains": {form: [card["gains"] for card in each] for form, each in cards.items()},
        "wanted": {"concept": test.concept.tolist(), "background": test.background.tolist()},
        "own": {key: own[key].tolist() for key in ("concept", "background")},
        "drawing": [scene.drawing for scene in test.references],
        "rows": rows,
        "mass": masses,
    }
