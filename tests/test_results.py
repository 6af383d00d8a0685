"""The pages show the numbers of the result files, and these files belong to the shipped weights."""

import importlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints.cards import read_card
from checkpoints.clip import load_image_encoder
from checkpoints.files import sha256
from checkpoints.stable_diffusion import load_unet
from eval import docs
from eval.ablation import cause, points, rates, report, rivals_table, second_base, variants
from eval.ablation.rows import Results
from eval.ablation.summary import summarise
from train.fingerprint import fingerprint
from train.judge import delta_e, load_judge
from train.vae import bytes_to_tensor

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "RESULTS.md").read_text()


def test_make_docs_changes_nothing() -> None:
    """README.md and docs/ show the numbers of the result files."""
    values = docs.inserts(ROOT)
    assert not [path.name for path in docs.pages(ROOT) if docs.fill_page(path.read_text(), values) != path.read_text()]


def test_every_insert_is_shown_somewhere() -> None:
    shown = {name for path in docs.pages(ROOT) for _, name, _ in docs.PLACE.findall(path.read_text())}
    assert shown == set(docs.inserts(ROOT))


def test_pages_are_filled_where_they_are_marked() -> None:
    page = "a\n<!-- insert: one -->\nold\n<!-- end -->\nb\n<!-- insert: two -->\n<!-- end -->\n"
    new = docs.fill_page(page, {"one": "1\n1", "two": "2"})
    assert new == "a\n<!-- insert: one -->\n1\n1\n<!-- end -->\nb\n<!-- insert: two -->\n2\n<!-- end -->\n"
    assert docs.fill_page(new, {"one": "1\n1", "two": "2"}) == new
    with pytest.raises(ValueError, match="unknown insert 'two'"):
        docs.fill_page(page, {"one": "1"})


@pytest.mark.parametrize("name", ["world", "fine", "structure", "style"])
def test_results_name_the_shipped_weights(name: str) -> None:
    results = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert results["sha256"] == {n: sha256(ROOT / "weights" / n) for n in results["sha256"]}


def test_weights_are_small_and_licensed():
    files = list((ROOT / "weights").glob("*.safetensors"))
    assert {"unet", "vae", "text_encoder", "image_encoder", "ip_adapter", "ip_adapter_plus", "judge"} <= {
        f.stem for f in files
    }
    assert sum(f.stat().st_size for f in files) < 60e6
    assert all("OpenMoji" in read_card(f)["licence"] for f in files)


STAGES = {
    "vae": ("vae",),
    "clip": ("image_encoder", "text_encoder"),
    "unet": ("unet",),
    "adapter": ("ip_adapter",),
    "plus": ("ip_adapter_plus",),
    "judge": ("judge",),
    "scorer": ("score_image", "score_text"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_were_trained_by_the_recipe_in_the_tree(stage: str) -> None:
    """The settings in the cards are those of `make weights DEVICE=cuda`, at the commit that the card names."""
    phases = importlib.import_module(f"train.{stage}").PHASES
    plans = [json.loads(json.dumps(asdict(replace(plan.scale_batch(4), device="cuda")))) for plan in phases]
    for name in STAGES[stage]:
        card = read_card(ROOT / "weights" / f"{name}.safetensors")
        assert [{"fp16": False, **settings} for settings in card["settings"]] == plans  # fp16 is newer than some cards
        assert re.fullmatch(r"python -m train \w+ --device cuda --scale 4", card["command"])
        assert re.fullmatch(r"[0-9a-f]{12}", card["code"])


@pytest.mark.parametrize(("stage", "name"), [("control", "controlnet"), ("t2i", "t2i"), ("style", "comic")])
def test_what_is_added_to_the_base_was_trained_by_the_recipe_in_the_tree(stage: str, name: str) -> None:
    """On a CPU, with the default settings and the shipped base."""
    phases, card = importlib.import_module(f"train.{stage}").PHASES, read_card(ROOT / "weights" / f"{name}.safetensors")
    assert card["settings"] == [json.loads(json.dumps(asdict(plan))) for plan in phases]
    assert re.fullmatch(rf"python -m train {stage}( --state \S+)?", card["command"]) and re.fullmatch(r"[0-9a-f]{12}", card["code"])
    assert card["made_from"]["base"] == fingerprint(load_unet(ROOT / "weights" / "unet.safetensors"))


def test_the_labels_are_of_the_shipped_weights() -> None:
    labels = json.loads((ROOT / "results" / "by_eye" / "labels.json").read_text())
    shares = json.loads((ROOT / "results" / "by_eye.json").read_text())
    assert labels["made"]["unet"] == sha256(ROOT / "weights" / "unet.safetensors")
    assert shares["sha256"] == {"judge.safetensors": sha256(ROOT / "weights" / "judge.safetensors")}


@pytest.fixture(scope="module")
def study() -> Results:
    return Results.of(ROOT / "results" / "ablation.json")


def test_the_page_of_the_ablation_says_what_its_results_say(study: Results) -> None:
    assert report.render(study, study.beside(ROOT / "results", "rates")) == PAGE


TIERS = {
    "ablation": summarise,
    "cause": cause.summarise,
    "rivals": rivals_table.summarise,
    "variants": variants.summarise,
    "second_base": second_base.summarise,
    "rates": rates.summarise,
}


@pytest.mark.parametrize("tier", TIERS)
def test_the_summary_of_a_tier_is_that_of_its_drawings(tier: str) -> None:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == (pytest.approx(b, rel=1e-6, abs=1e-9) if isinstance(b, float) else b))

    results = Results.of(ROOT / "results" / f"{tier}.json")
    assert same(json.loads(json.dumps(TIERS[tier](results))), results.data["summary"])


@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier != "second_base"])
def test_a_tier_was_made_on_the_shipped_base(tier: str) -> None:
    """The fingerprints are those that the card of the shipped adapter names."""
    made_from = json.loads((ROOT / "results" / f"{tier}.json").read_text())["made_from"]
    base = read_card(ROOT / "weights" / "ip_adapter.safetensors")["made_from"]
    names = {"unet": "base", "vae": "vae", "text": "text encoder", "image": "image encoder"}
    assert {name: made_from[name] for name in names} == {name: base[other] for name, other in names.items()}
    assert made_from["judge"] == fingerprint(load_judge(ROOT / "weights" / "judge.safetensors"))


@pytest.mark.parametrize("tier", ["ablation", "cause", "variants", "rates"])
def test_the_shipped_adapters_of_a_tier_are_those_of_its_rows(tier: str) -> None:
    study, files = Results.of(ROOT / "results" / f"{tier}.json"), [*(ROOT / "results" / tier).glob("*.safetensors")]
    if tier == "ablation":
        assert {f"train-{path.stem}" for path in files} == {name for name in study.units if name.startswith("train-")}
    for path in files:
        made, unit = read_card(path), study.units[f"train-{path.stem}"]
        assert (made["settings"]["steps"], made["settings"]["lr"]) == (study.study["steps"], unit.value["rate"])
        assert made["settings"]["made_from"] == study.data["made_from"] and made["losses"] == unit.value["losses"]


def test_the_shipped_adapters_of_all_tiers_are_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "results").glob("*/*-[0-9].safetensors")) < 15e6


@pytest.mark.parametrize(
    ("tier", "form"), [*(("ablation", form) for form in ("ip_adapter", "simple", "shared", "concatenated")), ("rates", "simple")]
)
def test_the_endpoint_after_all_steps_is_that_of_its_drawings(tier: str, form: str) -> None:
    """Computed again from the palettes that the judge read, drawing by drawing, with torch's distances and numpy's interpolation."""
    study = Results.of(ROOT / "results" / f"{tier}.json")
    palettes = torch.tensor(study.data["prompts"]["test"]["truth"]["palette"], dtype=torch.float64).view(-1, 2, 3)
    collected, alone = [], study.measures("alone-complementary-test")
    for name in (name for name in study.units if re.fullmatch(rf"drawn-{form}-\d-8000-complementary-test-all", name)):
        read = study.units[name].arrays["palette"].double().view(-1, len(palettes), 2, 3) / 10
        following = [alone["following"].mean(), *study.measures(name)["following"].mean(axis=1)]
        values = [alone["information"].mean()]
        for each in read:
            d = (torch.cdist(each[:, 0], palettes[:, 0]) + torch.cdist(each[:, 1], palettes[:, 1])) / 2
            others = ~torch.eye(len(d), dtype=torch.bool)
            values.append(float(d[others].mean() - d.diagonal().mean()))
        last = max(i for i, share in enumerate(following) if share >= 0.8 * following[0])
        below, above = last + 1, last
        collected.append(np.interp(0.8 * following[0], [following[below], following[above]], [values[below], values[above]]))
    ends = study.data["summary"]["endpoint"]
    assert collected == pytest.approx(ends[form if tier == "ablation" else "8000"]["information"], abs=0.01)


@pytest.mark.parametrize(("form", "lam"), [("ip_adapter", 1.0), ("simple", 1 / 64)])
def test_the_shipped_adapters_draw_what_the_ablation_read(study: Results, form: str, lam: float) -> None:
    """Eight drawings, read by the judge again. The stored ones are from a GPU in bfloat16, so colours differ a little."""
    unit = study.units[f"drawn-{form}-0-8000-complementary-test-all"]
    first = unit.value["lambdas"].index(lam) * 128
    stored = {key: values[first : first + points.SHOWN] for key, values in unit.arrays.items()}
    drawn = bytes_to_tensor(np.stack([np.asarray(picture) for picture, _ in points.point(form, lam)]))
    read = load_judge(ROOT / "weights" / "judge.safetensors").read(drawn)
    for key in ("concept", "background"):
        same = getattr(read, key).argmax(dim=1) == stored[key].flatten()
        assert same.sum() >= points.SHOWN - 1
    assert delta_e(read.palette, stored["palette"].view(-1, 2, 3) / 10).mean() < 5


@pytest.mark.parametrize("tier", ["ablation", "rivals", "variants", "second_base", "rates"])
def test_every_row_of_a_tier_comes_from_one_processor_and_one_commit(tier: str) -> None:
    """Those of tier B that were added later come from another (docs/cause.md)."""
    units = Results.of(ROOT / "results" / f"{tier}.json").units.values()
    assert len({(unit.made["commit"], unit.made["processor"]) for unit in units}) == 1


def test_the_second_clip_is_another_than_the_adapters() -> None:
    """It has another width and patch size than the CLIP of the adapters, and it recognises concepts (probe in its card)."""
    results = json.loads((ROOT / "weights" / "score_image.json").read_text())["results"]
    assert results["concept"] > 0.95 and results["background"] > 0.95
    score, own = (
        load_image_encoder(ROOT / "weights" / f"{n}.safetensors").config for n in ("score_image", "image_encoder")
    )
    assert score.width != own.width and score.stem_pool != own.stem_pool and score.output_dim != own.output_dim
