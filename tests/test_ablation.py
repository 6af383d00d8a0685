"""The ablation: fair starts, honest reading, and everything end to end in small."""

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
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.files import write_json
from eval import __main__ as commands
from eval import attributes, calibration, clip_score, report
from eval.ablation import FORMS, SHARES, SMOKE, Place, Study, best_rate, kept, train, untrained
from eval.tasks import Bench, Prompts, drawings, nearest, oracle
from sampling.pipeline import load
from train import checkpoint, clip
from train.adapter import Setting, Source
from train.data import Pairs
from train.loop import Plan, generator
from train.world import CONCEPT_NAMES, CONCEPTS, World

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights"


@pytest.fixture(scope="module")
def setting() -> Setting:
    """The mini world's base with pictures that are noise."""
    empty = torch.zeros(4)
    pairs = Pairs(empty, empty, empty, empty, torch.randn(4, 256), torch.zeros(256))
    return Setting(load(WEIGHTS, ()), pairs, pairs)


@pytest.fixture(scope="module")
def bench() -> Bench:
    pipeline = load(WEIGHTS)
    scorer = clip_score.Scorer(
        "none", lambda pictures: torch.ones(len(pictures), 2), lambda texts: torch.ones(len(texts), 2)
    )
    judge = attributes.load(WEIGHTS / "judge.safetensors")
    return Bench(pipeline, Prompts.of_the_world(12), scorer, judge, steps=2)


def test_forms_of_one_seed_start_from_the_same_projection(setting: Setting) -> None:
    def first(form: str, seed: int) -> Tensor:
        return untrained(setting, FORMS[form], seed).image_projection.proj.weight

    alike = [first(form, 1) for form in ("ip_adapter", "shared", "concatenated", "simple")]
    assert all(torch.equal(alike[0], other) for other in alike[1:])
    assert not torch.equal(alike[0], first("ip_adapter", 2))


def test_forms_differ_in_what_is_trained(setting: Setting) -> None:
    sizes = {name: sum(p.numel() for p in untrained(setting, form, 0).parameters()) for name, form in FORMS.items()}
    layers = setting.pipeline.unet.cross_attentions()
    own = sum(layer.to_k.weight.numel() + layer.to_v.weight.numel() for layer in layers)
    assert sizes["ip_adapter"] == sizes["concatenated"] == sizes["simple"] + own
    assert sizes["shared"] == sizes["simple"]
    assert abs(sizes["simple_wide"] / sizes["ip_adapter"] - 1) < 0.05


def test_the_truth_is_read_as_what_it_is(bench: Bench) -> None:
    """The true conflict pictures follow the text in concept and background, the picture in its palette (CIE76 below 5)."""
    test = bench.prompts.truth
    assert test is not None and torch.equal(bench.prompts.pixels, test.pixels)
    row = bench.read("conflict", oracle(test), form="truth")
    assert row["concept"] == test.concept.tolist() and row["background"] == test.background.tolist()
    assert np.mean(row["palette_error"]) < 5
    own = bench.read("picture", test.pixels, form="itself")
    assert own["concept"] == [scene.concept for scene in test.references]
    assert np.mean(own["placement_error"]) < 2 and own["drawing"] == [s.drawing for s in test.references]


def test_the_nearest_drawing_is_told_among_all() -> None:
    many = [i for i in range(200) if len(CONCEPTS[CONCEPT_NAMES[World("val")[i].concept]]) > 1][:6]
    scenes = [World("val")[i] for i in many]
    other = [replace(s, drawing=(s.drawing + 1) % len(drawings(s))) for s in scenes]
    assert nearest(scenes, torch.stack([drawings(s)[s.drawing] for s in scenes])) == [s.drawing for s in scenes]
    assert nearest(scenes, torch.stack([drawings(s)[s.drawing] for s in other])) == [s.drawing for s in other]


def test_controls_are_not_the_picture(bench: Bench) -> None:
    adapter = bench.pipeline.adapters[0]
    few = bench.first(3)
    rows = few.cell("conflict", adapter, FORMS["ip_adapter"].fuse, (1.0,)) + few.controls(
        adapter, FORMS["ip_adapter"].fuse
    )
    assert [row.get("control") for row in rows] == [None, "shuffled", "null"]
    assert len({tuple(row["palette_error"]) for row in rows}) == 3


def results() -> report.Results:
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
    return {
        "study": {"seeds": 3, "level": 0.8, "resamples": 200, "forms": ["ip_adapter", "simple"]},
        "units": {"rows-": {"value": rows}},
        "truth": {"wanted": {"concept": wanted, "background": wanted}},
        "rates": {form: {"chosen": 1e-3} for form in ("ip_adapter", "simple")},
        "parameters": {"ip_adapter": 1234, "simple": 567},
    }


def test_the_endpoint_is_read_where_text_is_followed_equally_often() -> None:
    """Between 90 % at 40 and 70 % at 30 lies 80 % at 35 (to 0.1), and a form that is 5 worse is told so."""
    found = results()
    found["summary"] = summary = report.summary(found)
    assert summary["endpoint"]["ip_adapter"] == pytest.approx([35] * 3, abs=0.1)
    assert summary["difference"]["simple"]["mean"] == pytest.approx(5, abs=0.1)
    assert summary["difference"]["simple"]["low"] > 0 and summary["difference"]["simple"]["p"] < 0.05
    assert summary["share"]["simple"]["0.5"] == pytest.approx([45] * 3, abs=0.1)
    assert "| 1,234 | 0.001 | 35.0 ± 0.0 |" in report.primary(found)
    assert report.half_width(found) < 1
    assert report.best_lambda(found, "ip_adapter") == FORMS["ip_adapter"].few[0]
    assert "*The simple adapter" in report.verdict(found).replace("*the", "*The") and "is worse than" in report.verdict(
        found
    )


def test_the_judge_sees_what_a_person_sees() -> None:
    """On pictures that the models drew, labelled by eye: the judge is no better than these shares, and no worse."""
    found = calibration.agreement(attributes.load(WEIGHTS / "judge.safetensors"), ROOT / "results")
    labels = json.loads((ROOT / "results" / "labels.json").read_text())
    assert len(labels["concept"]) == len(labels["background"]) == calibration.ROWS * calibration.COLUMNS >= 100
    assert found["concept"] >= 0.8 and found["background"] >= 0.97
    said = f"{100 * found['concept']:.0f} % of {found['concept_labelled']:.0f} drawn concepts"
    assert said in (ROOT / "README.md").read_text().replace("\n", " ")


def test_the_second_clip_can_be_trained() -> None:
    """Both towers end in the same width, so that their cosines exist."""
    towers, plan = clip.CLIP(clip_score.TEXT, clip_score.IMAGE), replace(clip_score.PLAN, batch=4)
    assert isinstance(plan, Plan)
    loss = clip.clip_loss(towers, clip.batch_of(towers.text, plan, 0), generator(0, 0))
    assert torch.isfinite(loss["loss"])


def test_a_unit_is_done_once_for_its_key(tmp_path: Path) -> None:
    """A key of settings, whose tuples JSON gives back as lists."""
    plan = Study().plan("simple", 0, 1e-3)
    key = {"plan": asdict(plan)}
    assert kept(tmp_path / "x.json", key, lambda: [1]) == [1]
    assert kept(tmp_path / "x.json", key, lambda: [2]) == [1]
    assert kept(tmp_path / "x.json", {"plan": asdict(replace(plan, seed=1))}, lambda: [3]) == [3]


def test_a_lost_share_is_trained_again_not_taken_from_a_later_state(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is made up: every step adds 1 to a bias, and a state remembers how many were done."""
    place, study = Place(Source(), tmp_path / "shipped", tmp_path, "weights", {"made": "up"}), replace(SMOKE, steps=8)

    def fit(setting: Setting, start: Any, plan: Plan, folder: Path, fuse: Any, until: int) -> Any:
        done = (checkpoint.load(folder / f"{plan.name}.pt") or {"step": 0})["step"]
        start.image_projection.proj.bias.data.fill_(max(done, until))
        checkpoint.save(folder / f"{plan.name}.pt", {"step": max(done, until)})
        return start, []

    def biases() -> list[float]:
        files = [place.adapter("shared", 0, share) for share in SHARES]
        return [float(load_file(file)["image_proj.proj.bias"][0]) for file in files]

    monkeypatch.setattr(Place, "setting", lambda *_: setting)
    monkeypatch.setattr("train.adapter.fit", fit)
    train(place, study, "shared", 0, 1e-3)
    assert biases() == [2, 4, 8]
    place.adapter("shared", 0, 0.25).unlink()
    train(place, study, "shared", 0, 1e-3)
    assert biases() == [2, 4, 8]
    monkeypatch.setattr("train.adapter.fit", None)
    train(place, study, "shared", 0, 1e-3)  # nothing is left to do


def test_everything_end_to_end_in_small(tmp_path: Path) -> None:
    """Training, drawing, reading and the report. Another machine, which has the published files alone, does nothing again and
    gets the same digits; a cell that is drawn again has them too."""

    def call(*options: str) -> str:
        command = [sys.executable, "-m", "eval", "ablation", "--out", str(tmp_path), *options]
        return subprocess.run(
            command, cwd=ROOT, check=not options[0].startswith("--cell"), capture_output=True, text=True
        ).stdout

    state = tmp_path / "runs" / "ablation"
    call("--smoke")
    written = (tmp_path / "results" / "ablation.json").read_text()
    made = json.loads(written)
    rows = report.rows_of(made)
    assert {row["form"] for row in rows} >= set(made["study"]["forms"]) and made["truth"]["wanted"]["concept"]
    assert set(made) <= set(made["schema"]) | {"schema"} and set(rows[-1]) - {"concept", "background", "drawing"} <= {
        *("form", "seed", "share", "task", "lambda", "control", "palette_error", "placement_error", "clip_i", "clip_t")
    }
    text = (tmp_path / "RESULTS.md").read_text()
    assert report.primary(made) in text
    assert all((tmp_path / link).exists() for link in re.findall(r"\]\((.*?)\)", text))
    for folder in (each for each in state.iterdir() if each.is_dir()):
        shutil.rmtree(folder)
    call("--smoke")
    assert (tmp_path / "results" / "ablation.json").read_text() == written and not list(state.rglob("*.pt"))
    assert "equal, digit by digit" in call("--cell", "shared:1:agreeing")
    made["units"]["rows-shared-1"]["value"][-3]["clip_i"][0] += 0.001
    (tmp_path / "results" / "ablation.json").write_text(json.dumps(made))
    assert "equal, digit by digit" in call("--cell", "shared:1:agreeing")
    assert "not equal to" in call("--cell", "shared:1:conflict")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--smoke"], "name a folder for it with --out"),
        (["--steps", "100"], "name a folder for it with --out"),
        (["--out", "o", "--steps", "3"], "4 or more"),
        (["--seeds", "0"], "more than 0"),
        (["--out", "o", "--data", "d"], "go together"),
        (["--base", "sd15.safetensors"], "go together"),
        (["--out", "o", "--base", "b", "--data", "d"], "--scorer ViT-L-14:openai"),
        (["--cell", "shared:99:agreeing"], "is no cell|is not there"),
        (["--cell", "shared"], "is no cell|is not there"),
    ],
)
def test_what_does_not_go_together_is_told_first(options: list[str], says: str) -> None:
    args = commands.parser().parse_args(["ablation", *options])
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        commands.run(args)


@pytest.mark.parametrize("name", ["nothing", "ViT-Q-99:openai"])
def test_a_clip_that_is_none_is_told(name: str) -> None:
    with pytest.raises(ValueError, match="is no CLIP"):
        clip_score.find(name)


def test_the_rate_is_the_best_of_those_whose_loss_is_finite() -> None:
    assert best_rate({1e-3: 0.1, 3e-3: 0.2, 9e-3: None}, "simple") == 3e-3
    with pytest.raises(ValueError, match="lower --rates"):
        best_rate({9e-3: None}, "simple")


def test_a_users_pictures_conflict_with_another_caption(pictures: list[Path]) -> None:
    files = [(pictures[i % 3], text) for i, text in enumerate(("a", "a", "b", "c"))]
    assert Prompts.of_files(files, 32).other == ["b", "b", "c", "a"]
    with pytest.raises(ValueError, match="different captions"):
        Prompts.of_files(files[:2], 32)


def test_a_json_list_of_plain_values_is_one_line(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, "x, [y]", None], "b": [[1], [2, 3]], "c": [], "d": [{"e": ["f\n", "g"]}]}
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text()) == data
    write_json(tmp_path / "y.json", {"a": [1, 2, {"b": ["c", "d"]}]})
    assert '["c", "d"]' in (tmp_path / "y.json").read_text()
