"""From raw rows to a claim: trade-off curves, the primary endpoint, and how sure one can be of a difference.

A curve is what a form does as lambda grows: how often its pictures follow the text, and how far they are from the picture's
palette. Forms differ in what a lambda means, so they are compared where they follow the text equally often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def error_at(following: Array, error: Array, level: float = 0.8) -> float:
    """The lowest error that the curve reaches while it still follows the text in `level` of the prompts.

    `following`, `error`: one entry a lambda, in growing order, the first without the picture (lambda 0); between two lambdas
    both are interpolated linearly. NaN when even the first entry follows less often than that.
    """
    best = np.inf
    for i in range(len(error)):
        if following[i] >= level:
            best = min(best, error[i])
        if i and (following[i - 1] - level) * (following[i] - level) < 0:
            share = (following[i - 1] - level) / (following[i - 1] - following[i])
            best = min(best, error[i - 1] + share * (error[i] - error[i - 1]))
    return float(best) if np.isfinite(best) else float("nan")


@dataclass(frozen=True)
class Rows:
    """Raw rows of one form: `following` (0 or 1, or a share) and `error`, both `seeds lambdas prompts`."""

    following: Array
    error: Array

    def endpoints(self, level: float, prompts: Array | None = None) -> Array:
        """`error_at` for every seed; `prompts` says how often each prompt counts."""
        w = np.ones(self.error.shape[-1]) if prompts is None else prompts
        follow, error = self.following @ w / w.sum(), self.error @ w / w.sum()
        return np.array([error_at(f, e, level) for f, e in zip(follow, error, strict=True)])


@dataclass(frozen=True)
class Difference:
    """a - b, its bootstrap interval (95 %), and the share of resamples on the other side of zero, twice."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def difference(a: Rows, b: Rows, level: float = 0.8, resamples: int = 2000, seed: int = 0) -> Difference:
    """The endpoints' difference, paired by seed; seeds and prompts are resampled together, the same ones for both forms."""
    rng = np.random.default_rng(seed)
    seeds, prompts = a.error.shape[0], a.error.shape[-1]
    means = np.empty(resamples)
    for i in range(resamples):
        w = rng.multinomial(prompts, np.full(prompts, 1 / prompts)).astype(float)
        rows = rng.integers(seeds, size=seeds)
        means[i] = np.mean((a.endpoints(level, w) - b.endpoints(level, w))[rows])
    low, high = np.quantile(means, (0.025, 0.975))
    p = min(1.0, max(1 / resamples, 2 * min(np.mean(means <= 0), np.mean(means >= 0))))
    mean = np.mean(a.endpoints(level) - b.endpoints(level))
    return Difference(float(mean), float(low), float(high), float(p) if np.isfinite(means).all() else float("nan"))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the i-th smallest of m times m - i, never falling, at most 1."""
    adjusted, least = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = least
    return adjusted
