"""The agreement of the judge with human labels, compared with small examples by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.files import read_json, sha256
from eval.calibration import Labels, agreement, evaluate, most_likely, palette_error, tiles_of
from eval.prompts import Prompts
from train.judge import load_judge
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES

ROOT = Path(__file__).parent.parent
LABELS = read_json(ROOT / "results" / "labels.json")
WHITE, BLACK, GREY = np.array([100.0, 0, 0]), np.array([0.0, 0, 0]), np.array([40.0, 30, 0])


def test_agreement_is_that_of_a_small_example() -> None:
    """Of five concepts, three agree: two of the three that the labels name, and one of the two that they do not. Of the three
    backgrounds that the labels name, one agrees. Pictures 0 and 4 have two palettes, with errors 0 and (60 + 0) / 2."""
    labels = Labels(
        ["fox", "pig", "owl", None, None],
        ["red", "red", "blue", None, None],
        {0: np.stack([WHITE, BLACK]), 2: np.stack([WHITE, WHITE]), 4: np.stack([WHITE, BLACK])},
    )
    seen = Labels(
        ["fox", "pig", None, None, "fox"],
        ["red", "blue", None, "red", None],
        {0: np.stack([BLACK, WHITE]), 1: np.stack([WHITE, WHITE]), 4: np.stack([WHITE, np.array([0.0, 60, 0])])},
    )
    shares = agreement(seen, labels)
    assert list(shares.values()) == pytest.approx([100 * 3 / 5, 100 * 2 / 3, 100 / 2, 100 / 3, 15])


def test_the_palette_error_uses_the_better_order() -> None:
    """White to black is 100; black to GREY is 50, by Pythagoras with 40 and 30."""
    assert palette_error(np.stack([WHITE, BLACK]), np.stack([GREY, WHITE])) == pytest.approx((0 + 50) / 2)
    assert palette_error(np.stack([WHITE, BLACK]), np.stack([WHITE, GREY])) == pytest.approx((0 + 50) / 2)
    assert palette_error(np.stack([WHITE, WHITE]), np.stack([WHITE, BLACK])) == pytest.approx(50)


def test_colours_of_labels_are_cielab() -> None:
    """The published CIELAB values of the sRGB primaries (D65). A drawing with a single colour has no palette."""
    labels = Labels.of({"concept": [None] * 6, "background": [None] * 6, "palette": {"5": ["#ff0000", "#0000ff"], "3": None}})
    assert list(labels.palette) == [5]
    assert labels.palette[5] == pytest.approx(np.array([[53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]), abs=0.02)


def test_the_class_after_the_last_name_is_none() -> None:
    logits = torch.eye(4)[[2, 0, 3, 1]]
    assert most_likely(logits, ["a", "b", "c"]) == ["c", "a", None, "b"]
    assert most_likely(logits[:, :3], ["a", "b", "c"])[:2] == ["c", "a"], "a judge without that answer always names one"


def test_pictures_are_cut_row_by_row(tmp_path: Path) -> None:
    sheet = Image.new("RGB", (3 * 64, 2 * 64))
    for i in range(6):
        sheet.paste((10 * i, 0, 255), (i % 3 * 64, i // 3 * 64, i % 3 * 64 + 64, i // 3 * 64 + 64))
    sheet.save(tmp_path / "sheet.png")
    tiles = tiles_of(tmp_path / "sheet.png")
    assert tiles.shape == (6, 64, 64, 3) and (tiles == np.array([[10 * i, 0, 255] for i in range(6)])[:, None, None]).all()


def test_every_picture_is_labelled_twice() -> None:
    assert len(tiles_of(ROOT / "results" / "labels.png")) == len(LABELS["drawn"]) == 200
    cells = [set(labels["palette"]) for labels in LABELS["labels"]]
    assert len(cells) == 2 and cells[0] == cells[1] and len(cells[0]) == 40
    for labels in LABELS["labels"]:
        assert len(labels["concept"]) == len(labels["background"]) == 200
        assert set(labels["concept"]) <= {None, *CONCEPT_NAMES} and set(labels["background"]) <= {None, *BACKGROUND_NAMES}


def test_the_pictures_are_of_the_prompts_that_labels_json_names() -> None:
    """There are 8 sources with 25 pictures each. The text is empty, the conflicting one, or only its background."""
    prompts, sources = Prompts.of_the_world(200, seed=5), [each["adapter"] for each in LABELS["drawn"]]
    forms = [str(source).rpartition("-")[0] or source for source in sources]
    assert len(set(forms)) == 8 and all(forms.count(form) == 25 for form in forms)
    for i, each in enumerate(LABELS["drawn"]):
        conflict, shown = prompts.conflicts[i], each["picture"]
        assert each["seed"] == i and (shown is None) == (each["adapter"] is None)
        assert shown is None or (shown["concept"] in CONCEPT_NAMES and shown["background"] in BACKGROUND_NAMES)
        assert each["text"] in ("", conflict, conflict[conflict.index("on a") :])


def test_the_judge_agrees_with_the_labels() -> None:
    """The stored numbers are good enough, and those of the shipped judge, up to one or two pictures on another processor."""
    stored, judge = read_json(ROOT / "results" / "calibration.json"), ROOT / "weights" / "judge.safetensors"
    assert stored["sha256"] == {judge.name: sha256(judge)}
    scores = evaluate(load_judge(judge), ROOT / "results")
    assert scores["labellers"] == stored["agreement"]["labellers"]
    assert scores["judge"] == pytest.approx(stored["agreement"]["judge"], abs=2)
    assert scores["judge"]["concept, where the labels name one"] >= 75
    assert scores["judge"]["background, where the labels name one"] >= 93
    assert scores["judge"]["palette error"] <= 20
    assert scores["judge"]["none of these, where the labels say so"] >= 45


def test_the_page_says_how_many_are_labelled() -> None:
    page = (ROOT / "docs" / "world.md").read_text().replace("\n", " ")
    concepts, backgrounds = ([200 - labels[key].count(None) for labels in LABELS["labels"]] for key in ("concept", "background"))
    assert f"a concept in {concepts[0]} and {concepts[1]} of the drawings" in page
    assert f"a background in {backgrounds[0]} and {backgrounds[1]}." in page
    both = [Labels.of(labels).palette.keys() for labels in LABELS["labels"]]
    assert f"{len(both[0] & both[1])} of 40 drawings" in page
