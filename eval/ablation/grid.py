"""The lambdas that a form is drawn with, by bisection (docs/ablation-protocol.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

# what lambda multiplies: the output of the image attention, the odds of the image keys, or nothing
Scale = Literal["sum", "odds", "none"]
TOP: dict[Scale, float] = {"sum": 2.0, "odds": 64.0, "none": 1.0}  # the largest lambda
MOST, GAP = 10, 0.15


def middle(a: float, b: float, scale: Scale) -> float:
    """Return the lambda between a < b: the arithmetic mean, or for odds the geometric mean, or b / 256 between 0 and b."""
    if scale == "sum":
        return (a + b) / 2
    return math.sqrt(a * b) if a else b / 256


def bisect_lambdas(follow: Callable[[float], float], scale: Scale, most: int = MOST) -> dict[float, float]:
    """Return {lambda: following} in ascending order, with lambda 0, 1 and the largest.

    `follow(lambda)` measures the share of drawings that follow the text. Add a lambda between the neighbours that differ most, until
    no two differ by more than `GAP` times the share at lambda 0, or there are `most` lambdas above 0. A form without lambda is drawn as it
    was trained, at lambda 1.
    """
    shares = {lam: follow(lam) for lam in sorted({0.0, 1.0, TOP[scale]})}
    while scale != "none" and len(shares) <= most:
        a, b = max(pairwise(sorted(shares)), key=lambda pair: abs(shares[pair[0]] - shares[pair[1]]))
        if abs(shares[a] - shares[b]) <= GAP * shares[0.0]:
            break
        between = middle(a, b, scale)
        shares[between] = follow(between)
    return dict(sorted(shares.items()))


def spaced_lambdas(lambdas: Sequence[float], count: int = 4) -> list[float]:
    """Return `count` of the lambdas above 0, evenly spaced in rank, with the smallest and the largest; all if there are fewer."""
    above = sorted(lam for lam in lambdas if lam)
    if len(above) <= count:
        return above
    return [above[round(i * (len(above) - 1) / (count - 1))] for i in range(count)]
