"""Palette information, trade-off curves read at equal following, and bootstrap intervals: functions of arrays only.

A curve has one entry per lambda, in ascending order from lambda 0, the text alone. Leading axes are free.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROUNDS = 200  # of Weiszfeld's iteration
Read = Callable[[Array, Array], Array]  # reads one number off a curve: (following, value), each `... lambdas` -> `...`


def distances(readings: Array, palettes: Array) -> Array:
    """Compute the CIE76 difference of each palette `n 2 3` from each of `m 2 3`, averaged over the two colours: `n m`."""
    return np.asarray(np.linalg.norm(readings[:, None] - palettes[None], axis=-1).mean(axis=-1))


def information(distance: Array) -> Array:
    """Compute the palette information of n drawings from their distances d to all prompts' palettes, `n n`: `n`.

    It is the mean of d(i, j) over j != i, minus d(i, i). A constant palette scores exactly 0 on average over the prompts.
    """
    own = np.diagonal(distance)
    return np.asarray((distance.sum(axis=1) - own) / (len(own) - 1) - own)


def retrieval(distance: Array) -> Array:
    """Compute the share of other prompts whose palette is farther than the own one, `n n` -> `n`; ties count half.

    The mean is the area under the ROC curve of finding the own prompt: 0.5 for knowing nothing, 1 for the truth.
    """
    own = np.diagonal(distance)[:, None]
    return np.asarray(((distance > own).sum(axis=1) + 0.5 * ((distance == own).sum(axis=1) - 1)) / (len(own) - 1))


def best_constant(palettes: Array) -> Array:
    """Return the constant palette with the smallest mean error against palettes `n 2 3`: `2 3`.

    Each colour is the geometric median, by Weiszfeld's iteration.
    """
    centre = palettes.mean(axis=0)
    for _ in range(ROUNDS):
        weight = 1 / np.linalg.norm(palettes - centre, axis=-1, keepdims=True).clip(1e-9)
        centre = (weight * palettes).sum(axis=0) / weight.sum(axis=0)
    return np.asarray(centre)


def read_at(following: Array, value: Array, level: Array) -> Array:
    """Read `value` at the highest lambda where `following` is at least `level`, `...`. Between lambdas, both are linear.

    A curve that ends above the level is read at its last lambda. NaN if the curve never reaches the level.
    """
    above = following >= level[..., None]
    last = above.shape[-1] - 1 - above[..., ::-1].argmax(axis=-1)
    after = np.minimum(last + 1, above.shape[-1] - 1)

    def take(array: Array, index: NDArray[np.intp]) -> Array:
        return np.take_along_axis(array, index[..., None], axis=-1)[..., 0]

    drop = take(following, last) - take(following, after)
    part = np.divide(take(following, last) - level, drop, out=np.zeros_like(drop), where=drop > 0)
    values = take(value, last) + part * (take(value, after) - take(value, last))
    return np.where(above.any(axis=-1), values, np.nan)


def at_level(level: float) -> Read:
    """Read a curve where it keeps a share `level` of the following of its first entry, the text alone."""
    return lambda following, value: read_at(following, value, level * following[..., 0])


def between(low: float, high: float, levels: int = 26) -> Read:
    """Average the readings of a curve over equally spaced levels from `low` to `high`."""
    each = [at_level(float(level)) for level in np.linspace(low, high, levels)]
    return lambda following, value: np.mean([read(following, value) for read in each], axis=0)


def at_index(index: int) -> Read:
    """Read a curve at one of its lambdas."""
    return lambda following, value: value[..., index]


@dataclass(frozen=True)
class Curve:
    """The curve of one form for each seed. `following` (0 or 1, or a share) and `value`: `seeds lambdas prompts`."""

    following: Array
    value: Array

    def first(self, seeds: int) -> Curve:
        """Return the curves of the first seeds."""
        return Curve(self.following[:seeds], self.value[:seeds])

    def seeds(self, read: Read) -> Array:
        """Read the curve of each seed, averaged over all prompts: `seeds`."""
        return read(self.following.mean(axis=-1), self.value.mean(axis=-1))

    def resample(self, read: Read, weights: Array, rows: NDArray[np.intp]) -> Array:
        """Read the curve in each resample, averaged over the seeds in `rows`, `r seeds`: `r`. `weights`: of the prompts, `r prompts`."""
        following, value = (np.moveaxis(part @ weights.T, -1, 0) for part in (self.following, self.value))
        return np.asarray(np.take_along_axis(read(following, value), rows, axis=1).mean(axis=1))


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval, and p, twice the share of resamples with the opposite sign, at most 1.

    `seeds`: the 95 % interval over seeds alone (`over_seeds`); None if there is one seed.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: tuple[float, float] | None = None


def interval(mean: float, samples: Array) -> Interval:
    """Summarise the resamples of a number by the percentile method. p is at least 1 / the number of resamples; NaN if any is NaN."""
    low, high = np.quantile(samples, (0.025, 0.975))
    p = min(1.0, max(1 / len(samples), 2 * min(float(np.mean(samples <= 0)), float(np.mean(samples >= 0)))))
    return Interval(float(mean), float(low), float(high), p if np.isfinite(samples).all() else float("nan"))


def over_seeds(values: Array) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of n values, one for each seed: the mean ± t s / sqrt(n), with Student's t; None if n is 1."""
    n = len(values)
    if n < 2:
        return None
    half = t_quantile(n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, from the integral of its density."""
    x = np.linspace(0, 20, 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    above_half = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2) * x[1]])
    return float(np.interp(0.475, above_half, x))


@functools.lru_cache(maxsize=4)
def _draws(resamples: int, seed: int, seeds: int, prompts: int) -> tuple[Array, NDArray[np.intp]]:
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts
    return weights, rng.integers(seeds, size=(resamples, seeds))


@dataclass(frozen=True)
class Bootstrap:
    """Resamples seeds and prompts. The same object gives the same resamples for all curves with as many seeds and prompts."""

    resamples: int = 20_000
    seed: int = 0

    def draws(self, seeds: int, prompts: int) -> tuple[Array, NDArray[np.intp]]:
        """Return the weights of the prompts, `r prompts`, which sum to 1, and the resampled seeds, `r seeds`."""
        return _draws(self.resamples, self.seed, seeds, prompts)

    def samples(self, a: Curve, b: Curve, read: Read) -> tuple[float, Array]:
        """Return the difference a - b of a reading, and its resamples. Both curves share the resampled seeds and prompts."""
        seeds = min(len(a.value), len(b.value))
        a, b = a.first(seeds), b.first(seeds)
        draws = self.draws(seeds, a.value.shape[-1])
        return float((a.seeds(read) - b.seeds(read)).mean()), a.resample(read, *draws) - b.resample(read, *draws)

    def difference(self, a: Curve, b: Curve, read: Read) -> Interval:
        """Return the difference a - b of a reading, paired by seed, on the seeds that both have."""
        seeds = min(len(a.value), len(b.value))
        return replace(interval(*self.samples(a, b, read)), seeds=over_seeds(a.first(seeds).seeds(read) - b.first(seeds).seeds(read)))

    def trend(self, steps: Sequence[int], pairs: Sequence[tuple[Curve, Curve]], read: Read) -> Interval:
        """Return the least-squares slope of the differences a - b against log2(steps): the change per doubling of the steps."""
        differences = [self.samples(a, b, read) for a, b in pairs]
        x = np.log2(steps) - np.log2(steps).mean()
        mean, samples = np.array([mean for mean, _ in differences]), np.stack([each for _, each in differences], axis=1)
        return interval(float(mean @ x / (x @ x)), samples @ x / (x @ x))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Adjust p-values by Holm's method: multiply the i-th smallest of m by m - i (i from 0), keep them in order, and cap them at 1."""
    p_values, least = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - i) * p[name]))
        p_values[name] = least
    return p_values
