"""Complementary prompts: the image prompt gives the subject, and the text describes the scene.

A text is, for example, "small on a pink background, top left". Its background, size and place differ from those of the image prompt. The
drawing should take concept and palette from the image prompt and the rest from the text. Texts with "large" name no place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.scores import ANYWHERE, LARGE, Target, places_of, sizes_of
from train.judge import ground_truth
from train.world import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    CONCEPT_NAMES,
    CONCEPTS,
    PLACES,
    SIZES,
    Scene,
    caption,
    pictures,
    random_scene,
)


@dataclass(frozen=True)
class ScenePrompts:
    """n image prompts with texts that describe another scene.

    `target`: concept and palette of the image prompts; background, size and place of the texts.
    """

    scenes: list[Scene]
    target: Target

    @classmethod
    def of_the_world(cls, n: int, seed: int) -> ScenePrompts:
        """Draw n prompts that cover all concepts evenly."""
        rng = np.random.default_rng((918, seed))
        scenes = [random_scene(rng, concept, int(rng.integers(len(BACKGROUNDS)))) for concept in one_of_each(rng, n)]
        return cls.of_scenes(scenes, rng)

    @classmethod
    def of_scenes(cls, scenes: list[Scene], rng: np.random.Generator) -> ScenePrompts:
        """Draw texts for these image prompts. Each gets a uniform background, size and place unlike the picture's."""
        own = ground_truth(scenes)
        background = other_class(rng, own["background"], len(BACKGROUNDS))
        size = other_class(rng, sizes_of(own["placement"]), len(SIZES))
        place = other_class(rng, places_of(own["placement"]), len(PLACES)).where(size != LARGE, ANYWHERE)
        return cls(scenes, Target(own["concept"], background, own["palette"], size, place))

    @property
    def images(self) -> list[Image.Image]:
        """Render the image prompts."""
        return [Image.fromarray(picture) for picture in pictures(self.scenes)]

    def texts(self, subject: bool = False) -> list[str]:
        """Write the texts. With `subject`, they also name the concept: "a small fox on a pink background, top left"."""
        target = self.target
        assert target.size is not None and target.place is not None
        rows = torch.stack([target.concept, target.background, target.size, target.place], dim=1).tolist()
        names = [CONCEPT_NAMES[concept] if subject else None for concept, *_ in rows]
        places = [None if place == ANYWHERE else PLACES[place] for *_, place in rows]
        return [
            caption(name, None, BACKGROUND_NAMES[background], SIZES[size], place)
            for name, (_, background, size, _), place in zip(names, rows, places, strict=True)
        ]


def one_of_each(rng: np.random.Generator, n: int) -> list[int]:
    """Draw n concepts in random order, such that each occurs equally often, up to one."""
    return [int(c) for _ in range(-(-n // len(CONCEPTS))) for c in rng.permutation(len(CONCEPTS))][:n]


def other_class(rng: np.random.Generator, index: Tensor, classes: int) -> Tensor:
    """Draw a different class, uniformly, for each class index in `index`, `n`."""
    return (index + torch.from_numpy(rng.integers(1, classes, len(index)))) % classes
