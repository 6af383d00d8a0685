"""The README shows what the result files say."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.cards import read_card
from checkpoints.files import sha256
from checkpoints.stable_diffusion import load_image_encoder, load_unet
from eval import fine, world
from eval.ablation import report
from eval.ablation.endpoint import grey_error
from eval.ablation.rows import Results
from eval.peers import benchmark, parity
from eval.prompts import Prompts
from eval.tables import markdown
from train.data import fingerprint

ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "results" / "world.json").read_text())


def test_readme_shows_the_results():
    readme = (ROOT / "README.md").read_text()
    assert world.table(RESULTS) in readme
    assert f"{RESULTS['vae_psnr']:.1f} dB" in readme


def test_readme_shows_global_against_fine_grained() -> None:
    """Of the shipped adapters, both with the shipped image encoder."""
    results = json.loads((ROOT / "results" / "fine.json").read_text())
    assert fine.table(results) in (ROOT / "README.md").read_text()
    assert results["sha256"] == {n: sha256(ROOT / "weights" / n) for n in results["sha256"]}


@pytest.mark.parametrize("measure", [parity, benchmark])
def test_readme_shows_what_was_measured_beside_diffusers(measure):
    results = json.loads((ROOT / "results" / f"{measure.__name__.split('.')[-1]}.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert measure.table(results) in readme
    assert results["command"] in readme and results.get("machine", "") in readme


def test_readme_and_report_show_the_ablation() -> None:
    """And its adapters are there, of which the files are."""
    results = Results.of(ROOT / "results" / "ablation.json")
    readme, seeds = (ROOT / "README.md").read_text(), results.study["seeds"]
    table = markdown(report.primary(results))
    assert table in readme and report.verdict(results) in readme
    assert f"({results.study['steps']} steps, {seeds} seeds)" in readme
    assert report.render(results) == (ROOT / "RESULTS.md").read_text()
    pictures = results.pictures
    wide = pictures[(pictures["form"] == "simple_wide") & (pictures["share"] == 1) & pictures["control"].isna()]
    wide = wide[(wide["task"] == "conflict") & (wide["lambda"] == 1)]
    assert f"follows the text in {wide['follows'].mean():.0%}" in readme
    adapters = ROOT / "results" / "ablation"
    assert {f.stem for f in adapters.glob("*.safetensors")} == {
        f"{form}-{seed}" for form in results.study["forms"] for seed in range(seeds)
    }
    base = fingerprint(load_unet(ROOT / "weights" / "unet.safetensors"))
    assert all(json.loads(f.read_text())["settings"]["made_from"]["unet"] == base for f in adapters.glob("*.json"))


def test_results_are_of_the_shipped_weights():
    weights = {name: sha256(ROOT / "weights" / name) for name in RESULTS["sha256"]}
    assert weights == RESULTS["sha256"]


def test_weights_are_small_and_licensed():
    files = list((ROOT / "weights").glob("*.safetensors"))
    assert {"unet", "vae", "text_encoder", "image_encoder", "ip_adapter", "ip_adapter_plus", "judge"} <= {
        f.stem for f in files
    }
    assert sum(f.stat().st_size for f in files) < 40e6
    assert all("OpenMoji" in read_card(f)["licence"] for f in files)


def test_readme_and_report_say_above_the_table_what_a_grey_scores() -> None:
    """The palettes that the results store are those of the prompts; so is the grey's score, and the share of the training."""
    results = Results.of(ROOT / "results" / "ablation.json")
    truth = Prompts.of_the_world(results.study["prompts"]).truth
    assert truth is not None and results.truth is not None
    assert grey_error(truth.own["palette"].numpy()) == pytest.approx(grey_error(results.truth["palette"]), abs=0.001)
    said = report.caveat(results)
    assert "scores 49.05 on this endpoint; IP-Adapter scores 49.9. 500 steps are 4.5 %" in said
    assert "A new study follows" in said
    phases = json.loads((ROOT / "weights" / "ip_adapter.json").read_text())["settings"]
    assert sum(phase["steps"] * phase["batch"] for phase in phases) == results.data["shipped_pictures"]
    for page in ("README.md", "RESULTS.md"):
        text = (ROOT / page).read_text()
        assert 0 < text.index(said) < text.index(markdown(report.primary(results)))


def test_the_lambda_is_the_best_of_those_that_follow_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of made-up scores: the lowest palette error where concept and background follow often enough; else the first."""
    table = {("all", 0.2): (0.95, 1.0, 50), ("all", 0.4): (0.74, 1.0, 30), ("finest", 0.5): (0.9, 0.95, 40)}
    table |= {("finest", 0.6): (0.9, 0.9, 38), ("finest", 0.7): (0.9, 0.89, 36)}
    names = ("concept", "background", "palette_error")

    def scores(_: object, prompts: object, texts: object, lam: Any, *__: object) -> dict[str, float]:
        return dict(zip(names, table[lam.layers or "all", lam.scale], strict=True))

    monkeypatch.setattr(world, "LAMBDAS", {"all": (0.2, 0.4), "finest": (0.5, 0.6, 0.7)})
    monkeypatch.setattr(world.Measure, "draw", scores)
    nothing: Any = None
    measure = world.Measure(nothing, nothing, 2, 4.0)
    chosen, sweep = world.choose_lambda(measure, 3)
    assert (chosen["layers"], chosen["lambda"], len(sweep)) == ("finest", 0.6, 5)
    monkeypatch.setattr(world, "FOLLOW", {"concept": 0.99})
    assert world.choose_lambda(measure, 3)[0]["lambda"] == 0.2


def test_the_second_clip_is_another_than_the_adapters() -> None:
    """No adapter ever saw it: another width, another patch size; and it tells concepts apart (the probe of its card)."""
    found = json.loads((ROOT / "weights" / "score_image.json").read_text())["results"]
    assert found["concept"] > 0.95 and found["background"] > 0.95
    score, own = (
        load_image_encoder(ROOT / "weights" / f"{n}.safetensors").config for n in ("score_image", "image_encoder")
    )
    assert score.width != own.width and score.stem_pool != own.stem_pool and score.output_dim != own.output_dim
