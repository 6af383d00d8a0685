"""The paper's claim, measured: decoupled against concatenated.  `python -m eval ablation`

Two questions that the paper's comparison (section 4.4.1, Figure 10) asks at once: whose keys and values read the image tokens,
and whose softmax weighs them. Every form is trained by the recipe of train/adapter.py from the same initial projection, on the
same pictures in the same order with the same noise; only `fuse` and `own` differ. A rate for each form comes from one small
grid. What they draw is read by eval/tasks.py.

Work is shared out to processes of one thread each, so that no number depends on how many cores a machine has. A unit of work
(a rate, an adapter, ...) is done once: what it found is kept in a file, and all of them in results/ablation.json, from which
another machine goes on.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
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
from eval import attributes, clip_score
from eval.mass import image_mass
from eval.tasks import Bench, Prompts, Row, drawing_of
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
    few: tuple[float, ...]  # for the tasks and shares that are not the primary endpoint's
    wide: bool = False


SUM = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (0.5, 1.0)  # lambda scales what is read
ODDS = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0), (1.0, 8.0)  # lambda scales the odds of being looked at
FORMS = {
    "ip_adapter": Form("IP-Adapter: own projections, own softmax", True, decoupled, *SUM),
    "shared": Form("the text's projections, own softmax", False, decoupled, *SUM),
    "concatenated": Form("own projections, joint softmax", True, concatenated, *ODDS),
    "simple": Form("the simple adapter: the text's projections, joint softmax", False, concatenated, *ODDS),
    "simple_wide": Form("the simple adapter with as many parameters", False, concatenated, *ODDS, wide=True),
}
FIRST, PRIMARY = "ip_adapter", "simple"  # the paper's comparison: the second minus the first is the primary difference
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
    prompts: int = 80
    draw_steps: int = 12
    check_steps: int = 50
    guidance: float = 4.0
    forms: tuple[str, ...] = tuple(FORMS)
    level: float = 0.8
    resamples: int = 2000
    device: str = "cpu"

    def plan(self, form: str, seed: int, rate: float) -> Plan:
        every = round(self.steps * SHARES[0])
        name, kept = f"{form}-{seed}", {"ema": 0.98, "save_every": 50, "validate_every": every}
        settings: dict[str, Any] = {"warmup": 50, "bf16": True, "seed": seed, "device": self.device, **kept}
        return Plan(name, self.steps, self.batch, rate, **settings)

    def rate_plan(self, form: str, rate: float) -> Plan:
        steps = self.rate_steps
        return replace(self.plan(form, 1000, rate), name=f"{form}-rate-{rate:g}", steps=steps, validate_every=steps)

    def drawing(self) -> dict[str, Any]:
        """What pictures depend on beside the weights."""
        return {key: getattr(self, key) for key in ("prompts", "draw_steps", "guidance")}


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
    """Where a study finds its base, whose UNet has the fingerprint `base`, and the CLIP that scores it (`clip_score.find`), and
    keeps its work: `shipped` the finished adapters, `state` all else."""

    source: Source
    shipped: Path
    state: Path
    scorer: str
    base: str = ""

    def adapter(self, form: str, seed: int, share: float = 1.0) -> Path:
        name = f"{form}-{seed}"
        return self.shipped / f"{name}.safetensors" if share == 1 else self.state / f"{name}-{share:g}.safetensors"

    def card(self, form: str, seed: int, share: float = 1.0) -> dict[str, Any]:
        path = self.adapter(form, seed, share)
        return weights_convert.read_json(path.with_suffix(".json")) if path.exists() else {}

    def bench(self, study: Study) -> Bench:
        source, judge = self.source, None
        pipeline, scorer = (
            load(source.base, (), source.image_encoder, device=study.device),
            clip_score.find(self.scorer),
        )
        if source.data is None:
            prompts, judge = Prompts.of_the_world(study.prompts), attributes.load(source.base / "judge.safetensors")
        else:
            held_out = captioned_files(source.data)[::50][: study.prompts]
            prompts = Prompts.of_files(held_out, pipeline.native_size[0])
        return Bench(pipeline, prompts, scorer, judge, study.draw_steps, study.guidance)

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
    if path.exists() and (found := weights_convert.read_json(path))["key"] == plain(key):
        value: T = found["value"]
        return value
    value = make()
    weights_convert.write_json(path, {"key": key, "value": value})
    return value


def try_rate(place: Place, study: Study, form: str, rate: float) -> float:
    """How much a picture tells after a short run at this rate (seed 1000): `gain_shuffled` of train/adapter.py."""
    plan, form_ = study.rate_plan(form, rate), FORMS[form]

    def make() -> float:
        setting = place.setting(study)
        _, log = training.fit(setting, untrained(setting, form_, 1000), plan, place.state, form_.fuse)
        return float(log[-1]["gain_shuffled"])

    return kept(place.state / f"{plan.name}.json", {"base": place.base, "plan": asdict(plan)}, make)


def gains_of(row: dict[str, Any]) -> dict[str, Any]:
    """The step of a row of a training's log, and what it says of held-out pictures."""
    return {key: row[key] for key in ("step", "held_out", "gain_zero", "gain_shuffled")}


def train(place: Place, study: Study, form: str, seed: int, rate: float) -> None:
    """Trains one adapter; writes what it is after each share of its steps, where that is not there."""
    plan, fuse = study.plan(form, seed, rate), FORMS[form].fuse
    settings, state = plain({"base": place.base, **asdict(plan)}), place.state / f"{plan.name}.pt"
    missing = [share for share in SHARES if place.card(form, seed, share).get("settings") != settings]
    if not missing:
        return
    if (found := checkpoint.load(state)) and found["step"] > round(missing[0] * plan.steps):
        state.unlink()  # what a share was can't be had from a state that is past it
    setting = place.setting(study)
    for share in SHARES:
        start = untrained(setting, FORMS[form], seed)
        adapter, log = training.fit(setting, start, plan, place.state, fuse, until=round(share * plan.steps))
        size, gains = sum(p.numel() for p in adapter.parameters()), [gains_of(row) for row in log if "held_out" in row]
        card = {"command": "python -m eval ablation", "settings": settings, "parameters": size, "gains": gains}
        if share in missing:
            weights_convert.save_adapter(adapter, setting.pipeline.unet, place.adapter(form, seed, share), card)


def score(place: Place, study: Study, form: str, seed: int) -> list[Row]:
    """Every row of one adapter; those of the conflict also after the parts of its training."""
    form_, bench = FORMS[form], place.bench(study)
    rows: list[Row] = []
    for share in SHARES:
        adapter = weights_convert.load_adapter(place.adapter(form, seed, share), bench.pipeline.unet).to(study.device)
        where = {"form": form, "seed": seed, "share": share}
        whole = share == 1
        rows += bench.cell("conflict", adapter, form_.fuse, form_.lambdas if whole else form_.few, **where)
        if whole:
            for task in ("picture", "agreeing"):
                rows += bench.cell(task, adapter, form_.fuse, form_.few, **where)
            rows += bench.controls(adapter, form_.fuse, **where)
    return rows


def unit(place: Place, study: Study, form: str, seed: int, rate: float) -> list[Row]:
    """Trains an adapter, draws with it, and reads what it drew."""
    plan, path = study.plan(form, seed, rate), place.state / f"rows-{form}-{seed}.json"
    key = {"base": place.base, "plan": asdict(plan), "drawing": study.drawing()}

    def make() -> list[Row]:
        train(place, study, form, seed, rate)
        return score(place, study, form, seed)

    if not place.adapter(form, seed).exists():  # rows without the adapter that drew them can't be drawn again
        path.unlink(missing_ok=True)
    return kept(path, key, make)


def masses(place: Place, study: Study, form: str, rate: float) -> list[Row]:
    """`image_mass` of a joint softmax, seed 0: untrained, and after each share of the training."""

    def make() -> list[Row]:
        train(place, study, form, 0, rate)
        bench = place.bench(study).first(MASS_PROMPTS)
        unet = bench.pipeline.unet
        adapters = {0.0: untrained(place.setting(study), FORMS[form], 0)}
        adapters |= {share: weights_convert.load_adapter(place.adapter(form, 0, share), unet) for share in SHARES}
        rows = ((share, image_mass(bench, adapter.to(study.device))) for share, adapter in adapters.items())
        return [{"form": form, "share": share, **row} for share, found in rows for row in found]

    key = {"base": place.base, "plan": asdict(study.plan(form, 0, rate)), "drawing": study.drawing()}
    return kept(place.state / f"mass-{form}.json", key, make)


def anchors(place: Place, study: Study) -> list[Row]:
    key = {"base": place.base, "drawing": study.drawing()}
    return kept(place.state / "anchors.json", key, lambda: place.bench(study).anchors())


def checked(place: Place, study: Study, form: str, rate: float) -> list[Row]:
    """The first of a form's `few` rows again, seed 0, drawn in `check_steps`: are so few steps enough to compare?"""

    def make() -> list[Row]:
        bench, form_ = replace(place.bench(study), steps=study.check_steps), FORMS[form]
        adapter = weights_convert.load_adapter(place.adapter(form, 0), bench.pipeline.unet).to(study.device)
        where = {"form": form, "seed": 0, "share": 1.0, "steps": study.check_steps}
        return bench.cell("conflict", adapter, form_.fuse, form_.few[:1], **where)

    key = {"base": place.base, "plan": asdict(study.plan(form, 0, rate)), "drawing": study.drawing()}
    return kept(place.state / f"steps-{form}.json", key | {"steps": study.check_steps}, make)


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


def go_on(place: Place, results: Mapping[str, Any]) -> None:
    """Puts the units of a results file where they are looked for, unless newer ones are there."""
    for name, found in results["units"].items():
        if not (path := place.state / f"{name}.json").exists():
            weights_convert.write_json(path, found)


def evaluate(place: Place, study: Study, jobs: int) -> dict[str, Any]:
    """Does every unit of work that is not done; returns them all, and what is needed to read them."""
    bench = place.bench(study)  # what will read the pictures must be there before hours of training
    place = replace(place, base=fingerprint(bench.pipeline.unet))
    place.setting(study)  # computed once, before many processes want it
    joint = [form for form in study.forms if FORMS[form].fuse is concatenated]
    with workers(jobs) as pool:
        grid = {
            (form, rate): partial(try_rate, place, study, form, rate) for form in study.forms for rate in study.rates
        }
        gains = shared_out(pool, grid, "rates")
        rates = {form: max(study.rates, key=lambda rate: gains[form, rate]) for form in study.forms}
        # seed by seed, so that what is done early is already a comparison
        pairs = list(itertools.product(range(study.seeds), study.forms))
        work: dict[str, Callable[[], list[Row]]] = {"anchors": partial(anchors, place, study)}
        work |= {f"rows-{form}-{seed}": partial(unit, place, study, form, seed, rates[form]) for seed, form in pairs}
        shared_out(pool, work, "adapters")
        more = {f"mass-{form}": partial(masses, place, study, form, rates[form]) for form in joint}
        more |= {f"steps-{form}": partial(checked, place, study, form, rates[form]) for form in (FIRST, PRIMARY)}
        shared_out(pool, more, "image mass, more steps")
    names = [*(study.rate_plan(*pair).name for pair in grid), *work, *more]
    cards = {form: [place.card(form, seed) for seed in range(study.seeds)] for form in study.forms}
    prompts = bench.prompts
    results: dict[str, Any] = {
        "study": asdict(study),
        "scorer": bench.scorer.name,
        "prompts": {"agreeing": prompts.own, "conflict": prompts.other, "seeds": list(range(len(prompts.own)))},
        "rates": {
            form: {"chosen": rates[form], "gains": {f"{rate:g}": gains[form, rate] for rate in study.rates}}
            for form in study.forms
        },
        "parameters": {form: each[0]["parameters"] for form, each in cards.items()},
        "gains": {form: [card["gains"] for card in each] for form, each in cards.items()},
        "units": {name: weights_convert.read_json(place.state / f"{name}.json") for name in names},
    }
    if prompts.truth is not None:
        own = attributes.truth(prompts.truth.references)
        results["truth"] = {
            "wanted": {"concept": prompts.truth.concept.tolist(), "background": prompts.truth.background.tolist()},
            "own": {key: own[key].tolist() for key in ("concept", "background")},
            "drawing": [drawing_of(scene) for scene in prompts.truth.references],
        }
    return results
