"""Read the results of an ablation: what the judge and CLIP read from each drawing, and the curves of the forms."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from checkpoints.files import read_json
from eval.ablation.grid import spaced_lambdas
from eval.ablation.memo import Arrays, Unit, unpack
from eval.ablation.names import Draw, alone_name, grid_name
from eval.ablation.statistics import Array, Bootstrap, Curve, distances, information, retrieval
from eval.ablation.study import RATE_SEED
from eval.scores import ANYWHERE, places_of, sizes_of

SCALES = {"concept": 1, "background": 1, "palette": 10, "placement": 10, "clip_i": 10_000, "clip_t": 10_000}  # of the int16 numbers
SCHEMA = {
    "made_from": "fingerprints of the weights, the data, the scorer and the source files, and the settings",
    "study": "the settings (eval/ablation/study.py::Study)",
    "tasks": "the tasks; the endpoint is read on the first one",
    "prompts": "for each set of prompts, the texts of each task, and in the mini world the ground truth: indices of concept, background, "
    "size and place (own: of the image prompt; otherwise of the text), and the image prompts' palettes (two CIELAB colours)",
    "units": "name -> value, made (commit and processor), and the number of rows of the arrays. rate-FORM-RATE: the held-out "
    "loss; train-FORM-SEED: parameters, learning rate and losses; grid-FORM: lambdas and following on validation prompts; alone-TASK-SET: "
    "lambda 0; references: the image prompts, and the same through the VAE; drawn-...: form, seed, step, task, prompts, layers, lambdas",
    "rows": "the safetensors file beside this one holds int16 arrays with one row per drawing, unit after unit, lambda after lambda, "
    f"prompt after prompt; the numbers are multiplied by {SCALES}. concept, background: indices; palette: two CIELAB colours; placement: "
    "centre and side in pixels; clip_i: cosine with the image prompt; clip_t: with the text, or with the caption if there is no text",
}


def hits(task: str, arrays: Arrays, truth: Mapping[str, Any]) -> dict[str, Array]:
    """Return 1 for each drawing that is right in a measure, otherwise 0 (docs/ablation-protocol.md). `arrays`: int16, one row per drawing.

    `concept`: that of the text for `conflict`, and that of the image prompt otherwise. `right background`: that of the text, or of the
    image prompt if the text names none. `right size and place`: for `complementary`, those of the text. `following`: all that the text
    says.
    """
    concept, ground = ("conflict" if task == "conflict" else "own", task if task in ("conflict", "complementary") else "own")
    right = {"concept": arrays["concept"].flatten() == torch.tensor(truth[concept]["concept"])}
    right["right background"] = arrays["background"].flatten() == torch.tensor(truth[ground]["background"])
    if task == "complementary":
        placement = arrays["placement"] / SCALES["placement"]
        size, place = (torch.tensor(truth[task][key]) for key in ("size", "place"))
        right["right size and place"] = (sizes_of(placement) == size) & ((places_of(placement) == place) | (place == ANYWHERE))
    right["following"] = right["right background"] & right["right size and place" if task == "complementary" else "concept"]
    return {name: np.asarray(each.double()) for name, each in right.items()}


def follows(task: str, arrays: Arrays, truth: Mapping[str, Any] | None, alone: Arrays) -> Array:
    """Return 1 for each drawing that follows the text, otherwise 0 (`hits`).

    Without ground truth, return CLIP-T divided by the mean CLIP-T of the drawings from the text alone.
    """
    if truth is None:
        return np.asarray(arrays["clip_t"].double().flatten() / alone["clip_t"].double().mean())
    return hits(task, arrays, truth)["following"]


@dataclass(frozen=True)
class Results:
    """The content of results/ablation.json and results/ablation.safetensors (`SCHEMA`)."""

    data: dict[str, Any]
    units: dict[str, Unit]

    @classmethod
    def of(cls, path: Path) -> Results:
        """Read the results file and the arrays beside it."""
        data = read_json(path)
        return cls(data, unpack(data["units"], load_file(path.with_suffix(".safetensors"))))

    def beside(self, folder: Path, name: str) -> Results | None:
        """Return the results of another tier in a folder; None if there are none on the same prompts."""
        path = folder / f"{name}.json"
        results = Results.of(path) if path.exists() else None
        return results if results and results.data["prompts"] == self.data["prompts"] else None

    @property
    def study(self) -> dict[str, Any]:
        return dict(self.data["study"])

    @property
    def bootstrap(self) -> Bootstrap:
        """The resamples that all intervals are taken from."""
        return Bootstrap(self.study["resamples"])

    @property
    def primary(self) -> str:
        """The task on which the endpoint is read."""
        return str(self.data["tasks"][0])

    def truth(self, split: str = "test") -> dict[str, Any] | None:
        truth: dict[str, Any] | None = self.data["prompts"][split].get("truth")
        return truth

    def palettes(self, split: str = "test") -> Array:
        """Return the palettes of the image prompts, `n 2 3`."""
        return np.array((self.truth(split) or {})["palette"]).reshape(-1, 2, 3)

    def grid(self, form: str) -> list[float]:
        """Return the lambdas of a form, from 0."""
        return list(self.units[grid_name(form)].value["lambdas"])

    @functools.cached_property
    def _measure_cache(self) -> dict[str, dict[str, Array]]:
        return {}

    def measures(self, name: str) -> dict[str, Array]:
        """Return the measures of a unit, each `lambdas prompts`.

        `following` (`follows`); `information` and `error` of the palette, and retrieval AUC; the others of `hits`; `clip_i`, `clip_t`.
        Without ground truth, `information` is 100 CLIP-I.
        """
        if name not in self._measure_cache:
            self._measure_cache[name] = self._measure(self.units[name])
        return self._measure_cache[name]

    def alone(self, task: str = "", split: str = "test") -> dict[str, Array]:
        """Return the measures of the drawings from the text alone, by default of the first task."""
        return self.measures(alone_name(task or self.primary, split))

    def _measure(self, unit: Unit) -> dict[str, Array]:
        task, split = unit.value["task"], unit.value["split"]
        truth, count = self.truth(split), len(unit.value.get("lambdas") or unit.value["references"])
        parts = [dict(zip(unit.arrays, each, strict=True)) for each in zip(*(x.chunk(count) for x in unit.arrays.values()), strict=True)]
        rows: dict[str, list[Array]] = {}
        for part in parts:
            row = {key: np.asarray(part[key].double().flatten() / SCALES[key]) for key in ("clip_i", "clip_t")}
            row["following"] = follows(task, part, truth, self.units[alone_name(task, split)].arrays)
            row["information"] = 100 * row["clip_i"]
            if truth is not None:
                palettes = np.asarray(part["palette"].double() / SCALES["palette"]).reshape(-1, 2, 3)
                d = distances(palettes, self.palettes(split))
                row |= {"information": information(d), "error": np.diagonal(d), "auc": retrieval(d), **hits(task, part, truth)}
            for key, values in row.items():
                rows.setdefault(key, []).append(values)
        return {key: np.stack(values) for key, values in rows.items()}

    def curve(
        self,
        form: str,
        value: str = "information",
        task: str = "",
        step: int = 0,
        split: str = "test",
        layers: str = "all",
        few: bool = False,
        following: str = "following",
        sampled: str = "",
    ) -> Curve:
        """Return the curves of a form's seeds, from lambda 0. By default: the first task, after the whole training.

        `few`: keep only the lambdas that earlier checkpoints are drawn with. `following`: the measure that takes the place of following.
        `sampled`: as in `Draw`.
        """
        task, step = task or self.primary, step or self.study["steps"]
        alone, seeds = self.alone(task, split), range(self.study["seeds"])
        names = [Draw(form, seed, step, task, split, layers, sampled=sampled).name for seed in seeds]
        names = [name for name in names if name in self.units]
        lambdas = self.units[names[0]].value["lambdas"]
        few_lambdas = spaced_lambdas(lambdas, self.study["few"]) if few else lambdas
        keep = [i for i, lam in enumerate(lambdas) if lam in few_lambdas]

        def array(key: str) -> Array:
            return np.stack([np.concatenate([alone[key], self.measures(name)[key][keep]]) for name in names])

        return Curve(array(following), array(value))

    def rate_curve(self, form: str, rate: float) -> Curve | None:
        """Return the curve of a training that tests a learning rate; None if it diverged or was not drawn with."""
        name = Draw(form, RATE_SEED, self.study["steps"] // 4, self.primary, rate=rate).name
        if name not in self.units or not self.units[name].rows:
            return None
        both = self.alone(), self.measures(name)
        return Curve(*(np.concatenate([part[key] for part in both])[None] for key in ("following", "information")))
