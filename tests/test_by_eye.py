"""Drawings of texts, labelled by eye: what is drawn, and how the labels are compared with the texts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.files import read_json
from eval import by_eye
from eval.by_eye import evaluate, texts
from eval.calibration import tiles_of
from train.judge import load_judge
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, World, pictures

ROOT = Path(__file__).parent.parent


def test_each_concept_is_drawn_twice_on_different_backgrounds() -> None:
    pairs = texts()
    assert Counter(concept for concept, _ in pairs) == dict.fromkeys(CONCEPT_NAMES, 2) and len(set(pairs)) == 128
    assert {ground for _, ground in pairs} == set(BACKGROUND_NAMES)
    assert pairs == texts() and [concept for concept, _ in pairs[::2]] != list(CONCEPT_NAMES)


def test_the_sheet_and_what_it_should_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are row by row in the order of labels.json, each from the text that it names."""
    drawn: list[str] = []

    def grey(_: object, prompts: list[str], *__: object) -> torch.Tensor:
        drawn.extend(prompts)
        return torch.arange(len(prompts)).view(-1, 1, 1, 1).expand(-1, 3, 64, 64) / 63.75 - 1

    monkeypatch.setattr(by_eye, "draw_prompts", grey)
    by_eye.draw(ROOT / "weights", tmp_path)
    data = read_json(tmp_path / "labels.json")
    assert [each["text"] for each in data["drawn"]] == drawn and data["labels"] == []
    assert all(f" {each['concept']} on " in each["text"] and each["background"] in each["text"] for each in data["drawn"])
    assert [int(tile.mean()) for tile in tiles_of(tmp_path / "labels.png")] == pytest.approx([2 * i for i in range(128)], abs=1)
    with pytest.raises(ValueError, match=r"labels\.json holds no labels yet"):
        evaluate(load_judge(ROOT / "weights" / "judge.safetensors"), tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(data | {"labels": [{"concept": []}]}))
    with pytest.raises(FileExistsError, match="holds the labels of other pictures"):
        by_eye.draw(ROOT / "weights", tmp_path)


def test_shares_are_of_what_the_text_names(tmp_path: Path) -> None:
    scenes = [World("test")[i] for i in range(4)]
    Image.fromarray(np.concatenate(list(pictures(scenes)), axis=1)).save(tmp_path / "labels.png")
    shown = [{"concept": CONCEPT_NAMES[s.concept], "background": BACKGROUND_NAMES[s.background]} for s in scenes]
    names = {key: [each[key] for each in shown] for key in ("concept", "background")}
    labels = [{**names, "palette": {}}, {"concept": [None, *names["concept"][1:]], "background": [None] * 4, "palette": {}}]
    (tmp_path / "labels.json").write_text(json.dumps({"drawn": shown, "labels": labels}))
    scores = evaluate(load_judge(ROOT / "weights" / "judge.safetensors"), tmp_path)
    assert scores["labeller 1"] == {"concept": 100, "background": 100} and scores["labeller 2"] == {"concept": 75, "background": 0}
    assert scores["judge"] == {"concept": 100, "background": 100}
