"""Curves, intervals and adjusted p-values against closed forms and published values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.ablation.endpoint import GREY, Curves, Difference, difference, error_at, grey_error, holm
from eval.prompts import Prompts
from train.judge import load_judge
from train.world import random_palette


def test_the_endpoint_is_read_off_the_line_between_two_lambdas() -> None:
    following, error = np.array([1.0, 0.9, 0.5, 0.1]), np.array([60.0, 40.0, 20.0, 10.0])
    assert error_at(following, error, 0.8) == pytest.approx(40 - 20 * (0.9 - 0.8) / (0.9 - 0.5), abs=1e-12)
    assert error_at(following, error, 0.9) == pytest.approx(40)
    assert error_at(following, error, 0.05) == pytest.approx(10), (
        "a curve that never falls so low ends at its last lambda"
    )


def test_a_useless_larger_lambda_does_not_change_the_endpoint() -> None:
    following, error = np.array([1.0, 0.9, 0.85, 0.2]), np.array([60.0, 30.0, 45.0, 50.0])
    assert error_at(following, error, 0.8) == pytest.approx(30)


def test_a_curve_that_crosses_back_is_read_at_every_crossing() -> None:
    following, error = np.array([0.9, 0.7, 0.9]), np.array([50.0, 30.0, 10.0])
    assert error_at(following, error, 0.8) == pytest.approx(10)
    assert error_at(following[:2], error[:2], 0.8) == pytest.approx(40)


def test_text_that_is_never_followed_has_no_endpoint() -> None:
    assert math.isnan(error_at(np.array([0.7, 0.5]), np.array([50.0, 20.0]), 0.8))


def rows(error: np.ndarray) -> Curves:
    return Curves(np.ones_like(error), error)


def test_the_interval_of_a_plain_mean() -> None:
    rng = np.random.default_rng(1)
    a, b = (rows(rng.normal(mean, 6.0, (1, 1, 400))) for mean in (30.0, 27.0))
    found = difference(a, b, resamples=4000)
    each = (a.error - b.error)[0, 0]
    assert found.mean == pytest.approx(each.mean(), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * each.std() / 20, rel=0.06)


def test_seeds_are_resampled_too_and_paired() -> None:
    """Seeds differ strongly, but equally in both forms. The paired difference is exact; without pairing its interval is wide."""
    shift = np.random.default_rng(2).normal(0, 10, (8, 1, 1))
    level = np.zeros((8, 1, 50))
    paired = difference(rows(30 + level + shift), rows(28 + level + shift), resamples=500)
    assert paired == Difference(pytest.approx(2), pytest.approx(2), pytest.approx(2), pytest.approx(1 / 500))  # type: ignore[arg-type]
    apart = difference(rows(30 + level + shift), rows(28 + level - shift), resamples=500)
    assert (apart.high - apart.low) / 2 == pytest.approx(1.96 * 2 * shift.std() / 8**0.5, rel=0.15)
    assert apart.p > 0.05


def test_holm_gives_the_values_of_r() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_the_error_of_a_grey_picture_is_its_distance_from_the_palettes() -> None:
    """Compare with the definition of CIE76, and with the judge's score of a grey picture, to 0.1."""
    palettes = np.stack([random_palette(np.random.default_rng(i)) for i in range(50)])
    each = [math.dist(colour, (65, 0, 0)) for palette in palettes for colour in palette]
    assert grey_error(palettes) == grey_error(palettes.reshape(50, 6)) == pytest.approx(np.mean(each))
    prompts = Prompts.of_the_world(20)
    assert prompts.truth is not None
    level = 157.7  # sRGB of L = 65
    grey = torch.full((20, 3, 64, 64), level / 127.5 - 1)
    judge = load_judge(Path(__file__).parent.parent / "weights" / "judge.safetensors")
    palette = prompts.truth.own["palette"]
    score = judge.read(grey).score(prompts.truth.concept, prompts.truth.background, palette)
    assert score["palette_error"] == pytest.approx(grey_error(palette.numpy()), abs=0.1)
    assert GREY.tolist() == [65, 0, 0]
