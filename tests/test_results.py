"""The pages show what the result files say, and the files are of the shipped weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.cards import read_card
from checkpoints.clip import load_image_encoder
from checkpoints.files import sha256
from checkpoints.stable_diffusion import load_unet
from eval import docs, world
from eval.ablation import report
from eval.ablation.endpoint import grey_error
from eval.ablation.rows import Results
from eval.prompts import Prompts
from eval.tables import markdown
from train.fingerprint import fingerprint

ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "results" / "world.json").read_text())


def test_make_docs_changes_nothing() -> None:
    """README.md and docs/ show what the result files say, and RESULTS.md is what the ablation's results render to."""
    values = docs.inserts(ROOT)
    assert not [path.name for path in docs.pages(ROOT) if docs.filled(path.read_text(), values) != path.read_text()]
    assert report.render(Results.of(ROOT / "results" / "ablation.json")) == (ROOT / "RESULTS.md").read_text()


def test_every_insert_is_shown_somewhere() -> None:
    shown = {name for path in docs.pages(ROOT) for _, name, _ in docs.PLACE.findall(path.read_text())}
    assert shown == set(docs.inserts(ROOT))


def test_pages_are_filled_where_they_are_marked() -> None:
    page = "a\n<!-- insert: one -->\nold\n<!-- end -->\nb\n<!-- insert: two -->\n<!-- end -->\n"
    new = docs.filled(page, {"one": "1\n1", "two": "2"})
    assert new == "a\n<!-- insert: one -->\n1\n1\n<!-- end -->\nb\n<!-- insert: two -->\n2\n<!-- end -->\n"
    assert docs.filled(new, {"one": "1\n1", "two": "2"}) == new
    with pytest.raises(ValueError, match="unknown insert 'two'"):
        docs.filled(page, {"one": "1"})


def test_fine_results_are_of_the_shipped_adapters() -> None:
    results = json.loads((ROOT / "results" / "fine.json").read_text())
    assert results["sha256"] == {n: sha256(ROOT / "weights" / n) for n in results["sha256"]}


def test_the_ablation_ships_its_adapters() -> None:
    """One for each form and seed, trained on the shipped base."""
    results, adapters = Results.of(ROOT / "results" / "ablation.json"), ROOT / "results" / "ablation"
    assert {f.stem for f in adapters.glob("*.safetensors")} == {
        f"{form}-{seed}" for form in results.study["forms"] for seed in range(results.study["seeds"])
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


def test_pages_say_above_the_table_what_a_grey_scores() -> None:
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
    for page, table in (("README.md", report.two_by_two(results)), ("RESULTS.md", report.primary(results))):
        text = (ROOT / page).read_text()
        assert 0 < text.index(said) < text.index(markdown(table))


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
