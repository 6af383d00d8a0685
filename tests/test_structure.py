"""Structure control beside image prompts: the distance between outlines, the prompts, and the measurement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import cards
from checkpoints.files import write_json
from eval import structure
from eval.__main__ import main
from eval.hinted import HintedPrompts
from sampling.loading import load
from train import control, t2i
from train.judge import ground_truth
from train.vae import bytes_to_tensor
from train.world import CONCEPTS, pictures

ROOT = Path(__file__).parent.parent


def mask(*pixels: tuple[int, int]) -> Tensor:
    empty = torch.zeros(16, 16, dtype=torch.bool)
    for y, x in pixels:
        empty[y, x] = True
    return empty


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ([(3, 4)], [(3, 4)], 0.0),
        ([(3, 4)], [(6, 8)], 5.0),
        ([(0, 0)], [(0, 0), (0, 10)], (0 + 5) / 2),  # the far pixel of b counts in one direction only
        ([(0, 0), (0, 2)], [(0, 1), (3, 1)], (1 + (1 + 10**0.5) / 2) / 2),
        ([], [(5, 5)], 16.0),
        ([], [], 16.0),
    ],
)
def test_chamfer_distances_by_hand(a: list[tuple[int, int]], b: list[tuple[int, int]], distance: float) -> None:
    assert structure.chamfer(mask(*a), mask(*b)) == pytest.approx(distance)
    assert structure.chamfer(mask(*b), mask(*a)) == pytest.approx(distance)


def test_true_pictures_have_the_lines_of_their_hints() -> None:
    """The error of the hints' own pictures is far below a pixel; that of other pictures is several pixels."""
    prompts = HintedPrompts.of_the_world(64, seed=5)
    true = bytes_to_tensor(pictures(prompts.hint_scenes))
    own, other = (structure.structure_error(x, prompts.hints)[0] for x in (true, true.roll(1, dims=0)))
    assert own < 0.12 and other > 3


def test_a_shifted_drawing_is_as_far_off_as_it_is_shifted() -> None:
    """A hint of isolated pixels, moved by (3, 4)."""
    x, hints = torch.ones(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    hints[:, 0, 2:24:10, 2:24:10] = 1
    x[:, :, 5:27:10, 6:28:10] = -1
    assert structure.structure_error(x, hints) == pytest.approx([5, 5, 5])


def test_prompts_agree_in_the_concept_alone() -> None:
    prompts = HintedPrompts.of_the_world(2 * len(CONCEPTS), seed=0)
    assert [a.concept for a in prompts.scenes] == [b.concept for b in prompts.hint_scenes]
    assert np.bincount([scene.concept for scene in prompts.scenes]).tolist() == [2] * len(CONCEPTS)
    assert not (prompts.background == ground_truth(prompts.scenes)["background"]).any()
    texts = prompts.texts("image and text")
    assert all(text.startswith("on a") and text.endswith("background") for text in texts)
    assert [named.endswith(text) for named, text in zip(prompts.texts("text"), texts, strict=True)] == [True] * len(texts)
    assert prompts.target("image").background.equal(ground_truth(prompts.scenes)["background"])
    assert prompts.target("text").background.equal(prompts.background)


@pytest.mark.filterwarnings("ignore:these words are not in this model's vocabulary")
def test_the_structure_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained ControlNet changes nothing, so its rows equal those without control, and the T2I-Adapter's do not."""
    weights, out, pipeline = tmp_path / "weights", tmp_path / "structure.json", load(ROOT / "weights")
    shutil.copytree(ROOT / "weights", weights, ignore=shutil.ignore_patterns("controlnet.*", "t2i.*"))
    command = ["eval", "--weights", str(weights), "structure", "--n", "2", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"controlnet\.safetensors is missing: run `python -m train control` first"):
        main()
    for stage in (control, t2i):
        torch.manual_seed(0)
        cards.save(stage.KIND.build(pipeline.unet, pipeline.vae.config.factor), weights / stage.KIND.file, {})
    main()
    results = json.loads(out.read_text())
    rows = {(row["task"], row["form"], row["scale"]): row["scores"] for row in results["rows"]}
    assert list(rows) == list(structure.cells()) and len(rows) == 12 + 6
    for task, names in structure.SCORED.items():
        assert set(rows[task, "none", 1.0]) == set(names)
        assert rows[task, "control", 1.0] == rows[task, "none", 1.0]
    assert any(rows[task, "t2i", 1.0] != rows[task, "none", 1.0] for task in structure.SCORED)
    assert results["anchors"]["true"][0] < results["anchors"]["another"][0]
    written = out.read_text()
    with monkeypatch.context() as patch:  # finished rows are kept, and missing ones are made again
        patch.setattr(structure.ControlMeasure, "draw", lambda *_: pytest.fail("a finished row is drawn again"))
        main()
    assert out.read_text() == written
    write_json(out, results | {"rows": [row for row in results["rows"] if row["form"] != "none"]})
    monkeypatch.setattr("sys.argv", [*command, "--form", "none"])
    main()
    assert json.loads(out.read_text())["rows"] == results["rows"]
    lines = structure.table(results).splitlines()
    assert len(lines) == 2 + 18 + 3 and "\n".join(lines) in capsys.readouterr().out
