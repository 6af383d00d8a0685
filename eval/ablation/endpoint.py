"""Trade-off curves, the primary endpoint, and confidence intervals of differences.

A form's curve plots how often its pictures follow the text against their error from the image prompt, as lambda grows. Lambda means
different things in different forms, so forms are compared at the same rate of following the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eval.ablation.forms import BASELINE, FORMS, PRIMARY, SHARES
from eval.ablation.rows import Results

Array = NDArray[np.float64]
GREY = np.array([65.0, 0.0, 0.0])  # CIELAB; palettes have lightness 50 to 80


def error_at(following: Array, error: Array, level: float = 0.8) -> float:
    """Return the lowest error on the part of the curve that follows the text in at least a share `level` of the prompts.

    `following`, `error`: one entry per lambda, in ascending order; the first is the text alone (lambda 0). Both are interpolated
    linearly between lambdas. Returns NaN if no part of the curve reaches `level`.
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
class Curves:
    """The curves of one form. `following` (0 or 1, or a share) and `error`: `seeds lambdas prompts`."""

    following: Array
    error: Array

    def endpoints(self, level: float, weights: Array | None = None) -> Array:
        """Compute `error_at` for each seed. `weights`: the weight of each prompt."""
        w = np.ones(self.error.shape[-1]) if weights is None else weights
        follow, error = self.following @ w / w.sum(), self.error @ w / w.sum()
        return np.array([error_at(f, e, level) for f, e in zip(follow, error, strict=True)])


def curves(pictures: pd.DataFrame, form: str, share: float = 1.0, few: bool = False) -> Curves:
    """Return the curves of a form on `conflict`. With `few`, keep only the lambdas drawn after every share of the training."""
    conflict = pictures[(pictures["task"] == "conflict") & pictures["control"].isna()]
    mine = conflict[(conflict["form"] == form) & (conflict["share"] == share)]
    mine = mine[mine["lambda"].isin(FORMS[form].few)] if few else mine
    mine = mine.sort_values(["seed", "lambda", "prompt"])
    alone, seeds = conflict[conflict["form"] == "text alone"], mine["seed"].nunique()

    def array(column: str) -> Array:
        first = np.tile(alone[column].to_numpy(float), (seeds, 1, 1))
        return np.concatenate([first, mine[column].to_numpy(float).reshape(seeds, -1, len(alone))], axis=1)

    return Curves(array("follows"), array("error"))


@dataclass(frozen=True)
class Difference:
    """A difference a - b: mean, 95 % bootstrap interval, and p, twice the share of resamples with the opposite sign."""

    mean: float
    low: float
    high: float
    p: float


def difference(a: Curves, b: Curves, level: float = 0.8, resamples: int = 2000, seed: int = 0) -> Difference:
    """Bootstrap the difference of two endpoints, paired by seed. Both forms share the resampled seeds and prompts."""
    rng = np.random.default_rng(seed)
    seeds, prompts = a.error.shape[0], a.error.shape[-1]
    means: Array = np.empty(resamples)
    for i in range(resamples):
        w = rng.multinomial(prompts, np.full(prompts, 1 / prompts)).astype(float)
        rows = rng.integers(seeds, size=seeds)
        means[i] = np.mean((a.endpoints(level, w) - b.endpoints(level, w))[rows])
    low, high = (float(x) for x in np.quantile(means, (0.025, 0.975)))
    p = min(1.0, max(1 / resamples, 2 * min(float(np.mean(means <= 0)), float(np.mean(means >= 0)))))
    mean = np.mean(a.endpoints(level) - b.endpoints(level))
    return Difference(float(mean), low, high, p if np.isfinite(means).all() else float("nan"))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Adjust p-values by Holm's method: multiply the i-th smallest of m by m - i (i from 0), keep them in order, and cap them at 1."""
    adjusted, least = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = least
    return adjusted


def summary(results: Results) -> dict[str, Any]:
    """Compute the primary endpoint of each form, seed and share, and the differences from IP-Adapter.

    The p-value of the primary difference is not adjusted; the others are adjusted by Holm's method.
    """
    level, forms, pictures = results.study["level"], list(results.study["forms"]), results.pictures
    full = {form: curves(pictures, form) for form in forms}
    others = [form for form in forms if form != BASELINE]
    differences = {form: difference(full[form], full[BASELINE], level, results.study["resamples"]) for form in others}
    p = {form: each.p for form, each in differences.items()}
    p |= holm({form: p[form] for form in differences if form != PRIMARY})
    return {
        "endpoint": {form: each.endpoints(level).tolist() for form, each in full.items()},
        "difference": {form: {"mean": d.mean, "low": d.low, "high": d.high, "p": p[form]} for form, d in differences.items()},
        "share": {
            form: {f"{s:g}": curves(pictures, form, s, few=True).endpoints(level).tolist() for s in SHARES}
            for form in forms
        },
    }


def best_lambda(results: Results, form: str) -> float:
    """Return the lambda with the lowest mean error among those that follow the text often enough; if none does, the one that
    follows most often."""
    pictures = results.pictures
    mine = pictures[(pictures["form"] == form) & (pictures["task"] == "conflict") & (pictures["share"] == 1)]
    means = mine[mine["control"].isna()].groupby("lambda")[["follows", "error"]].mean().reset_index()
    allowed = means[means["follows"] >= results.study["level"]]
    best = means.nlargest(1, "follows") if allowed.empty else allowed.nsmallest(1, "error")
    return float(best["lambda"].iloc[0])


def grey_error(palettes: Sequence[Sequence[float]] | Array) -> float:
    """Compute the palette error of a uniformly grey picture, CIE76 averaged over colours and prompts.

    `palettes`: those of the image prompts, `n 6` or `n 2 3`, CIELAB.
    """
    return float(np.linalg.norm(np.reshape(palettes, (-1, 3)) - GREY, axis=-1).mean())
