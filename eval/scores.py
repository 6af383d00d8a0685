"""Score drawings against their targets. Every score has a 95 % interval over prompts.

A score is `[value, low, high]`. Shares of drawings have Wilson's interval (1927), means have the normal interval or the bootstrap's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from train.judge import Judge, Reading, delta_e, ground_truth
from train.vae import bytes_to_tensor
from train.world import CONCEPT_NAMES, CONCEPTS, SIDES, SIZE, SIZES, Scene, pictures, place_class, size_class

Scores = dict[str, list[float]]
RESAMPLES = 10_000
Z = 1.959964  # 97.5 % quantile of the normal distribution
ANYWHERE = -1  # index of "any place is right", for large drawings, which fill the picture
LARGE = SIZES.index("large")
SHIFT = 2  # pixels by which the judge may misread the centre or side of a drawing
GREY = torch.tensor([65.0, 0.0, 0.0])  # CIELAB; palettes have lightness 50 to 80


@dataclass(frozen=True)
class Target:
    """The target of n drawings.

    `concept`, `background`: class indices `n`. `palette`: `n 2 3`, CIELAB. `size`, `place`: indices `n` in `SIZES` and `PLACES`, or
    None if they are not scored; if the place is `ANYWHERE`, every place is right. `references`: the scenes of the image prompts, if the
    drawings should reproduce them; then the OpenMoji drawing and its placement are scored too.
    """

    concept: Tensor
    background: Tensor
    palette: Tensor
    size: Tensor | None = None
    place: Tensor | None = None
    references: tuple[Scene, ...] = ()

    def first(self, n: int) -> Target:
        """Return the target of the first n drawings."""
        size, place = (None if part is None else part[:n] for part in (self.size, self.place))
        return Target(self.concept[:n], self.background[:n], self.palette[:n], size, place, self.references[:n])

    @classmethod
    def of_scenes(cls, scenes: list[Scene]) -> Target:
        """Build the target of drawings that should reproduce these scenes."""
        true = ground_truth(scenes)
        size, place = sizes_of(true["placement"]), places_of(true["placement"])
        place = place.where(size != LARGE, ANYWHERE)
        return cls(true["concept"], true["background"], true["palette"], size, place, tuple(scenes))


def sizes_of(placement: Tensor) -> Tensor:
    """Return the index in `SIZES` of each placement `n 3` (centre x, centre y, side): `n`."""
    return torch.tensor([size_class(side) for side in placement[:, 2].tolist()])


def places_of(placement: Tensor) -> Tensor:
    """Return the index in `PLACES` of each placement `n 3` (centre x, centre y, side): `n`.

    Drawings lie on whole pixels, so corners are rounded. Sides are clipped to the largest.
    """
    rows = [(x, y, min(side, SIDES[1])) for x, y, side in placement.tolist()]
    return torch.tensor([place_class(round(x - side / 2), round(y - side / 2), round(side)) for x, y, side in rows])


def score(judge: Judge, drawings: Tensor, target: Target) -> Scores:
    """Score drawings `n 3 64 64`: the shares that are right in each attribute of `target`, and the mean errors."""
    reading = judge.read(drawings)
    scores = score_reading(reading, target)
    several = [i for i, scene in enumerate(target.references) if len(CONCEPTS[CONCEPT_NAMES[scene.concept]]) > 1]
    if several:
        scenes = [target.references[i] for i in several]
        pairs = zip(nearest(scenes, drawings[several], reading.placement[several]), scenes, strict=True)
        scores["drawing"] = share(torch.tensor([index == scene.drawing for index, scene in pairs]))
    return scores


def hits_of(reading: Reading, target: Target) -> dict[str, Tensor]:
    """Return which of n drawings are right in concept, background, size and place, and in all of them, if the target has these."""
    hits = {
        "concept": reading.concept.argmax(dim=1) == target.concept,
        "background": reading.background.argmax(dim=1) == target.background,
    }
    if target.size is not None and target.place is not None:
        hits["size"] = sizes_of(reading.placement) == target.size
        hits["place"] = (places_of(reading.placement) == target.place) | (target.place == ANYWHERE)
        hits["all"] = torch.stack(list(hits.values())).all(dim=0)
    return hits


def score_reading(reading: Reading, target: Target) -> Scores:
    """Score a reading of the judge, as `score` does, but without the share of right OpenMoji drawings."""
    scores = {name: share(hit) for name, hit in hits_of(reading, target).items()}
    scores["palette_error"] = mean(delta_e(reading.palette, target.palette))
    if target.references:
        true = ground_truth(list(target.references))["placement"]
        scores["placement_error"] = mean((reading.placement - true).norm(dim=-1))
    return scores


def all_drawings(scene: Scene) -> Tensor:
    """Render a scene once with each drawing of its concept, `n 3 64 64`."""
    codes = CONCEPTS[CONCEPT_NAMES[scene.concept]]
    return bytes_to_tensor(pictures([replace(scene, drawing=i) for i in range(len(codes))]))


def move_to(scene: Scene, placement: Tensor) -> Scene:
    """Move the drawing of a scene to a placement `3` (centre x, centre y, side), rounded and clipped to the picture."""
    x, y, side = placement.tolist()
    size = min(max(round(side), SIDES[0]), SIDES[1])
    left, top = (min(max(round(centre - size / 2), 0), SIZE - size) for centre in (x, y))
    return replace(scene, size=size, x=left, y=top)


def nearest(scenes: list[Scene], drawings: Tensor, placement: Tensor) -> list[int]:
    """Return, for each picture `n 3 64 64`, the index of the drawing of its concept with the smallest mean squared pixel error.

    The drawings are compared at the `placement`, `n 3`, that the judge reads, and up to `SHIFT` pixels around it in position and side: an
    image prompt does not say where its subject should be.
    """
    by, indices = range(-SHIFT, SHIFT + 1), []
    for scene, x, where in zip(scenes, drawings, placement, strict=True):
        shifts = torch.stack([x.roll(shift, (1, 2)) for shift in itertools.product(by, by)])
        sides = [all_drawings(move_to(scene, where + torch.tensor([0, 0, more]))) for more in by]
        errors = torch.stack([(shifts[:, None] - each).square().mean(dim=(2, 3, 4)) for each in sides])
        indices.append(int(errors.amin(dim=(0, 1)).argmin()))
    return indices


def share(hits: Tensor) -> list[float]:
    """Compute the share of true entries of `n` booleans, with Wilson's interval."""
    n, p = len(hits), float(hits.double().mean())
    middle, half = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
    scale = 1 + Z**2 / n
    return [p, (middle - half) / scale, (middle + half) / scale]


def mean(values: Tensor) -> list[float]:
    """Compute the mean of `n` values, at least two, with the normal interval: 1.96 standard errors on either side."""
    centre, half = float(values.double().mean()), Z * float(values.double().std()) / len(values) ** 0.5
    return [centre, centre - half, centre + half]


def bootstrap(values: Tensor) -> list[float]:
    """Compute the mean of `n` values, and the percentile interval of the means of `RESAMPLES` samples with replacement, of fixed seeds."""
    rng, x = np.random.default_rng(0), values.double().numpy()
    means = np.array([x[rng.integers(len(x), size=len(x))].mean() for _ in range(RESAMPLES)])
    return [float(x.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]


def values_of(scores: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the values without their intervals."""
    return {name: value for name, (value, _, _) in scores.items()}
