"""`python -m eval clip`: the scores against a direct computation, the intervals, resumption, several processes, and what is reported."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_pictures import write_pictures
from teams import together
from tiny import IMAGE, TEXT
from torch import Tensor

from checkpoints import cards
from checkpoints.files import read_json
from eval import clip_score, table1
from eval.__main__ import main
from eval.scores import bootstrap
from eval.table1 import Protocol, first_of_each, measure_cosines, report, scores_of
from model.image_encoder import ImageEncoder
from model.text_encoder import TextEncoder
from sampling.images import to_images
from sampling.loading import load
from sampling.pipeline import Pipeline
from sampling.request import WEIGHTS
from train.captioned import captioned_files

pytestmark = pytest.mark.filterwarnings("ignore:this model's vocab", "ignore:This DataLoader will create", "ignore:these words are not")
FAST = Protocol(pictures=5, images_per_prompt=2, steps=2, seed=3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    image, text = ImageEncoder(replace(IMAGE, output_dim=10)), TextEncoder(replace(TEXT, output_dim=10))
    for name, module in {"score_image": image, "score_text": text}.items():
        cards.save(module, folder / f"{name}.safetensors", {"command": "a test"})
    return folder


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return load(WEIGHTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 5)


def line(data: Path, clip: Path, work: Path) -> list[str]:
    options = {"data": data, "scorer": clip, "n": 5, "images-per-prompt": 2, "steps": 2, "state": work / "state", "out": work / "clip.json"}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def test_from_end_to_end(
    data: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the mini weights; everything that a comparison with Table 1 needs is in the file."""
    monkeypatch.setattr(sys, "argv", ["eval", "clip", *line(data, clip, tmp_path)])
    main()
    results = read_json(tmp_path / "clip.json")
    assert results["protocol"] == {
        **{"pictures": 5, "images_per_prompt": 2, "prompt": "", "scale": 1.0, "steps": 2, "guidance": 7.5, "seed": 0},
        **{"sampler": "DDIM", "size": [64, 64], "data": "data"},
    }
    assert results["departs from the paper in"] == [
        "pictures: 5, in the paper 5000",
        "images_per_prompt: 2, in the paper 4",
        "steps: 2, in the paper 50",
    ]
    assert results["drawings"] == 10 and results["Table 1"]["CLIP-I"] == 0.828
    assert {"base", "adapter", "scorer", "interval", "trainable parameters", "made_from", "code", "torch", "compare"} <= results.keys()
    assert {*results["scores"]} == {"clip_i", "clip_t", "clip_i_score", "clip_t_score"}
    assert all(low <= value <= high for value, low, high in results["scores"].values())
    assert capsys.readouterr().out.startswith(f"clip_i: {results['scores']['clip_i'][0]:.4f} (")
    assert sum(p.numel() for p in load(WEIGHTS).adapters[0].parameters()) == results["trainable parameters"]


def test_scores_are_cosines_of_each_drawing(data: Path, clip: Path, mini: Pipeline, tmp_path: Path) -> None:
    """Compared with one drawing at a time: its seed, the empty text, and the cosines of both kinds."""
    files, scorer = captioned_files(data, tmp_path), clip_score.find(str(clip))
    scores = scores_of(mini, scorer, [files[3], files[4]], 3, FAST, batch=3)
    for row, number in enumerate((3, 4)):
        picture = files[number].open()
        for j in range(2):
            drawn = mini.sample("", 3 + 2 * number + j, mini.embed(picture), guidance=7.5, steps=2)
            shown = F.normalize(scorer.images(to_images(drawn)))
            for name, target in {"clip_i": scorer.images([picture]), "clip_t": scorer.texts([files[number].text])}.items():
                assert scores[name][row][j] == pytest.approx(float((shown * F.normalize(target)).sum()), abs=2e-3)


def test_finished_blocks_are_not_drawn_again(
    data: Path, clip: Path, mini: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped, and one on two processes, give the same numbers."""
    files, scorer, seen, real = captioned_files(data, tmp_path), clip_score.find(str(clip)), list[int](), scores_of
    monkeypatch.setattr(table1, "BLOCK", 2)

    def counted(pipeline: Pipeline, scorer: Any, part: Any, first: int, *rest: Any) -> Any:
        if first == stop_at:
            raise KeyboardInterrupt
        seen.append(first)
        return real(pipeline, scorer, part, first, *rest)

    monkeypatch.setattr(table1, "scores_of", counted)
    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        measure_cosines(mini, scorer, files, FAST, 4, tmp_path / "a")
    stop_at = -1
    whole = measure_cosines(mini, scorer, files, FAST, 4, tmp_path / "a")
    assert seen == [0, 2, 4] and whole["clip_i"].shape == (5, 2)

    def work(rank: int) -> None:
        seen.clear()
        cosines = measure_cosines(mini, scorer, files, FAST, 4, tmp_path / "b")
        assert all(torch.equal(cosines[name], whole[name]) for name in whole)
        (tmp_path / f"{rank}.json").write_text(json.dumps(seen))

    together(2, work)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[0, 4], [2]]


def test_each_picture_counts_once(data: Path, tmp_path: Path) -> None:
    """COCO has five captions for each picture: the first is used."""
    entries = [{"image_file": f"{i % 3:02}.png", "text": f"caption {i}"} for i in range(9)]
    (data / "list.json").write_text(json.dumps(entries))
    files = captioned_files(data / "list.json", tmp_path)
    assert [file.text for file in first_of_each(files, 5)] == ["caption 0", "caption 1", "caption 2"]
    assert [file.text for file in first_of_each(files, 2)] == ["caption 0", "caption 1"]


def test_scores_of_known_cosines() -> None:
    """Of three prompts with two drawings each; CLIPScore clips each drawing, not the mean."""
    row = report({"clip_i": torch.tensor([[0.5, 0.7], [0.6, 0.6], [0.6, 0.6]]), "clip_t": torch.tensor([[-0.2, 0.2]] * 3)})
    assert row["clip_i"] == pytest.approx([0.6] * 3) and row["clip_i_score"] == pytest.approx([1.5] * 3)
    assert row["clip_t"] == pytest.approx([0.0] * 3, abs=1e-7) and row["clip_t_score"] == pytest.approx([0.25] * 3)


def test_the_bootstrap_is_that_of_a_mean() -> None:
    """For many values, the normal interval. For two values, the means are 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4."""
    x: Tensor = torch.randn(400, generator=torch.Generator().manual_seed(0))
    half = 1.96 * float(x.std()) / 20
    assert bootstrap(x) == pytest.approx([float(x.mean()), float(x.mean()) - half, float(x.mean()) + half], abs=6e-3)
    assert bootstrap(torch.tensor([0.0, 1.0])) == [0.5, 0.0, 1.0]


def test_what_cannot_be_measured_gets_a_sentence(data: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from own_pictures import write_base

    base = write_base(tmp_path / "base")
    for option, sentence in (
        (("--checkpoint", str(base)), "this measures one adapter and its image encoder: name them with --ip-adapter"),
        (("--data", "nowhere"), "nowhere: No such file"),
        (("--scorer", "CLIP"), "CLIP does not name a CLIP"),
    ):
        monkeypatch.setattr(sys, "argv", ["eval", "clip", *line(data, clip, tmp_path), *option])
        with pytest.raises(SystemExit, match=f"error: {sentence}"):
            main()
    assert not (tmp_path / "clip.json").exists()
