"""Prompts for structure control: an image prompt, and the outlines of another picture of the same concept as a hint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.scenes import one_of_each, other_class
from eval.scores import Target
from train.judge import ground_truth
from train.outlines import outline
from train.world import BACKGROUND_NAMES, BACKGROUNDS, CONCEPT_NAMES, Scene, caption, pictures, random_scene


@dataclass(frozen=True)
class HintedPrompts:
    """n image prompts, the pictures whose outlines are the hints, and the indices of the backgrounds that the texts name."""

    scenes: list[Scene]
    hint_scenes: list[Scene]
    background: Tensor

    @classmethod
    def of_the_world(cls, n: int, seed: int) -> HintedPrompts:
        """Draw n prompts that cover all concepts evenly."""
        rng = np.random.default_rng((919, seed))
        order = one_of_each(rng, n)

        def draw() -> list[Scene]:
            return [random_scene(rng, concept, int(rng.integers(len(BACKGROUNDS)))) for concept in order]

        scenes, hint_scenes = draw(), draw()
        return cls(scenes, hint_scenes, other_class(rng, ground_truth(scenes)["background"], len(BACKGROUNDS)))

    @property
    def images(self) -> list[Image.Image]:
        """Render the image prompts."""
        return [Image.fromarray(picture) for picture in pictures(self.scenes)]

    @property
    def hints(self) -> Tensor:
        """Render the hints, `n 1 64 64` in [0, 1]."""
        return torch.from_numpy(np.stack([outline(scene) for scene in self.hint_scenes]))[:, None].float() / 255

    def texts(self, task: str) -> list[str]:
        """Write the texts of a task."""
        if task in ("hint", "image"):
            return [""] * len(self.scenes)
        names = [CONCEPT_NAMES[scene.concept] if task == "text" else None for scene in self.scenes]
        return [
            caption(name, None, BACKGROUND_NAMES[b]) for name, b in zip(names, self.background.tolist(), strict=True)
        ]

    def target(self, task: str) -> Target:
        """Build the target of a task: the concept; the background of the text or, without one, of the image prompt; the palette."""
        own = ground_truth(self.scenes)
        return Target(own["concept"], own["background"] if task == "image" else self.background, own["palette"])
