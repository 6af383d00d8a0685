"""Measure how often the judge agrees with labels given by eye.  `python -m eval calibration`

results/labels.png holds 200 drawings in random order. They were drawn at commit 2626270 (12 steps, guidance 4) with its text-to-image
model, IP-Adapter and Plus, and with the adapters of its ablation. Later weights draw other pictures, so no command draws these again.
results/labels.json holds:

- `drawn`, per picture: the adapter (null for the text alone), lambda, text, what the image prompt shows, and the seed i of the noise. The
  image prompt is image i of Prompts.of_the_world(200, seed=5).
- `labels`, by two labellers who worked independently and saw only the pictures. `concept` and `background` are null if the picture shows
  none of the classes or more than one, or is too unclear to name. `palette` gives the two main colours of 40 drawings, or null if a
  drawing does not show two clear colours.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from checkpoints.files import check_output, read_json, sha256, write_json
from eval.tables import markdown
from train.colour import Array, srgb_to_lab
from train.drawings import hex_to_rgb
from train.judge import Judge, load_judge
from train.vae import bytes_to_tensor
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, SIZE

Answers = Sequence[str | None]


@dataclass(frozen=True)
class Labels:
    """The labels that a person or the judge gives to the pictures.

    `concept`, `background`: a name or None for each picture. `palette`: the two main colours of some pictures, {index of the picture:
    CIELAB `2 3`}.
    """

    concept: Answers
    background: Answers
    palette: dict[int, Array]

    @classmethod
    def of(cls, data: dict[str, Any]) -> Labels:
        """Convert one entry of `labels` in labels.json."""
        rgb = {int(i): [hex_to_rgb(colour) for colour in pair] for i, pair in data["palette"].items() if pair}
        return cls(data["concept"], data["background"], {i: srgb_to_lab(np.array(pair) / 255) for i, pair in rgb.items()})


def tiles_of(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Cut a sheet into its pictures, `n 64 64 3`."""
    sheet = np.array(Image.open(path).convert("RGB"))
    height, width = sheet.shape[:2]
    tiles = sheet.reshape(height // SIZE, SIZE, width // SIZE, SIZE, 3).swapaxes(1, 2)
    return tiles.reshape(-1, SIZE, SIZE, 3)


def most_likely(logits: Tensor, names: Sequence[str]) -> Answers:
    """Return the name of the largest logit in each row of `b c`. Class len(names), if it exists, is "none of these": None."""
    return [names[i] if i < len(names) else None for i in logits.argmax(dim=1).tolist()]


def read(judge: Judge, pictures: np.ndarray[Any, np.dtype[np.uint8]]) -> Labels:
    """Label pictures `n 64 64 3` with the judge."""
    reading = judge.read(bytes_to_tensor(pictures))
    concept, background = most_likely(reading.concept, CONCEPT_NAMES), most_likely(reading.background, BACKGROUND_NAMES)
    return Labels(concept, background, dict(enumerate(reading.palette.double().numpy())))


def share(answers: Answers, labels: Answers) -> float:
    """Return the percentage of equal entries; NaN if there are none."""
    equal = [answer == label for answer, label in zip(answers, labels, strict=True)]
    return 100 * float(np.mean(equal)) if equal else float("nan")


def share_of(answers: Answers, labels: Answers, has_name: bool) -> float:
    """Return `share` over the entries where the label is a name, or (with has_name=False) where it is None."""
    pairs = [pair for pair in zip(answers, labels, strict=True) if (pair[1] is not None) == has_name]
    return share([answer for answer, _ in pairs], [label for _, label in pairs])


def palette_error(a: Array, b: Array) -> float:
    """Compute the CIE76 difference of two palettes `2 3`, averaged over the two colours, for the better of both orders."""
    return float(min(np.linalg.norm(a - other, axis=-1).mean() for other in (b, b[::-1])))


def agreement(answers: Labels, labels: Labels) -> dict[str, float]:
    """Compare with one set of labels: agreement in percent, and the mean palette error where both give two colours."""
    both = answers.palette.keys() & labels.palette.keys()
    return {
        "concept, or none of these": share(answers.concept, labels.concept),
        "concept, where the labels name one": share_of(answers.concept, labels.concept, has_name=True),
        "none of these, where the labels say so": share_of(answers.concept, labels.concept, has_name=False),
        "background, where the labels name one": share_of(answers.background, labels.background, has_name=True),
        "palette error": float(np.mean([palette_error(answers.palette[i], labels.palette[i]) for i in both])),
    }


def evaluate(judge: Judge, folder: Path) -> dict[str, dict[str, float]]:
    """Return the `agreement` of the two labellers with each other, and that of the judge with each labeller, averaged."""
    first, second = (Labels.of(data) for data in read_json(folder / "labels.json")["labels"])
    answers = read(judge, tiles_of(folder / "labels.png"))
    pairs = {"labellers": ((second, first), (first, second)), "judge": ((answers, first), (answers, second))}
    means = {name: pd.DataFrame([agreement(*pair) for pair in both]).mean() for name, both in pairs.items()}
    return {name: {str(row): round(float(value), 2) for row, value in mean.items()} for name, mean in means.items()}


def table(results: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """Make the table of docs/world.md. `other`: the results of the judge that was trained with seed 1, for another column."""
    more = {} if other is None else {"judge, seed 1": other["agreement"]["judge"]}
    frame = pd.DataFrame(results["agreement"] | more)
    cells = frame.apply(lambda column: [f"{x:.1f}{'' if row == 'palette error' else '%'}" for row, x in column.items()])
    return markdown(cells.rename_axis("").reset_index())


def run(args: Namespace) -> None:
    """`python -m eval calibration`"""
    check_output(args.out)
    file = args.weights / "judge.safetensors"
    results = {"sha256": {file.name: sha256(file)}, "agreement": evaluate(load_judge(file), args.labels)}
    write_json(args.out, results)
    print(table(results))
