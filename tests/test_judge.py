"""The judge and the second CLIP: their accuracy, and that the measurements can load what their training writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints.cards import read_card
from eval import clip_score
from train import clip, judge, scorer, spoiled
from train.colour import srgb_to_lab, tensor_to_lab
from train.judge import Judge, Reading, delta_e, ground_truth, load_judge
from train.randomness import generator
from train.vae import bytes_to_tensor
from train.world import World, pictures

ROOT = Path(__file__).parent.parent


def test_the_shipped_judge_reads_true_pictures() -> None:
    """On held-out pictures: 99 % of concepts, all backgrounds, palettes within CIE76 3, placements within two pixels."""
    scenes = [World("test")[i] for i in range(400)]
    truth = ground_truth(scenes)
    reading = load_judge(ROOT / "weights" / "judge.safetensors").read(bytes_to_tensor(pictures(scenes)))
    score = reading.score(truth["concept"], truth["background"], truth["palette"])
    assert score["concept"] >= 0.99 and score["background"] == 1 and score["palette_error"] < 3
    assert (reading.placement - truth["placement"]).norm(dim=-1).mean() < 2


def test_the_palette_is_a_mean_of_colours_that_are_there() -> None:
    """For any weights, the palette of a picture of one colour is that colour twice, by the closed form of CIELAB."""
    torch.manual_seed(0)
    colour = np.array([0.2, 0.5, 0.7])
    x = torch.tensor(2 * colour - 1).float().view(1, 3, 1, 1).expand(2, 3, 64, 64)
    palette = Judge().read(x).palette
    assert palette.shape == (2, 2, 3)
    np.testing.assert_allclose(palette, np.broadcast_to(srgb_to_lab(colour), (2, 2, 3)), atol=1e-3)


def test_scores_are_shares_and_mean_distances() -> None:
    palette = torch.zeros(2, 2, 3)
    reading = Reading(torch.eye(2, 64), torch.eye(2, 10).flip(0), palette, torch.zeros(2, 3))
    score = reading.score(torch.tensor([0, 1]), torch.tensor([0, 0]), palette + torch.tensor([3.0, 4.0, 0.0]))
    assert score == {"concept": 1.0, "background": 0.5, "palette_error": 5.0}
    assert delta_e(palette, palette + torch.tensor([[[0.0, 0, 2]], [[0, 0, 4]]])).tolist() == [2, 4]


def test_the_judge_can_be_trained_and_loaded(tmp_path: Path) -> None:
    plan = replace(judge.PHASES[0], steps=2, batch=4)
    judge.train(tmp_path / "state", tmp_path, (plan,), pictures=40)
    card = read_card(tmp_path / "judge.safetensors")
    assert card["command"] == "python -m train judge" and card["settings"][0]["steps"] == 2
    assert 0 <= card["results"]["concept"] <= 1
    x = bytes_to_tensor(pictures([World("test")[0]]))
    assert load_judge(tmp_path / "judge.safetensors").read(x).palette.isfinite().all()


def test_the_second_clip_can_be_trained_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both encoders have the same output width, so their cosine is defined."""
    monkeypatch.setattr(clip, "probe", lambda image: {"concept": 0.0})
    plan = replace(scorer.PHASES[0], steps=2, batch=4, bf16=False)
    scorer.train(tmp_path / "state", tmp_path, (plan,), pictures=24)
    assert read_card(tmp_path / "score_text.safetensors")["command"] == "python -m train scorer"
    loaded: Any = clip_score.load(tmp_path)
    assert torch.isfinite(loaded.texts(["a fox", "an owl"])).all() and loaded.texts(["a fox"]).shape == (1, 192)


# what the judge must not name


def spoilt(n: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, spoiled.Labels]:
    """Return (pictures, their concepts, spoiled pictures, labels), made from true pictures and other drawings."""
    pool = judge.answers(n - 16, 16, "cpu")
    x, truth = pool.at(torch.arange(n))
    made, labels = spoiled.spoil(x, truth["concept"], truth["background_rgb"], generator(seed, 0))
    return x, truth["concept"], made, labels


def test_spoiled_pictures_are_labelled_none_and_the_others_are_left_alone() -> None:
    x, concept, made, labels = spoilt()
    same = (made == x).flatten(1).all(dim=1)
    assert 0.2 < 1 - float(same[:240].float().mean()) < 0.4
    assert torch.equal(labels.is_clean.bool(), same & (concept != spoiled.NONE))
    assert torch.equal(labels.concept[same], concept[same]) and (labels.concept[~same] == spoiled.NONE).all()
    assert labels.concept_known[same].all() and labels.background_known[same].all()
    assert 0.5 < float(labels.concept_known[~same].mean()) < 1 and (concept[240:] == spoiled.NONE).all()


def test_a_warp_displaces_pixels_by_its_standard_deviation() -> None:
    x = torch.linspace(-1, 1, 64).expand(400, 1, 64, 64)
    still = spoiled.warp(x, torch.zeros(400), generator(0, 0))
    torch.testing.assert_close(still, x.contiguous(), atol=1e-5, rtol=0)
    moved = spoiled.warp(x, torch.full((400,), 2.0), generator(0, 0))  # a ramp of 63 / 2 pixels per unit
    inside = (moved - x)[..., 16:48, 16:48] * 63 / 2
    assert float(inside.std()) == pytest.approx(2.0 * 63 / 64, rel=0.25)  # interpolation between grid points lowers it


def test_the_colours_of_tensors_are_those_of_arrays() -> None:
    rgb = torch.rand(3, 5, 7, 3, generator=generator(0, 0))
    rgb[0] *= 0.05  # dark ones
    np.testing.assert_allclose(tensor_to_lab(rgb), srgb_to_lab(rgb.double().numpy()), atol=2e-3)
