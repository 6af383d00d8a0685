"""The prompts of a measurement, and what is known about them.

Three tasks, each over the same image prompts:

- `picture`: the image prompt alone;
- `agreeing`: with a caption of the same concept and background;
- `conflict`: with a text that names another concept and background. The picture should follow the text in these, and the
  image prompt in its palette.

In the mini world the truth of every prompt is known. Nothing is known about a user's pictures: there a conflicting text is the caption
of another picture.
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
from train.vae import to_tensor
from train.world import BACKGROUND_NAMES, BACKGROUNDS, CONCEPT_NAMES, CONCEPTS, Scene, caption, pictures, random_scene

TASKS = ("picture", "agreeing", "conflict")


@dataclass(frozen=True)
class Truth:
    """What is known about n prompts of the mini world: the scenes of the image prompts, and the indices of the concepts and
    backgrounds that the conflicting texts name."""

    scenes: list[Scene]
    concept: Tensor
    background: Tensor

    @property
    def own(self) -> dict[str, Tensor]:
        """What a perfect judge would read from the image prompts (train/judge.py::ground_truth)."""
        return ground_truth(self.scenes)

    @property
    def drawing(self) -> list[int | None]:
        """Which drawing of its concept each image prompt shows; None where the concept has only one."""
        return [s.drawing if len(CONCEPTS[CONCEPT_NAMES[s.concept]]) > 1 else None for s in self.scenes]

    def pixels(self) -> Tensor:
        """The true conflict pictures, `n 3 64 64`: the text's concept and background in the palette of the image prompt."""
        rng = np.random.default_rng(0)
        asked = [random_scene(rng, int(c), int(b)) for c, b in zip(self.concept, self.background, strict=True)]
        right = [replace(scene, palette=own.palette) for scene, own in zip(asked, self.scenes, strict=True)]
        return to_tensor(pictures(right))


@dataclass(frozen=True)
class Prompts:
    """n image prompts; for each a caption of its own, `own`, and a conflicting one, `other`; in the mini world also the truth."""

    images: list[Image.Image]
    own: list[str]
    other: list[str]
    truth: Truth | None = None

    @classmethod
    def of_the_world(cls, n: int, seed: int = 3) -> Prompts:
        """Text i names cell i of concepts x backgrounds, in random order; its image prompt has neither. Repeats after 640."""
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
        """A user's pictures, each with the next caption that differs. Raises ValueError when all captions are the same."""
        own = [text for _, text in files]
        if len(set(own)) < 2:
            raise ValueError(
                "the held-out pictures need at least two different captions: give more pictures (20 or more)"
            )
        other = [next(text for text in own[i:] + own[:i] if text != mine) for i, mine in enumerate(own)]
        images = [centre_square(open_image(file), side, Image.Resampling.BILINEAR) for file, _ in files]
        return cls(images, own, other)

    @property
    def pixels(self) -> Tensor:
        """`n 3 h w` in [-1, 1]."""
        return to_tensor(np.stack([np.array(image) for image in self.images]))

    def first(self, n: int) -> Prompts:
        """The first n prompts."""
        truth = self.truth and Truth(self.truth.scenes[:n], self.truth.concept[:n], self.truth.background[:n])
        return Prompts(self.images[:n], self.own[:n], self.other[:n], truth)

    def texts(self, task: str) -> list[str]:
        """The text of each prompt of a task."""
        return {"picture": [""] * len(self.own), "agreeing": self.own, "conflict": self.other}[task]

    def to_json(self) -> dict[str, Any]:
        """The texts and, where it is known, the truth, for a results file."""
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
