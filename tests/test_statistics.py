"""Palette information, curves, intervals, grids and adjusted p-values against closed forms and published values."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from eval.ablation.endpoint import where_read
from eval.ablation.grid import GAP, MOST, TOP, Scale, bisect_lambdas, middle, spaced_lambdas
from eval.ablation.statistics import (
    Array,
    Bootstrap,
    Curve,
    at_index,
    at_level,
    best_constant,
    between,
    distances,
    holm,
    information,
    interval,
    over_seeds,
    read_at,
    retrieval,
    t_quantile,
)
from train.world import random_palette


def palettes(n: int) -> Array:
    return np.stack([random_palette(np.random.default_rng(i)) for i in range(n)])


def at(following: list[float], value: list[float], level: float) -> float:
    return float(read_at(np.array(following), np.array(value), np.array(level)))


# palette information


@pytest.mark.parametrize("constant", [(65.0, 0, 0), (0, 0, 0), (70, 60, -40)])
def test_a_constant_palette_knows_nothing(constant: tuple[float, float, float]) -> None:
    """Any constant scores exactly 0 on average, whatever the palettes, and finds its prompt half of the time."""
    true = palettes(37)
    d = distances(np.broadcast_to(np.array(constant), true.shape), true)
    assert information(d).mean() == pytest.approx(0, abs=1e-12) and retrieval(d).mean() == pytest.approx(0.5, abs=1e-12)
    assert np.abs(information(d)).max() > 1


def test_the_truth_scores_the_ceiling() -> None:
    """It is the mean error of another prompt's palette. No reading of these palettes scores more than the truth."""
    true = palettes(23)
    d = distances(true, true)
    pairs = [
        np.mean([math.dist(x, y) for x, y in zip(true[i], true[j], strict=True)]) for i in range(23) for j in range(23) if i != j
    ]
    assert information(d).mean() == pytest.approx(np.mean(pairs)) and retrieval(d).min() == 1
    assert information(distances(np.roll(true, 1, axis=0), true)).mean() < 0


def test_information_is_its_definition() -> None:
    read, true = palettes(12)[::-1], palettes(12)
    for i in (0, 7):
        each = [np.mean([math.dist(x, y) for x, y in zip(read[i], palette, strict=True)]) for palette in true]
        others = [value for j, value in enumerate(each) if j != i]
        assert information(distances(read, true))[i] == pytest.approx(np.mean(others) - each[i])
        assert retrieval(distances(read, true))[i] == pytest.approx(np.mean([value > each[i] for value in others]))


def test_halfway_between_grey_and_the_truth_is_about_half_of_the_ceiling() -> None:
    true = palettes(400)
    grey = np.broadcast_to(true.mean(axis=0), true.shape)
    ceiling = information(distances(true, true)).mean()
    assert 0.3 < information(distances((true + grey) / 2, true)).mean() / ceiling < 0.7


def test_the_best_constant_is_a_geometric_median() -> None:
    """On a line, it is the median. In general, no step away from it lowers the error."""
    line = np.zeros((5, 2, 3))
    line[:, :, 1] = np.array([-40.0, -3, 5, 6, 70])[:, None]
    assert best_constant(line)[:, 1] == pytest.approx(5, abs=0.1)
    true = palettes(60)
    best, rng = best_constant(true), np.random.default_rng(0)
    error = distances(best[None], true).mean()
    assert all(distances((best + rng.normal(0, 1, (2, 3)))[None], true).mean() > error - 1e-6 for _ in range(50))


# readings of a curve


def test_a_curve_is_read_on_the_line_between_two_lambdas() -> None:
    following, value = [1.0, 0.9, 0.5, 0.1], [0.0, 20.0, 40.0, 50.0]
    assert at(following, value, 0.8) == pytest.approx(20 + 20 * (0.9 - 0.8) / (0.9 - 0.5), abs=1e-12)
    assert at(following, value, 0.9) == pytest.approx(20)
    assert at(following, value, 0.05) == 50, "a curve that never falls so low is read at its last lambda"


def test_a_curve_that_crosses_back_is_read_at_the_highest_lambda() -> None:
    assert at([0.9, 0.7, 0.9, 0.7], [0, 10, 20, 30], 0.8) == pytest.approx(25)
    assert at([0.9, 0.7, 0.9], [0, 10, 20], 0.8) == 20


def test_a_level_that_is_never_reached_gives_nan() -> None:
    assert math.isnan(at([0.7, 0.5], [50, 20], 0.8))


def test_the_level_is_relative_to_the_text_alone() -> None:
    following, value = np.array([[0.5, 0.45, 0.35], [1.0, 0.9, 0.7]]), np.array([[0.0, 10, 20], [0, 10, 20]])
    assert at_level(0.8)(following, value) == pytest.approx([15, 15])
    places = {"end": [0.5, 0.3, 0.41], "start": [0.5, 0.39, 0.1], "between": [0.5, 0.41, 0.39]}
    assert all(where_read(np.array(following), 0.8) == place for place, following in places.items())
    assert at_index(1)(following, value).tolist() == [10, 10]


def test_the_mean_over_levels_is_that_of_a_straight_line() -> None:
    """following = 1 - x, value = x: the reading at a level is 1 - level, and its mean over 0.7 to 0.95 is 0.175."""
    x = np.linspace(0, 1, 5)
    assert between(0.7, 0.95)(1 - x, x) == pytest.approx(0.175)


# intervals


def curve(value: Array) -> Curve:
    return Curve(np.ones_like(value), value)


def test_the_interval_of_a_plain_mean() -> None:
    rng = np.random.default_rng(1)
    a, b = (curve(rng.normal(mean, 6.0, (1, 1, 400))) for mean in (30.0, 27.0))
    actual = Bootstrap(4000).difference(a, b, at_index(0))
    each = (a.value - b.value)[0, 0]
    assert actual.mean == pytest.approx(each.mean(), abs=1e-12)
    assert (actual.high - actual.low) / 2 == pytest.approx(1.96 * each.std() / 20, rel=0.06)


def test_seeds_are_resampled_too_and_paired() -> None:
    """Seeds differ strongly, but equally in both forms. The paired difference is exact; without pairing its interval is wide."""
    shift = np.random.default_rng(2).normal(0, 10, (8, 1, 1))
    level = np.zeros((8, 1, 50))
    paired = Bootstrap(500).difference(curve(30 + level + shift), curve(28 + level + shift), at_level(0.8))
    assert [paired.mean, paired.low, paired.high, paired.p] == pytest.approx([2, 2, 2, 1 / 500])
    apart = Bootstrap(2000).difference(curve(30 + level + shift), curve(28 + level - shift), at_level(0.8))
    assert (apart.high - apart.low) / 2 == pytest.approx(1.96 * 2 * shift.std() / 8**0.5, rel=0.15)
    assert apart.p > 0.05


def test_forms_with_fewer_seeds_are_paired_on_the_common_ones() -> None:
    a, b = np.zeros((5, 1, 9)), np.zeros((3, 1, 9))
    a[:3], a[3:], b[:] = 4, 100, 1
    assert Bootstrap(50).difference(curve(a), curve(b), at_index(0)).mean == 3


def test_the_reading_is_resampled_and_not_the_drawings_alone() -> None:
    """In every resample, both the level and the crossing move. Compare with resamples that are drawn and read one by one."""
    rng = np.random.default_rng(3)
    following = (rng.random((2, 3, 40)) < np.array([0.9, 0.8, 0.4])[:, None]).astype(float)
    following[1, 0] = following[0, 0]
    it, value = Bootstrap(30), rng.normal(0, 1, (2, 3, 40)) + np.array([0.0, 10, 20])[:, None]
    weights, rows = it.draws(2, 40)
    assert weights.sum(axis=1) == pytest.approx(1) and weights.std() > 0 and set(rows.flat) == {0, 1}
    samples = Curve(following, value).resample(at_level(0.8), weights, rows)
    for w, seeds, expected in zip(weights, rows, samples, strict=True):
        each = [at((following[s] @ w).tolist(), (value[s] @ w).tolist(), 0.8 * float(following[s][0] @ w)) for s in seeds]
        assert expected == pytest.approx(np.mean(each))


def test_p_is_twice_the_opposite_share() -> None:
    samples = np.array([-1.0] * 3 + [1.0] * 97)
    assert interval(1, samples).p == pytest.approx(0.06) and interval(1, np.abs(samples)).p == pytest.approx(0.01)
    assert interval(1, np.array([-1.0, 1.0])).p == 1 and math.isnan(interval(1, np.array([1.0, np.nan])).p)


def test_the_trend_is_the_change_per_doubling() -> None:
    """Differences of 1, 3 and 5 at 500, 1000 and 2000 steps grow by 2. numpy's polyfit finds the same slope for uneven steps."""
    flat = curve(np.zeros((2, 1, 6)))
    grown = [(curve(np.full((2, 1, 6), gap)), flat) for gap in (1.0, 3.0, 5.0)]
    assert Bootstrap(20).trend([500, 1000, 2000], grown, at_index(0)).mean == pytest.approx(2)
    uneven = Bootstrap(20).trend([500, 700, 8000], grown, at_index(0)).mean
    assert uneven == pytest.approx(np.polyfit(np.log2([500, 700, 8000]), [1, 3, 5], 1)[0])


def test_holm_gives_the_values_of_r() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    p_values = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert p_values == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


# grids


def falling(at: float, steepness: float) -> Callable[[float], float]:
    return lambda lam: 0.9 / (1 + (lam / at) ** steepness)


@pytest.mark.parametrize("scale", ["sum", "odds"])
@pytest.mark.parametrize(("at", "steepness"), [(0.7, 2.0), (1.6, 8.0), (0.01, 1.0)])
def test_neighbours_of_a_grid_are_close(scale: Scale, at: float, steepness: float) -> None:
    """Unless the grid is full. Its values are those of the function, and it has the text alone, 1 and the largest lambda."""
    follow = falling(at, steepness)
    shares = bisect_lambdas(follow, scale)
    assert {0.0, 1.0, TOP[scale]} <= set(shares) and list(shares) == sorted(shares)
    assert shares == {lam: follow(lam) for lam in shares} and len(shares) <= MOST + 1
    gaps = [abs(shares[a] - shares[b]) for a, b in pairwise(shares)]
    assert len(shares) == MOST + 1 or max(gaps) <= GAP * shares[0.0]


def test_a_flat_curve_needs_no_more_lambdas() -> None:
    assert list(bisect_lambdas(lambda _: 0.8, "sum")) == [0, 1, 2] and list(bisect_lambdas(lambda _: 0.0, "odds")) == [0, 1, 64]


def test_the_largest_gap_is_bisected_first() -> None:
    asked: list[float] = []

    def follow(lam: float) -> float:
        asked.append(lam)
        return 1.0 if lam < 1.3 else 0.0

    bisect_lambdas(follow, "sum", most=5)
    assert asked == [0, 1, 2, 1.5, 1.25, 1.375]


def test_lambdas_between_two() -> None:
    assert middle(0.5, 1, "sum") == 0.75 and middle(1 / 64, 1, "odds") == pytest.approx(1 / 8)
    assert middle(0, 1, "odds") == 1 / 256 and middle(0, 1 / 256, "odds") == 1 / 65536


def test_a_few_lambdas_span_the_grid() -> None:
    assert spaced_lambdas([0, 1, 2, 3, 4, 5, 6, 7]) == [1, 3, 5, 7] and spaced_lambdas([0, 1, 2]) == [1, 2]
    assert spaced_lambdas([0.0, 0.1, 0.2, 0.3, 0.4]) == [0.1, 0.2, 0.3, 0.4]


CLOSED = {1: math.tan(0.475 * math.pi), 2: 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))}


@pytest.mark.parametrize(("freedom", "t"), [*CLOSED.items(), (4, 2.7764), (9, 2.2622)])
def test_students_quantile(freedom: int, t: float) -> None:
    """Closed forms for 1 and 2 degrees of freedom, and the published table (Student 1908)."""
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_the_interval_over_seeds() -> None:
    """Mean ± t s / sqrt(n) for three seeds; none for one. A difference of curves has that of its seeds."""
    assert over_seeds(np.array([1.0, 2.0, 6.0])) == pytest.approx((3 - 4.3027 * math.sqrt(7 / 3), 3 + 4.3027 * math.sqrt(7 / 3)), abs=1e-3)
    assert over_seeds(np.array([1.0])) is None
    value = np.random.default_rng(0).normal(size=(3, 2, 5))
    a, b = Curve(np.ones_like(value), value), Curve(np.ones_like(value), 0 * value)
    each = value[:, 1].mean(axis=-1)
    assert Bootstrap(20).difference(a, b, at_index(1)).seeds == pytest.approx(over_seeds(each))
