"""Where a curve is read, and the endpoint of each seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.ablation.statistics import Array, Curve, at_level

PARTS = "right background", "right size and place"  # the two things that a complementary text names
RIGHT = *PARTS, "concept"  # what may be right in a drawing, read at the level


def where_read(following: Array, level: float) -> str:
    """Say where a curve is read, from its shares of following, `lambdas`: at its "end", if it is still at the level at its last lambda;
    at its "start", if it falls below the level before its smallest lambda above 0, so that the reading lies on a straight line from the
    text alone; or "between"."""
    above = np.flatnonzero(following >= level * following[0])
    return "end" if above[-1] == len(following) - 1 else "start" if above[-1] == 0 else "between"


def count_ends(curve: Curve, level: float, highest: float | None = None) -> dict[str, int]:
    """Count the seeds that are read at the `end` of their curve, and at its `start` (`where_read`). With `highest`, curves are
    read at all levels from `level` to `highest`, and a seed counts if any of its readings is there."""
    places = {"end": level, "start": highest or level}
    following = curve.following.mean(axis=-1)
    return {place: sum(where_read(each, at) == place for each in following) for place, at in places.items()}


def endpoint(curve: Curve, level: float) -> dict[str, Any]:
    """Return the information of each seed where it keeps the level, and where the seeds are read."""
    return {"information": curve.seeds(at_level(level)).tolist()} | count_ends(curve, level)
