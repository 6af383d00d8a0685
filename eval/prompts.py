"""The prompts of a measurement and their ground truth.

There are three tasks with the same image prompts:

- `picture`: the image prompt alone;
- `agreeing`: the image prompt with a caption that names its concept and background;
- `conflict`: the image prompt with a text that names another concept and background. The drawing should take concept and background
  from the text, and the palette from the image prompt.

The mini world has ground truth for all prompts. A user's pictures have none; their conflicting text is another picture's caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.image_encoder import centre_square
from sampling.images import open_image
from train.judge import ground_truth
from train.vae import bytes_to_tensor
from train.world import BACKGROUND_NAMES, BACKGROUNDS, CONCEPT_NAMES, CONCEPTS, Scene, caption, pictures, random_scene

TASKS = ("picture", "agreeing", "conflict")


@dataclass(frozen=True)
class Truth:
    """The ground truth of n prompts of the mini world: the scenes of the image prompts, and the indices of the concepts and
    backgrounds named in the conflicting texts."""

    scenes: list[Scene]
    concept: Tensor
    background: Tensor

    @property
    def own(self) -> dict[str, Tensor]:
        """What a perfect judge would read from the image prompts (train/judge.py::ground_truth)."""
        return ground_truth(self.scenes)

    @property
    def drawing(self) -> list[int | None]:
        """The index of the drawing that each image prompt shows; None if its concept has only one drawing."""
        return [s.drawing if len(CONCEPTS[CONCEPT_NAMES[s.concept]]) > 1 else None for s in self.scenes]

    def pixels(self) -> Tensor:
        """Render ideal answers to `conflict`, `n 3 64 64`: the text's concept and background in the image prompt's palette."""
        rng = np.random.default_rng(0)
        scenes = [random_scene(rng, int(c), int(b)) for c, b in zip(self.concept, self.background, strict=True)]
        recoloured = [replace(scene, palette=own.palette) for scene, own in zip(scenes, self.scenes, strict=True)]
        return bytes_to_tensor(pictures(recoloured))


@dataclass(frozen=True)
class Prompts:
    """n image prompts, each with its caption (`own`) and a conflicting one (`other`). `truth` is None for a user's pictures."""

    images: list[Image.Image]
    own: list[str]
    other: list[str]
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
        own = [caption(CONCEPT_NAMES[s.concept], None, BACKGROUND_NAMES[s.background]) for s in scenes]
        other = [caption(CONCEPT_NAMES[c], None, BACKGROUND_NAMES[b]) for c, b in zip(concept, background, strict=True)]
        truth = Truth(scenes, torch.from_numpy(concept), torch.from_numpy(background))
        return cls([Image.fromarray(picture) for picture in pictures(scenes)], own, other, truth)

    @classmethod
    def of_files(cls, files: Sequence[tuple[Path, str]], side: int) -> Prompts:
        """Pair each of a user's pictures with the next different caption. Raises ValueError if all captions are equal."""
        own = [text for _, text in files]
        if len(set(own)) < 2:
            raise ValueError("the held-out pictures need at least two different captions: give more pictures (20 or more)")
        other = [next(text for text in own[i:] + own[:i] if text != mine) for i, mine in enumerate(own)]
        images = [centre_square(open_image(file), side, Image.Resampling.BILINEAR) for file, _ in files]
        return cls(images, own, other)

    @property
    def pixels(self) -> Tensor:
        """The image prompts, `n 3 h w` in [-1, 1]."""
        return bytes_to_tensor(np.stack([np.array(image) for image in self.images]))

    def first(self, n: int) -> Prompts:
        """Return the first n prompts."""
        truth = self.truth and Truth(self.truth.scenes[:n], self.truth.concept[:n], self.truth.background[:n])
        return Prompts(self.images[:n], self.own[:n], self.other[:n], truth)

    def texts(self, task: str) -> list[str]:
        """Return the text prompts of a task."""
        return {"picture": [""] * len(self.own), "agreeing": self.own, "conflict": self.other}[task]

    def to_json(self) -> dict[str, Any]:
        """Return the texts and, in the mini world, the ground truth, for a results file."""
        seeds = list(range(len(self.own)))
        data: dict[str, Any] = {"prompts": {"agreeing": self.own, "conflict": self.other, "seeds": seeds}}
        if (truth := self.truth) is not None:
            own = truth.own
            data["truth"] = {
                "wanted": {"concept": truth.concept.tolist(), "background": truth.background.tolist()},
                "own": {key: own[key].tolist() for key in ("concept", "background")},
                "drawing": truth.drawing,
                "palette": [[round(x, 2) for x in pair] for pair in own["palette"].flatten(1).tolist()],
            }
        return data
