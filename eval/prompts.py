"""The prompts of a measurement and their ground truth.

There are four tasks with the same image prompts:

- `picture`: the image prompt alone;
- `complementary`: the image prompt with a text that names another background, size and place (eval/scenes.py). The drawing should take
  concept and palette from the image prompt, and the rest from the text;
- `agreeing`: the image prompt with a caption that names its concept and background;
- `conflict`: the image prompt with a text that names another concept and background. The drawing should take concept and background
  from the text, and the palette from the image prompt.

The mini world has ground truth for all prompts. A user's pictures have none. They have no complementary texts, and their conflicting text
is another picture's caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.scenes import ScenePrompts
from eval.scores import Target
from model.image_encoder import centre_square
from train.album import CaptionedPicture
from train.judge import ground_truth
from train.vae import bytes_to_tensor
from train.world import BACKGROUND_NAMES, BACKGROUNDS, CONCEPT_NAMES, CONCEPTS, Scene, caption, random_scene

TASKS = ("complementary", "picture", "agreeing", "conflict")


@dataclass(frozen=True)
class Truth:
    """The ground truth of n prompts of the mini world.

    `scenes`: those of the image prompts. `concept`, `background`: indices of what the conflicting texts name. `complement`: the target of
    the complementary texts.
    """

    scenes: list[Scene]
    concept: Tensor
    background: Tensor
    complement: Target

    @property
    def labels(self) -> dict[str, Tensor]:
        """What a perfect judge would read from the image prompts (train/judge.py::ground_truth)."""
        return ground_truth(self.scenes)

    @property
    def drawing(self) -> list[int | None]:
        """The index of the drawing that each image prompt shows; None if its concept has only one drawing."""
        return [s.drawing if len(CONCEPTS[CONCEPT_NAMES[s.concept]]) > 1 else None for s in self.scenes]


@dataclass(frozen=True)
class Prompts:
    """n image prompts, with a caption, a conflicting and a complementary text for each. A user's pictures have neither `complements`
    nor `truth`."""

    images: list[Image.Image]
    captions: list[str]
    conflicts: list[str]
    complements: list[str] = field(default_factory=list)
    truth: Truth | None = None

    @classmethod
    def of_the_world(cls, n: int, seed: int = 3) -> Prompts:
        """Draw n prompts. Their conflicting texts cover all 640 pairs of concept and background; each image prompt shows another pair."""
        rng, cells = np.random.default_rng((917, seed)), len(CONCEPTS) * len(BACKGROUNDS)
        order = np.concatenate([rng.permutation(cells) for _ in range(-(-n // cells))])[:n]
        concept, background = order // len(BACKGROUNDS), order % len(BACKGROUNDS)
        scenes = []
        for c, b in zip(concept, background, strict=True):
            another = int((c + rng.integers(1, len(CONCEPTS))) % len(CONCEPTS))
            scenes.append(random_scene(rng, another, int((b + rng.integers(1, len(BACKGROUNDS))) % len(BACKGROUNDS))))
        captions = [caption(CONCEPT_NAMES[s.concept], None, BACKGROUND_NAMES[s.background]) for s in scenes]
        conflicts = [caption(CONCEPT_NAMES[c], None, BACKGROUND_NAMES[b]) for c, b in zip(concept, background, strict=True)]
        complements = ScenePrompts.of_scenes(scenes, np.random.default_rng((919, seed)))
        truth = Truth(scenes, torch.from_numpy(concept), torch.from_numpy(background), complements.target)
        return cls(complements.images, captions, conflicts, complements.texts(), truth)

    @classmethod
    def of_files(cls, files: Sequence[CaptionedPicture], side: int) -> Prompts:
        """Pair each of a user's pictures with the next different caption. Raises ValueError if all captions are equal."""
        captions = [file.text for file in files]
        if len(set(captions)) < 2:
            raise ValueError("the held-out pictures need at least two different captions: give more pictures (20 or more)")
        conflicts = [next(text for text in captions[i:] + captions[:i] if text != own) for i, own in enumerate(captions)]
        images = [centre_square(file.open(), side, Image.Resampling.BILINEAR) for file in files]
        return cls(images, captions, conflicts)

    @property
    def pixels(self) -> Tensor:
        """The image prompts, `n 3 h w` in [-1, 1]."""
        return bytes_to_tensor(np.stack([np.array(image) for image in self.images]))

    def first(self, n: int) -> Prompts:
        """Return the first n prompts."""
        t = self.truth
        truth = t and Truth(t.scenes[:n], t.concept[:n], t.background[:n], t.complement.first(n))
        return Prompts(self.images[:n], self.captions[:n], self.conflicts[:n], self.complements[:n], truth)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that can be drawn. A user's captions contradict each other already, so there they do without `agreeing`."""
        return TASKS if self.truth else ("conflict", "picture")

    def texts(self, task: str) -> list[str]:
        """Return the text prompts of a task."""
        texts = {"agreeing": self.captions, "conflict": self.conflicts, "complementary": self.complements}
        return texts.get(task, [""] * len(self.captions))

    def to_json(self) -> dict[str, Any]:
        """Return the texts and, in the mini world, the ground truth, for a results file."""
        data: dict[str, Any] = {"texts": {task: self.texts(task) for task in self.tasks if task != "picture"}}
        if (truth := self.truth) is not None:
            labels, scene = truth.labels, truth.complement
            assert scene.size is not None and scene.place is not None
            data["truth"] = {
                "own": {key: labels[key].tolist() for key in ("concept", "background")},
                "conflict": {"concept": truth.concept.tolist(), "background": truth.background.tolist()},
                "complementary": {key: getattr(scene, key).tolist() for key in ("background", "size", "place")},
                "drawing": truth.drawing,
                "palette": [[round(x, 2) for x in pair] for pair in labels["palette"].flatten(1).tolist()],
            }
        return data
