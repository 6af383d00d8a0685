"""Read a results file into data frames, with one line per picture or image mass."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from checkpoints.files import read_json
from eval.bench import Row
from eval.clip_score import clip_score

SCHEMA = {
    "made_from": "fingerprints of the base's weights; the data (number of mini world pictures, or a digest); the scorer",
    "study": "the settings (eval/ablation/study.py::Study)",
    "scorer": "the CLIP that computes CLIP-I and CLIP-T, and its preprocessing",
    "prompts": "the texts of two tasks, one per prompt, and the noise seeds; the third task has no text",
    "shipped_pictures": "number of pictures on which the adapter in the base folder was trained, if there is one",
    "rates": "form -> the chosen learning rate, and gain_shuffled after a short training at each rate",
    "parameters": "form -> number of trained parameters",
    "gains": "form -> per seed, the held-out losses during training (train/gains.py::held_out_losses)",
    "truth": "mini world only: the concept and background of the conflicting text (wanted) and of the image prompt (own), the "
    "image prompt's palette (two CIELAB colours), and the index of its drawing if its concept has several",
    "units": "name -> {key: its inputs, value}; the value is a list of rows for rows-FORM-SEED, anchors and steps-FORM, a list of "
    "masses for mass-FORM, and a number for FORM-rate-RATE",
    "row": "form, seed, share of the training, task, lambda (or a control), and a list over prompts for each measure: concept, "
    "background and drawing (indices), palette_error (CIE76), placement_error (pixels), clip_i and clip_t (cosines)",
    "mass": "form, share, layer, timestep t, number of text keys (words), own or null picture, and 1 - g for each head",
    "summary": "the primary endpoint of each form, seed and share, and the differences from IP-Adapter",
}
WHERE = ("task", "form", "seed", "share", "lambda", "control", "steps")  # columns that identify a row


def frame_of(rows: Sequence[Row], truth: Mapping[str, Any] | None) -> pd.DataFrame:
    """Make a frame with one line per picture: `prompt`, the columns of `WHERE`, the measures of `SCHEMA["row"]`, CLIPScore, and

    - `concept_wanted`, `background_wanted`: 1 if the picture shows what the conflicting text names, otherwise 0; NaN if unknown;
    - `concept_own`, `background_own`, `drawing_own`: the same for what the image prompt shows;
    - `error`: the palette error; without ground truth, 100 (1 - CLIP-I);
    - `follows`: how well the picture follows the conflicting text, which is `concept_wanted`; without ground truth, it is CLIP-T
      divided by the mean CLIP-T of drawings from the text alone.
    """
    parts = [pd.DataFrame({"prompt": range(len(row["clip_i"])), **row}) for row in rows]
    frame = pd.concat(parts, ignore_index=True)
    frame = frame.reindex(columns=list(dict.fromkeys([*WHERE, *frame.columns, "clip_t"])))
    frame["clip_score"] = clip_score(torch.tensor(frame["clip_t"].to_numpy(float))).numpy()
    for whose in ("wanted", "own"):
        for key in ("concept", "background") if truth and whose in truth else ():
            frame[f"{key}_{whose}"] = _matches(frame, key, truth[whose][key]) if truth else np.nan
    if truth and "drawing" in frame:
        frame["drawing_own"] = _matches(frame, "drawing", truth["drawing"])
    frame["error"] = frame["palette_error"] if truth else 100 * (1 - frame["clip_i"])
    alone = frame[(frame["task"] == "conflict") & (frame["form"] == "text alone")]
    frame["follows"] = frame.get("concept_wanted", np.nan) if truth else frame["clip_t"] / alone["clip_t"].mean()
    return frame


def _matches(frame: pd.DataFrame, key: str, values: Sequence[int | None]) -> pd.Series[float]:
    """Return 1 where the column `key` equals the value of its prompt, 0 where it differs, and NaN where either is missing."""
    wanted = pd.Series(np.array(values, float)[frame["prompt"]])
    return (frame[key] == wanted).astype(float).where(frame[key].notna() & wanted.notna())


@dataclass(frozen=True)
class Results:
    """The content of results/ablation.json (`SCHEMA`)."""

    data: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Results:
        return cls(read_json(path))

    @property
    def study(self) -> dict[str, Any]:
        return dict(self.data["study"])

    @property
    def truth(self) -> dict[str, Any] | None:
        return self.data.get("truth")

    @functools.cached_property
    def pictures(self) -> pd.DataFrame:
        """All pictures of the forms and the reference rows (`frame_of`)."""
        units = self.data["units"].items()
        rows = [row for name, unit in units if name.startswith(("rows-", "anchors")) for row in unit["value"]]
        return frame_of(rows, self.truth)

    @functools.cached_property
    def masses(self) -> pd.DataFrame:
        """All image masses of the joint softmaxes; `mass` is 1 - g averaged over heads."""
        units = self.data["units"].items()
        frame = pd.DataFrame([row for name, unit in units if name.startswith("mass-") for row in unit["value"]])
        return frame.assign(mass=[np.mean(heads) for heads in frame["heads"]])

    def more_steps(self, form: str) -> pd.DataFrame:
        """Return the pictures of a form that were drawn with more steps."""
        return frame_of(self.data["units"][f"steps-{form}"]["value"], self.truth)


def fraction(lam: float) -> str:
    """Format a lambda: 0.25, 1/512."""
    return f"1/{1 / lam:g}" if 0 < lam < 0.1 else f"{lam:g}"
