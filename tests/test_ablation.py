"""The ablation: equal starting points, the order of the work, and a tiny study from end to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import write_world
from torch import Tensor

from checkpoints.files import write_json
from eval import __main__ as commands
from eval import clip_score
from eval.ablation import draws, report
from eval.ablation.command import TOLERANCE
from eval.ablation.forms import FORMS, IP_ADAPTER, SIMPLE, TIER_A
from eval.ablation.memo import Memo, Unit, pack, unpack
from eval.ablation.names import Draw
from eval.ablation.rows import SCALES, Results
from eval.ablation.study import RATE_SEED, SMOKE, SPLITS, Study, Workspace, source_hash
from eval.ablation.training import best_rate, train, untrained_adapter
from eval.ablation.work import Job, jobs_of, missing, run
from eval.bench import Bench
from eval.prompts import TASKS, Prompts
from eval.tables import markdown
from model.attention import concatenated, decoupled
from model.features import Features
from sampling.loading import load
from sampling.pipeline import Pipeline
from train import checkpoint
from train.album import CaptionedPicture
from train.pairs import Pairs
from train.plan import Plan
from train.setting import Setting, TrainingSource

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights"


@pytest.fixture(scope="module")
def setting() -> Setting:
    """The mini world's base with pictures that are noise."""
    empty = torch.zeros(4)
    pairs = Pairs(empty, empty, empty, empty, Features(torch.randn(4, 1, 1, 256), torch.zeros(1, 1, 1, 256)))
    return Setting(load(WEIGHTS, ()), pairs, pairs)


# forms, plans and prompts


def test_forms_of_one_seed_start_from_the_same_projection(setting: Setting) -> None:
    def first(form: str, seed: int) -> Tensor:
        return untrained_adapter(setting, FORMS[form], seed).image_projection.proj.weight

    alike = [first(name, 1) for name, form in FORMS.items() if form.tokens == 4]
    assert all(torch.equal(alike[0], other) for other in alike[1:])
    assert not torch.equal(alike[0], first("ip_adapter", 2))


def test_forms_differ_in_what_is_trained(setting: Setting) -> None:
    sizes = {name: sum(p.numel() for p in untrained_adapter(setting, form, 0).parameters()) for name, form in FORMS.items()}
    layers = setting.pipeline.unet.cross_attentions()
    own = sum(layer.to_k.weight.numel() + layer.to_v.weight.numel() for layer in layers)
    assert sizes["ip_adapter"] == sizes["concatenated"] == sizes["simple"] + own
    assert sizes["shared"] == sizes["simple"]
    assert sizes["mixed"] == sizes["ip_adapter"] + sum(layer.heads for layer in layers)
    assert len({replace(form, name="", short="") for form in FORMS.values()}) == len(FORMS) and Study().forms == TIER_A
    assert {(FORMS[form].own_projections, FORMS[form].fuse) for form in TIER_A} == set(product((True, False), (decoupled, concatenated)))


def test_the_learning_rate_is_constant_after_the_warm_up() -> None:
    """So the first 2,000 steps of a long training are those that a learning rate is chosen by."""
    study = Study()
    plan = study.plan("simple", 0, 1e-3)
    assert [plan.rate(step) for step in (100, 499, 1999, 7999)] == [1, 1, 1, 1] and plan.rate(49) == 0.5
    assert study.checkpoints == (500, 1000, 2000, 4000, 8000) and study.rate_steps == 2000
    tried = study.plan("simple", RATE_SEED, 1e-3)
    assert replace(tried, name=plan.name, seed=0) == plan and tried.name != plan.name


def test_the_estimate_is_that_of_the_default_study() -> None:
    """16 long and 12 short trainings of 32 pictures at 49 ms each are 66 hours; 172,000 drawings at 0.1 s are 5."""
    assert Study().hours() == pytest.approx((16 * 8000 + 12 * 2000) * 32 * 0.049 / 3600 + 4.8, abs=0.1)


def test_all_tasks_have_the_same_image_prompts() -> None:
    prompts = Prompts.of_the_world(50)
    truth = prompts.truth
    assert truth is not None and prompts.tasks == TASKS and TASKS[0] == "complementary"
    scene = truth.complement
    assert torch.equal(scene.palette, truth.labels["palette"]) and torch.equal(scene.concept, truth.labels["concept"])
    assert not (scene.background == truth.labels["background"]).any() and not (truth.concept == truth.labels["concept"]).any()
    assert all(len(set(prompts.texts(task))) > 10 for task in TASKS if task != "picture") and set(prompts.texts("picture")) == {""}
    first = prompts.first(3)
    assert first.complements == prompts.complements[:3] and first.truth is not None and len(first.truth.complement.palette) == 3
    palettes = [tuple(pair) for seed in SPLITS.values() for pair in Prompts.of_the_world(20, seed).to_json()["truth"]["palette"]]
    assert len(set(palettes)) == 3 * 20, "the sets of prompts share image prompts"


# the work


def test_a_memo_makes_each_unit_once(tmp_path: Path) -> None:
    memo, unit = Memo(tmp_path), Unit({"a": [1, 2.5]}, {"commit": "c"}, {"x": torch.arange(6, dtype=torch.int16).view(3, 2)})
    made = memo("one", lambda: unit)
    assert (made.value, made.made, made.rows) == (unit.value, unit.made, 3) and torch.equal(made.arrays["x"], unit.arrays["x"])
    assert memo("one", lambda: pytest.fail("it is made twice")).value == unit.value
    assert memo("empty", lambda: Unit(None, {})).rows == 0
    memo.path("one").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"one\.unit\.safetensors is damaged .*: remove it"):
        memo.read("one")


def test_packed_units_are_restored(tmp_path: Path) -> None:
    units = {str(i): Unit(i, {}, {"x": torch.full((i, 2), i, dtype=torch.int16)} if i else {}) for i in (2, 0, 3)}
    data, arrays = pack(units)
    assert len(arrays["x"]) == 5 and [unit["rows"] for unit in data.values()] == [2, 0, 3]
    copies = unpack(json.loads(json.dumps(data)), arrays)
    assert all(copies[name].value == unit.value and copies[name].rows == unit.rows for name, unit in units.items())
    assert torch.equal(copies["3"].arrays["x"], units["3"].arrays["x"])
    with pytest.raises(ValueError, match="do not belong together"):
        unpack(data, {"x": arrays["x"][1:]})
    memo = Memo(tmp_path)
    memo.write("3", Unit("newer", {}))
    memo.restore(copies)
    assert memo.read("2").value == 2 and memo.read("3").value == "newer"


def test_the_primary_comparison_is_made_first() -> None:
    """Every job stands after those that it needs. Both forms of the primary comparison come first, seed by seed."""
    workspace = Workspace(Study(), TrainingSource(), Path("shipped"), Path("state"), "weights", {"made": "up"})
    jobs = [job.name for job in jobs_of(workspace, TASKS)]
    assert len(set(jobs)) == len(jobs)
    for job in jobs_of(workspace, TASKS):
        assert all(jobs.index(name) < jobs.index(job.name) for name in job.after)
    primary = [job for job in jobs if re.fullmatch(r"drawn-\w+-\d-8000-complementary-test-all", job)]
    pair = [(form, seed) for seed in range(5) for form in (IP_ADAPTER, SIMPLE)]
    assert [tuple(job.split("-")[1:3]) for job in primary[:10]] == [(form, str(seed)) for form, seed in pair] and len(primary) == 16
    before = [job for job in jobs[: jobs.index(primary[9])] if not job.startswith(("alone-", "references"))]
    assert all(job.split("-")[1] in (IP_ADAPTER, SIMPLE) and not job.startswith("drawn-rate") for job in before)
    assert all(job in primary for job in before if job.startswith("drawn-"))
    assert sum(job.startswith("drawn-rate") for job in jobs) == 12
    assert sum("-confirm-" in job for job in jobs) == 10


def test_only_what_is_missing_runs(tmp_path: Path) -> None:
    """And the training of an adapter that is drawn with, which writes nothing if the adapter is there."""
    workspace = Workspace(SMOKE, TrainingSource(), tmp_path, tmp_path, "weights", {"made": "up"})
    jobs = jobs_of(workspace, TASKS)
    assert missing(workspace, jobs) == jobs
    for job in jobs:
        Memo(workspace.work).write(job.name, Unit(None, {}))
    assert missing(workspace, jobs) == []
    gone = Draw("simple", 1, 16, "conflict").name
    Memo(workspace.work).path(gone).unlink()
    assert [job.name for job in missing(workspace, jobs)] == ["train-simple-1", gone]


def test_jobs_in_processes_wait_for_those_they_need(tmp_path: Path) -> None:
    """Each job copies the file of the one before, which must be there. After a job that fails, those that need it do not run."""
    chain = ["last", "third", "second"]  # in the order of the list, those that must wait come first
    before = dict(zip(chain, [*chain[1:], "first"], strict=True))
    jobs = [Job(name, partial(shutil.copy, tmp_path / before[name], tmp_path / name), (before[name], "elsewhere")) for name in chain]
    jobs.append(Job("first", (tmp_path / "first").touch))
    failing = Job("failing", partial(shutil.copy, tmp_path / "missing", tmp_path / "failing"), ("last",))
    with pytest.raises(FileNotFoundError, match="missing"):
        run([*jobs, failing, Job("after", (tmp_path / "after").touch, ("failing",))], 2)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "third", "last"}


STARTS = """
import os, sys
from functools import partial
from eval.ablation.work import Job, run
if __name__ == "__main__":
    run([Job(str(i), partial(os.system, f"echo $PPID >> {sys.argv[1]}; sleep 30")) for i in range(2)], 2)
"""


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be collected."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Even if it is killed: they would go on for hours."""
    script, pids = tmp_path / "start.py", tmp_path / "pids"
    script.write_text(STARTS)
    study = subprocess.Popen([sys.executable, str(script), str(pids)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    for _ in range(600):
        if pids.exists() and len(workers := [int(line) for line in pids.read_text().split()]) == 2:
            break
        time.sleep(0.1)
    study.kill()
    study.wait()
    for _ in range(200):
        if all(map(ended, workers)):
            return
        time.sleep(0.1)
    pytest.fail("workers go on")


def test_a_missing_checkpoint_is_retrained_from_the_start(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is a stub: every step adds 1 to a bias, and the state stores the number of steps."""
    study = replace(SMOKE, steps=32)
    workspace = Workspace(study, TrainingSource(), tmp_path / "shipped", tmp_path, "weights", {"made": "up"})
    plan = study.plan("shared", 0, 1e-3)

    def fit(setting: Setting, start: Any, plan: Plan, folder: Path, fuse: Any, until: int) -> Any:
        done = (checkpoint.load(folder / f"{plan.name}.pt") or {"step": 0})["step"]
        start.image_projection.proj.bias.data.fill_(max(done, until))
        checkpoint.save(folder / f"{plan.name}.pt", {"step": max(done, until)})
        return start, [{"step": until, "held_out": 1.0, "gain_zero": 0.0, "gain_shuffled": 0.0}]

    def biases() -> list[float]:
        return [float(load_file(workspace.adapter(plan, step))["image_proj.proj.bias"][0]) for step in study.checkpoints]

    monkeypatch.setattr(Workspace, "setting", lambda *_: setting)
    monkeypatch.setattr("train.adapter.fit", fit)
    train(workspace, "shared", plan, study.checkpoints)
    assert biases() == list(study.checkpoints) == [2, 4, 8, 16, 32]
    workspace.adapter(plan, 2).unlink()
    train(workspace, "shared", plan, study.checkpoints)
    assert biases() == list(study.checkpoints)
    monkeypatch.setattr("train.adapter.fit", None)
    train(workspace, "shared", replace(plan, device="cuda"), study.checkpoints)  # nothing is left to do, on any device


def test_every_form_is_trained_with_its_own_attention(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that read the padding of the text; the others take other texts first. The training is a stub."""
    workspace, seen = Workspace(SMOKE, TrainingSource(), tmp_path / "shipped", tmp_path, "weights", {"made": "up"}), dict[str, Any]()

    def fit(setting: Setting, start: Any, plan: Plan, folder: Path, fuse: Any, until: int) -> Any:
        seen[plan.name] = fuse
        return start, []

    monkeypatch.setattr(Workspace, "setting", lambda *_: setting)
    monkeypatch.setattr("train.adapter.fit", fit)
    plans = {name: SMOKE.plan(name, 0, 1e-3) for name, form in FORMS.items() if form.padding}
    for name, plan in plans.items():
        train(workspace, name, plan, (1,))
    assert seen == {plan.name: FORMS[name].fuse for name, plan in plans.items()} and len(set(seen.values())) == 6


@pytest.mark.parametrize(("form", "sampled"), [("concatenated", ""), ("ip_adapter", "concatenated"), ("concatenated", "ip_adapter")])
def test_a_form_draws_with_its_own_attention_or_as_another(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, sampled: str
) -> None:
    """At each lambda; nothing is trained or drawn here."""
    workspace, seen = Workspace(SMOKE, TrainingSource(), tmp_path, tmp_path, "weights", {}), list[tuple[Any, float]]()
    bench = Bench(setting.pipeline, Prompts.of_the_world(2, seed=0), None, None)  # type: ignore[arg-type]

    def sample(_: Pipeline, texts: list[str], *__: Any, fuse: Any, scale: float, **options: Any) -> Tensor:
        seen.append((fuse, scale))
        return torch.zeros(len(texts), 3, 8, 8)

    monkeypatch.setattr(Workspace, "bench", lambda *_: bench)
    monkeypatch.setattr(draws, "plan_of", lambda *_: None)
    monkeypatch.setattr(draws, "trained_adapter", lambda *_: untrained_adapter(setting, FORMS[form], 0))
    monkeypatch.setattr(Pipeline, "sample", sample)
    monkeypatch.setattr(Bench, "read", lambda *_: {"palette": torch.zeros(2, 2, 3)})
    draws.draw_unit(workspace, Draw(form, 0, 16, "complementary", sampled=sampled), [0.5, 1.25])
    fuse = {"ip_adapter": decoupled, "concatenated": concatenated}[sampled or form]
    assert seen == [(fuse, 0.5), (fuse, 1.25)]


def test_a_tiny_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, draw, read and write the page. Another machine that has only the finished files repeats no work and gets the same
    digits. So does a redrawn cell. A unit that was not finished is made again."""
    weights, path = write_world(tmp_path / "weights"), tmp_path / "results" / "ablation.json"

    def call(*options: str) -> str:
        given = ["--weights", str(weights), "ablation", "--out", str(tmp_path), "--scorer", str(WEIGHTS), "--jobs", "1"]
        commands.run(commands.parser().parse_args([*given, *options]))
        return capsys.readouterr().out

    smoke = ("--smoke", "--seeds", "1", "--rates", "0.001", "0.003")
    assert "units of work are missing; all take about" in call(*smoke)
    written = path.read_text()
    results = Results.of(path)
    assert set(results.data) == {*results.data["schema"], "schema"} - {"rows"} and results.data["made_from"]["source"] == source_hash()
    assert all(set(unit.arrays) == set(SCALES) for unit in results.units.values() if unit.rows)
    every, fine = (results.units[Draw("ip_adapter", 0, 16, "complementary", layers=layers).name] for layers in ("all", "finest"))
    assert not torch.equal(every.arrays["palette"], fine.arrays["palette"]) and every.rows == 4 * len(every.value["lambdas"])
    text = (tmp_path / "RESULTS.md").read_text()
    assert markdown(report.square(results.data["summary"]["endpoint"])) in text and report.headline(results) in text
    links = [link for link in re.findall(r"\]\((.*?)\)", text) if not link.startswith("docs/")]
    assert len(links) >= 4 and all((tmp_path / link).exists() for link in links)
    (tmp_path / "RESULTS.md").unlink()
    call("--report")
    assert (tmp_path / "RESULTS.md").read_text() == text and path.read_text() == written
    for folder in (each for each in (tmp_path / "runs" / "ablation").iterdir() if len(each.name) == 8):
        shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr("train.adapter.fit", None)
        call(*smoke)
        assert path.read_text() == written and not list((tmp_path / "runs").rglob("*.pt"))
        said = call("--cell", "shared:0:agreeing")
        lines = [line.split() for line in said.splitlines()[1:-1]]
        assert said.rstrip().endswith("agrees with the stored numbers within the tolerance") and len(lines) == 2 * len(TOLERANCE)
        assert all(float(line[4]) == 0 and line[2] == line[3] for line in lines)
        (tmp_path / "results" / "ablation" / "shared-0.safetensors").unlink()
        with pytest.raises(FileExistsError, match=r"made from other rates: .* choose another folder with --out"):
            call("--smoke", "--seeds", "1", "--rates", "0.002", "0.003")
        with pytest.raises(FileNotFoundError, match=r"shared-0\.safetensors is not the adapter of the stored results"):
            call("--cell", "shared:0:agreeing")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--smoke"], "choose another folder with --out"),
        (["--steps", "100"], "choose another folder with --out"),
        (["--out", "o", "--steps", "15"], "at least 16"),
        (["--seeds", "0"], "must be positive"),
        (["--out", "o", "--data", "d"], "must be given together"),
        (["--base", "sd15.safetensors"], "must be given together"),
        (["--out", "o", "--base", "b", "--data", "d"], "--scorer ViT-L-14:openai"),
    ],
)
def test_incompatible_options_are_rejected_first(options: list[str], says: str) -> None:
    args = commands.parser().parse_args(["ablation", *options])
    with pytest.raises(ValueError, match=says):
        commands.run(args)


@pytest.mark.parametrize("cell", ["shared:99:agreeing", "shared", "simple:0:nothing", "none:0:picture", "shared:1:picture"])
def test_an_unknown_cell_is_rejected(cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First without a results file, then with a made-up one. With two seeds, some forms have only one adapter."""
    args = commands.parser().parse_args(["ablation", "--out", str(tmp_path), "--cell", cell])
    with pytest.raises(FileNotFoundError, match=r"ablation\.json is not there: run `python -m eval ablation` first"):
        commands.run(args)
    write_json(tmp_path / "results" / "ablation.json", {"study": SMOKE.__dict__, "tasks": TASKS, "units": {}})
    monkeypatch.setattr("eval.ablation.rows.load_file", lambda _: {})
    with pytest.raises(ValueError, match=f"there is no cell {cell}"):
        commands.run(args)


@pytest.mark.parametrize("name", ["nothing", "ViT-Q-99:openai"])
def test_an_unknown_clip_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not name a CLIP|cannot load"):
        clip_score.find(name)


def test_the_rate_is_the_best_of_those_whose_loss_is_finite() -> None:
    assert best_rate({1e-3: 0.2, 3e-3: 0.1, 9e-3: None}, "simple") == 3e-3
    with pytest.raises(ValueError, match="lower --rates"):
        best_rate({9e-3: None}, "simple")


def test_a_users_pictures_conflict_with_another_caption(pictures: list[Path]) -> None:
    files = [CaptionedPicture(pictures[i % 3], (text,), i) for i, text in enumerate(("a", "a", "b", "c"))]
    assert Prompts.of_files(files, 32).conflicts == ["b", "b", "c", "a"]
    with pytest.raises(ValueError, match="two different captions"):
        Prompts.of_files(files[:2], 32)


def test_a_json_list_of_plain_values_is_one_line(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, "x, [y]", None], "b": [[1], [2, 3]], "c": [], "d": [{"e": ["f\n", "g"]}]}
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text()) == data
    write_json(tmp_path / "y.json", {"a": [1, 2, {"b": ["c", "d"]}]})
    assert '["c", "d"]' in (tmp_path / "y.json").read_text()
