"""The ablation: equal starting points, correct scores, and a tiny run from end to end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.files import read_json, write_json
from eval import __main__ as commands
from eval import clip_score
from eval.ablation import report
from eval.ablation.command import TOLERANCE, compare
from eval.ablation.endpoint import best_lambda, curves, summary
from eval.ablation.forms import FORMS, SHARES
from eval.ablation.memo import Memo
from eval.ablation.rows import Results, fraction, frame_of
from eval.ablation.study import SMOKE, Study, Workspace, untrained_adapter
from eval.ablation.training import best_rate, train
from eval.bench import Bench, all_drawings, nearest
from eval.prompts import Prompts
from eval.tables import markdown
from model.features import Features
from sampling.loading import load
from train import checkpoint
from train.album import Captioned
from train.judge import load_judge
from train.loop import Plan
from train.pairs import Pairs
from train.setting import Setting, TrainingSource
from train.world import CONCEPT_NAMES, CONCEPTS, World

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights"


@pytest.fixture(scope="module")
def setting() -> Setting:
    """The mini world's base with pictures that are noise."""
    empty = torch.zeros(4)
    pairs = Pairs(empty, empty, empty, empty, Features(torch.randn(4, 1, 1, 256), torch.zeros(1, 1, 1, 256)))
    return Setting(load(WEIGHTS, ()), pairs, pairs)


@pytest.fixture(scope="module")
def bench() -> Bench:
    pipeline = load(WEIGHTS)
    scorer = clip_score.Scorer(
        "none", lambda pictures: torch.ones(len(pictures), 2), lambda texts: torch.ones(len(texts), 2)
    )
    judge = load_judge(WEIGHTS / "judge.safetensors")
    return Bench(pipeline, Prompts.of_the_world(12), scorer, judge, steps=2)


def test_forms_of_one_seed_start_from_the_same_projection(setting: Setting) -> None:
    def first(form: str, seed: int) -> Tensor:
        return untrained_adapter(setting, FORMS[form], seed).image_projection.proj.weight

    alike = [first(form, 1) for form in ("ip_adapter", "shared", "concatenated", "simple")]
    assert all(torch.equal(alike[0], other) for other in alike[1:])
    assert not torch.equal(alike[0], first("ip_adapter", 2))


def test_forms_differ_in_what_is_trained(setting: Setting) -> None:
    sizes = {
        name: sum(p.numel() for p in untrained_adapter(setting, form, 0).parameters()) for name, form in FORMS.items()
    }
    layers = setting.pipeline.unet.cross_attentions()
    own = sum(layer.to_k.weight.numel() + layer.to_v.weight.numel() for layer in layers)
    assert sizes["ip_adapter"] == sizes["concatenated"] == sizes["simple"] + own
    assert sizes["shared"] == sizes["simple"]
    assert abs(sizes["simple_wide"] / sizes["ip_adapter"] - 1) < 0.05


def test_the_judge_reads_ideal_pictures_correctly(bench: Bench) -> None:
    """Ideal conflict pictures have the concept and background of the text, and the palette of the image prompt (CIE76 below 5)."""
    test = bench.prompts.truth
    assert test is not None
    row = bench.read("conflict", test.pixels(), form="truth")
    assert mostly(row["concept"], test.concept.tolist()) and row["background"] == test.background.tolist()
    assert np.mean(row["palette_error"]) < 5
    own = bench.read("picture", bench.prompts.pixels, form="itself")
    assert mostly(own["concept"], [scene.concept for scene in test.scenes])
    assert np.mean(own["placement_error"]) < 2 and own["drawing"] == [s.drawing for s in test.scenes]


def mostly(found: list[int], expected: list[int]) -> bool:
    """Whether all but one are equal: the judge names 99.6 % of true pictures."""
    return sum(a == b for a, b in zip(found, expected, strict=True)) >= len(expected) - 1


def test_nearest_finds_the_drawing() -> None:
    many = [i for i in range(200) if len(CONCEPTS[CONCEPT_NAMES[World("val")[i].concept]]) > 1][:6]
    scenes = [World("val")[i] for i in many]
    other = [replace(s, drawing=(s.drawing + 1) % len(all_drawings(s))) for s in scenes]
    assert nearest(scenes, torch.stack([all_drawings(s)[s.drawing] for s in scenes])) == [s.drawing for s in scenes]
    assert nearest(scenes, torch.stack([all_drawings(s)[s.drawing] for s in other])) == [s.drawing for s in other]


def test_controls_differ_from_the_own_picture(bench: Bench) -> None:
    adapter = bench.pipeline.adapters[0]
    few = bench.first(3)
    rows = few.cell("conflict", adapter, FORMS["ip_adapter"].fuse, (1.0,)) + few.controls(
        adapter, FORMS["ip_adapter"].fuse
    )
    assert [row.get("control") for row in rows] == [None, "shuffled", "null"]
    assert len({tuple(row["palette_error"]) for row in rows}) == 3


def results() -> Results:
    """Two forms whose rows are made up: the second's palette is 5 worse at every lambda."""
    n, seeds = 40, range(3)
    rng, wanted = np.random.default_rng(0), [i % 7 for i in range(n)]

    def row(follows: float, error: float, **cell: object) -> dict[str, object]:
        concept = [w if i < follows * n else 63 for i, w in enumerate(wanted)]
        errors = (error + rng.normal(0, 0.1, n)).tolist()
        plain = {"background": wanted, "placement_error": errors, "clip_i": errors, "clip_t": errors}
        return {"task": "conflict", "concept": concept, "palette_error": errors, **plain, **cell}

    rows = [row(1.0, 60, form="text alone")]
    for form, worse in (("ip_adapter", 0), ("simple", 5)):
        for seed in seeds:
            for share in SHARES:
                for lam, follows, error in zip(FORMS[form].few, (0.9, 0.7), (40, 30), strict=True):
                    later = 10 * (1 - share)
                    where = {"form": form, "seed": seed, "share": share, "lambda": lam}
                    rows.append(row(follows, error + worse + later, **where))
    palette = [[65, 30, 40, 65, 0, 10]] * n  # 50 and 10 from a grey of lightness 65
    return Results(
        {
            "study": {
                **{"seeds": 3, "level": 0.8, "resamples": 200, "steps": 50, "batch": 4},
                "forms": ["ip_adapter", "simple"],
            },
            "units": {"rows-": {"value": rows}},
            "truth": {"wanted": {"concept": wanted, "background": wanted}, "palette": palette},
            "rates": {form: {"chosen": 1e-3} for form in ("ip_adapter", "simple")},
            "parameters": {"ip_adapter": 1234, "simple": 567},
            "shipped_pictures": 1600,
        }
    )


def test_the_endpoint_is_the_error_at_equal_text_following() -> None:
    """80 % lies between 90 % at error 40 and 70 % at error 30, so the endpoint is 35 (to 0.1). A form that is 5 worse is reported so."""
    found = results()
    found.data["summary"] = said = summary(found)
    assert said["endpoint"]["ip_adapter"] == pytest.approx([35] * 3, abs=0.1)
    assert said["difference"]["simple"]["mean"] == pytest.approx(5, abs=0.1)
    assert said["difference"]["simple"]["low"] > 0 and said["difference"]["simple"]["p"] < 0.05
    assert said["share"]["simple"]["0.5"] == pytest.approx([45] * 3, abs=0.1)
    assert "| 1,234 | 0.001 | 35.0 ± 0.0 |" in markdown(report.primary(found))
    assert report.half_width(said) < 1
    assert best_lambda(found, "ip_adapter") == FORMS["ip_adapter"].few[0]
    verdict = report.verdict(found)
    assert verdict.startswith("- *the simple adapter") and "is worse than" in verdict


def test_the_caveat_states_the_grey_score_and_the_share_of_training() -> None:
    """50 steps of 4 pictures are an eighth of 1600. The caveat is empty without ground truth or without the adapter of the base."""
    found = results()
    found.data["summary"] = summary(found)
    said = report.caveat(found)
    assert "scores 30.00 on this endpoint; IP-Adapter scores 35.0. 50 steps are 12.5 %" in said
    assert report.caveat(Results(found.data | {"shipped_pictures": None})) == ""
    assert report.caveat(Results({key: value for key, value in found.data.items() if key != "truth"})) == ""


def test_the_curve_of_a_form_starts_at_the_text_alone_and_follows_lambda() -> None:
    found = curves(results().pictures, "simple")
    assert found.following.shape == found.error.shape == (3, 3, 40)
    assert found.following.mean(axis=-1) == pytest.approx(np.array([[1.0, 0.9, 0.7]] * 3))
    assert found.error.mean(axis=-1) == pytest.approx(np.array([[60, 45, 35]] * 3), abs=0.1)


def test_frame_of_marks_right_pictures() -> None:
    """Compare with values by hand, for two prompts. The concept of the second has only one drawing."""
    truth = {
        "own": {"concept": [1, 2], "background": [0, 0]},
        "wanted": {"concept": [3, 2], "background": [1, 1]},
        "drawing": [1, None],
    }
    shown = {"concept": [1, 2], "background": [0, 1], "palette_error": [4.0, 6.0], "clip_i": [0.5, 0.25]}
    frame = frame_of([{"task": "picture", "form": "a", "drawing": [0, 0], **shown}], truth)
    assert frame["concept_own"].tolist() == [1, 1] and frame["concept_wanted"].tolist() == [0, 1]
    assert frame["background_own"].tolist() == [1, 0] and frame["background_wanted"].tolist() == [0, 1]
    assert frame["drawing_own"].isna().tolist() == [False, True] and frame["drawing_own"][0] == 0
    assert frame["error"].tolist() == [4, 6] and frame["clip_score"].isna().all()
    rows = [
        {"task": "conflict", "form": form, **shown, "clip_t": t}
        for form, t in (("text alone", [0.2, 0.4]), ("a", [-0.3, 0.6]))
    ]
    files = frame_of(rows, None)
    assert files["error"].tolist() == [50, 75, 50, 75]
    assert files["follows"].tolist() == pytest.approx([2 / 3, 4 / 3, -1, 2])
    assert files["clip_score"].tolist() == pytest.approx([0.5, 1, 0, 1.5])


@pytest.mark.parametrize(
    ("lam", "says"), [(0.25, "0.25"), (1 / 512, "1/512"), (1 / 8, "0.125"), (64.0, "64"), (0.0, "0")]
)
def test_lambdas_are_formatted_as_fractions(lam: float, says: str) -> None:
    assert fraction(lam) == says


@pytest.mark.parametrize("measure", TOLERANCE)
def test_a_cell_passes_within_the_tolerance_of_every_measure(measure: str) -> None:
    """Compare with means and differences by hand. A mean that is off by more than the tolerance fails only its own line; a single
    picture that is far off does not."""
    n, tolerance = 100, TOLERANCE[measure]
    shares = measure in ("concept", "background", "drawing")
    key = f"{measure}_own" if shares else measure
    stored = pd.DataFrame(
        {
            "lambda": 1.0,
            "prompt": range(n),
            **{f"{k}_own" if k in ("concept", "background", "drawing") else k: np.ones(n) for k in TOLERANCE},
        }
    )
    shift = np.zeros(n)
    shift[0] = -1 if shares else 0.9 * n * tolerance
    near = compare(stored, stored.assign(**{key: 1 + shift}), "own").set_index("measure")
    assert near["within"].all() and len(near) == len(TOLERANCE)
    assert near["largest difference"][measure] == pytest.approx(abs(shift[0]), abs=1e-4)
    assert near["redrawn"][measure] == pytest.approx(1 + shift.mean(), abs=1e-4) and near["stored"][measure] == 1
    far = compare(stored, stored.assign(**{key: 1 - 1.1 * tolerance}), "own").set_index("measure")
    assert far.index[~far["within"]].tolist() == [measure]


def test_a_memo_computes_each_key_once(tmp_path: Path) -> None:
    """The key holds tuples, which become lists in JSON."""
    plan = Study().plan("simple", 0, 1e-3)
    key, memo = {"plan": asdict(plan)}, Memo(tmp_path)
    assert memo("x", key, lambda: [1]) == [1]
    assert memo("x", key, lambda: [2]) == [1]
    assert memo("x", {"plan": asdict(replace(plan, seed=1))}, lambda: [3]) == [3]


def test_restore_adds_cached_work_and_keeps_newer_work(tmp_path: Path) -> None:
    first, second = Memo(tmp_path / "first"), Memo(tmp_path / "second")
    assert first("x", {"a": 1}, lambda: 1) == 1 and first("y", {"a": 1}, lambda: 2) == 2
    assert second("y", {"a": 2}, lambda: 3) == 3
    second.restore({name: read_json(first.path(name)) for name in ("x", "y")})
    assert second("x", {"a": 1}, lambda: 0) == 1 and second("y", {"a": 2}, lambda: 0) == 3


def test_a_missing_share_is_retrained_from_the_start(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is a stub: every step adds 1 to a bias, and the state stores the number of steps."""
    workspace, study = Workspace(TrainingSource(), tmp_path / "shipped", tmp_path, "weights", {"made": "up"}), replace(SMOKE, steps=8)

    def fit(setting: Setting, start: Any, plan: Plan, folder: Path, fuse: Any, until: int) -> Any:
        done = (checkpoint.load(folder / f"{plan.name}.pt") or {"step": 0})["step"]
        start.image_projection.proj.bias.data.fill_(max(done, until))
        checkpoint.save(folder / f"{plan.name}.pt", {"step": max(done, until)})
        return start, []

    def biases() -> list[float]:
        files = [workspace.adapter("shared", 0, share) for share in SHARES]
        return [float(load_file(file)["image_proj.proj.bias"][0]) for file in files]

    monkeypatch.setattr(Workspace, "setting", lambda *_: setting)
    monkeypatch.setattr("train.adapter.fit", fit)
    train(workspace, study, "shared", 0, 1e-3)
    assert biases() == [2, 4, 8]
    workspace.adapter("shared", 0, 0.25).unlink()
    train(workspace, study, "shared", 0, 1e-3)
    assert biases() == [2, 4, 8]
    monkeypatch.setattr("train.adapter.fit", None)
    train(workspace, study, "shared", 0, 1e-3)  # nothing is left to do


def test_a_tiny_study_end_to_end(tmp_path: Path) -> None:
    """Train, draw, score and write the report. Another machine that has only the finished files repeats no work and gets the same
    digits. So does a redrawn cell."""

    def call(*options: str) -> str:
        command = [sys.executable, "-m", "eval", "ablation", "--out", str(tmp_path), *options]
        return subprocess.run(
            command, cwd=ROOT, check=not options[0].startswith("--cell"), capture_output=True, text=True
        ).stdout

    state = tmp_path / "runs" / "ablation"
    call("--smoke")
    written = (tmp_path / "results" / "ablation.json").read_text()
    made = json.loads(written)
    rows = [row for name, unit in made["units"].items() if name.startswith("rows-") for row in unit["value"]]
    assert {row["form"] for row in rows} >= set(made["study"]["forms"]) and made["truth"]["wanted"]["concept"]
    assert set(made) <= set(made["schema"]) | {"schema"} and set(rows[-1]) - {"concept", "background", "drawing"} <= {
        *("form", "seed", "share", "task", "lambda", "control", "palette_error", "placement_error", "clip_i", "clip_t")
    }
    text = (tmp_path / "RESULTS.md").read_text()
    assert markdown(report.primary(Results(made))) in text and report.caveat(Results(made)) in text
    assert all((tmp_path / link).exists() for link in re.findall(r"\]\((.*?)\)", text))
    for folder in (each for each in state.iterdir() if each.is_dir()):
        shutil.rmtree(folder)
    call("--smoke")
    assert (tmp_path / "results" / "ablation.json").read_text() == written and not list(state.rglob("*.pt"))
    said = call("--cell", "shared:1:agreeing")
    lines = [line.split() for line in said.splitlines()[1:-1]]
    assert said.rstrip().endswith("agrees with the stored numbers within the tolerance") and len(lines) == 7
    assert all(float(line[4]) == 0 and line[2] == line[3] for line in lines)
    made["units"]["rows-shared-1"]["value"][-3]["clip_i"][0] += 0.001
    made["units"]["rows-shared-1"]["value"][-4]["palette_error"][0] += 20
    (tmp_path / "results" / "ablation.json").write_text(json.dumps(made))
    said = call("--cell", "shared:1:conflict")
    lines = {(float(line.split()[0]), line.split()[1]): line.split()[4:] for line in said.splitlines()[1:]}
    assert float(lines[2.0, "clip_i"][0]) == 0.001 and lines[2.0, "clip_i"][-1] == "True"
    assert float(lines[1.5, "palette_error"][0]) == 20 and lines[1.5, "palette_error"][-1] == "False"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--smoke"], "choose another folder with --out"),
        (["--steps", "100"], "choose another folder with --out"),
        (["--out", "o", "--steps", "3"], "at least 4"),
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


@pytest.mark.parametrize("cell", ["shared:99:agreeing", "shared", "simple:0:nothing", "none:0:picture"])
def test_an_unknown_cell_is_rejected(cell: str, tmp_path: Path) -> None:
    """First without a results file, then with a made-up one."""
    args = commands.parser().parse_args(["ablation", "--out", str(tmp_path), "--cell", cell])
    with pytest.raises(FileNotFoundError, match=r"ablation\.json is not there: run `python -m eval ablation` first"):
        commands.run(args)
    write_json(tmp_path / "results" / "ablation.json", {"study": asdict(SMOKE)})
    with pytest.raises(ValueError, match=f"there is no cell {cell}"):
        commands.run(args)


def test_the_pictures_of_an_adapter_are_those_of_all_phases(tmp_path: Path) -> None:
    """2 x 3 x 1 + 5 x 7 x 2, from the card. Without a card, the number is None."""
    workspace = Workspace(TrainingSource(tmp_path), tmp_path, tmp_path, "weights")
    assert workspace.shipped_pictures() is None
    phases = [{"steps": 2, "batch": 3, "accumulate": 1}, {"steps": 5, "batch": 7, "accumulate": 2}]
    write_json(tmp_path / "ip_adapter.json", {"settings": phases})
    assert workspace.shipped_pictures() == 76


@pytest.mark.parametrize("name", ["nothing", "ViT-Q-99:openai"])
def test_an_unknown_clip_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not name a CLIP|cannot load"):
        clip_score.find(name)


def test_the_rate_is_the_best_of_those_whose_loss_is_finite() -> None:
    assert best_rate({1e-3: 0.1, 3e-3: 0.2, 9e-3: None}, "simple") == 3e-3
    with pytest.raises(ValueError, match="lower --rates"):
        best_rate({9e-3: None}, "simple")


def test_a_users_pictures_conflict_with_another_caption(pictures: list[Path]) -> None:
    files = [Captioned(pictures[i % 3], (text,), i) for i, text in enumerate(("a", "a", "b", "c"))]
    assert Prompts.of_files(files, 32).conflicts == ["b", "b", "c", "a"]
    with pytest.raises(ValueError, match="two different captions"):
        Prompts.of_files(files[:2], 32)


def test_a_json_list_of_plain_values_is_one_line(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, "x, [y]", None], "b": [[1], [2, 3]], "c": [], "d": [{"e": ["f\n", "g"]}]}
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text()) == data
    write_json(tmp_path / "y.json", {"a": [1, 2, {"b": ["c", "d"]}]})
    assert '["c", "d"]' in (tmp_path / "y.json").read_text()
