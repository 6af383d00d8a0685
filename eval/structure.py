"""ControlMeasure structure control beside image prompts, as in Figure 5.  `python -m eval structure`

Each prompt is an image prompt, and the outlines of another picture of the same concept: drawn anew at another size and place, and
often another drawing. The text names a third background. The drawing should have the lines of the hint, the palette of the image
prompt, and the background of the text. Each combination of prompts is drawn without control, with the ControlNet and with the
T2I-Adapter:

- `hint`: no text and no image prompt;
- `text`: "a fox on a pink background";
- `image`: the image prompt (lambda 1);
- `image and text`: the image prompt (lambda 1) with "on a pink background".

The structure error is the chamfer distance in pixels between the lines of the drawing and those of the hint. A drawing's lines are its
dark pixels, `lines_of`. For comparison: the error of the true picture of each hint (the floor, which is not zero because a hint is not
binary), of that picture through the VAE, and of another prompt's picture (chance).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from checkpoints.controls import Control
from checkpoints.files import check_output, read_json_if_there, write_json
from eval.bench import draw_prompts, embed, through_the_vae
from eval.header import header
from eval.hinted import HintedPrompts
from eval.scores import Scores, mean, score_reading
from eval.tables import markdown
from eval.world_table import line, plus_minus
from sampling.device import check_device
from sampling.loading import load
from sampling.pipeline import Pipeline
from train.judge import Judge, load_judge
from train.vae import bytes_to_tensor
from train.world import pictures

CONTROLS = {"control": "controlnet", "t2i": "t2i"}  # stage that trains a control -> its file
FORMS = {"none": "no control", "control": "ControlNet", "t2i": "T2I-Adapter"}
SCALES = 0.25, 0.5, 0.75  # weights of the residuals, beside 1, at which `image and text` is drawn
DARK = 0.3  # a pixel is part of a line if none of its channels, in [0, 1], reaches this


SCORED = {  # task -> attributes that its prompts determine
    "hint": ("structure_error", "concept"),
    "text": ("structure_error", "concept", "background"),
    "image": ("structure_error", "concept", "background", "palette_error"),
    "image and text": ("structure_error", "concept", "background", "palette_error"),
}


def lines_of(x: Tensor) -> Tensor:
    """Return where pictures `n 3 h w` in [-1, 1] show a line: the pixels in which all channels are dark, `n h w`."""
    return (x.clamp(-1, 1).amax(dim=1) + 1) / 2 < DARK


def chamfer(a: Tensor, b: Tensor) -> float:
    """Compute the mean of mean_p min_q |p - q| and mean_q min_p |p - q|, for the pixels p of mask a and q of mask b, `h w`.

    If one of the masks is empty, the distance is the side of the picture.
    """
    if not (a.any() and b.any()):
        return float(len(a))
    distances = torch.cdist(a.nonzero().double(), b.nonzero().double())
    return float((distances.min(dim=1).values.mean() + distances.min(dim=0).values.mean()) / 2)


def structure_error(drawings: Tensor, hints: Tensor) -> list[float]:
    """Compute the mean chamfer distance in pixels between the lines of drawings `n 3 h w` and hints `n 1 h w`, with its interval."""
    pairs = zip(lines_of(drawings), hints[:, 0] > 0.5, strict=True)
    return mean(torch.tensor([chamfer(lines, hint) for lines, hint in pairs]))


@dataclass(frozen=True)
class ControlMeasure:
    """Draws the tasks of `prompts` and scores the drawings. `controls`: by form."""

    pipeline: Pipeline
    judge: Judge
    prompts: HintedPrompts
    steps: int
    guidance: float
    controls: Mapping[str, Control]

    def scores(self, task: str, drawings: Tensor) -> Scores:
        """Score the attributes that a task determines."""
        scores = score_reading(self.judge.read(drawings), self.prompts.target(task))
        scores["structure_error"] = structure_error(drawings, self.prompts.hints)
        return {name: scores[name] for name in SCORED[task]}

    def draw(self, task: str, form: str, scale: float) -> dict[str, Any]:
        """Draw a task with a form of control and score it; return a row of the results."""
        controls = () if form == "none" else (self.controls[form],)
        pipeline = replace(self.pipeline, controls=controls)
        embedding, hints = None, None
        if task.startswith("image"):
            embedding = embed(pipeline, self.prompts.images)
        if controls:
            hints = self.prompts.hints.expand(-1, controls[0].config.hint_channels, -1, -1)
        name, texts = f"{task}, {FORMS[form]}, scale {scale:g}", self.prompts.texts(task)
        drawings = draw_prompts(
            pipeline, texts, embedding, 1.0, self.guidance, self.steps, name, hints=hints, control_scale=scale
        )
        return {"task": task, "form": form, "scale": scale, "scores": self.scores(task, drawings)}


def anchors(measure: ControlMeasure) -> dict[str, list[float]]:
    """Compute the structure error of the true pictures, of the same through the VAE, and of other prompts' pictures."""
    true, hints = bytes_to_tensor(pictures(measure.prompts.hint_scenes)), measure.prompts.hints
    through = through_the_vae(measure.pipeline.vae, true)
    sets = {"true": true, "reconstructed": through, "another": true.roll(1, dims=0)}
    return {name: structure_error(x, hints) for name, x in sets.items()}


def cells() -> list[tuple[str, str, float]]:
    """List (task, form, scale) of all rows."""
    full = [(task, form, 1.0) for task in SCORED for form in FORMS]
    return [*full, *[("image and text", form, scale) for form in CONTROLS for scale in SCALES]]


def cell(row: dict[str, Any]) -> tuple[str, str, float]:
    """Return (task, form, scale) of a row."""
    return row["task"], row["form"], row["scale"]


def read_done(out: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return the results in `out`, if they have the same `settings` and were measured with the same weights; otherwise `expected`."""
    done = read_json_if_there(out)
    same = all(expected["sha256"].get(name) == value for name, value in done.get("sha256", {}).items())
    return done | {"sha256": expected["sha256"]} if done and same and done["settings"] == expected["settings"] else expected


def evaluate(
    weights: Path, out: Path, n: int, steps: int, guidance: float, device: str, forms: Sequence[str] = ()
) -> dict[str, Any]:
    """ControlMeasure the missing rows, or those of `forms`, with n prompts, and write `out` (JSON) after each.

    Raises FileNotFoundError if a control is missing; the message names the command that trains it.
    """
    check_output(out)
    check_device(device)
    files = {form: weights / f"{name}.safetensors" for form, name in CONTROLS.items() if form in (forms or FORMS)}
    for stage, file in files.items():
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: run `python -m train {stage}` first")
    pipeline = load(weights, device=device, controls=[*files.values()])
    judge = load_judge(weights / "judge.safetensors").to(device)
    controls = dict(zip(files, pipeline.controls, strict=True))
    measure = ControlMeasure(pipeline, judge, HintedPrompts.of_the_world(n, seed=2), steps, guidance, controls)
    results: dict[str, Any] = {**header("structure", weights, n, steps, guidance, device), "rows": []}
    results = read_done(out, results)
    if "anchors" not in results:
        results["anchors"] = anchors(measure)
    order = cells()
    for each in [each for each in order if each[1] in (forms or FORMS) and each not in map(cell, results["rows"])]:
        results["rows"] = sorted([*results["rows"], measure.draw(*each)], key=lambda row: order.index(cell(row)))
        write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Make a table with a line per row, as value ± half of the 95 % interval, then the errors to compare with."""
    lines = []
    for row in results["rows"]:
        at = "" if row["form"] == "none" else f", scale {row['scale']:g}"
        lines.append({"prompts": row["task"], "control": FORMS[row["form"]] + at} | line_of(row["scores"]))
    names = {
        "true": "the hint's own picture",
        "reconstructed": "the same through the VAE",
        "another": "another prompt's picture",
    }
    lines += [{"prompts": names[key]} | line_of({"structure_error": value}) for key, value in results["anchors"].items()]
    return markdown(pd.DataFrame(lines, columns=["prompts", "control", "structure error", "concept", "background", "palette error"]))


def line_of(scores: Scores) -> dict[str, str]:
    """Format scores as {column title: text}, as in the table of `python -m eval world`, and the structure error as "0.41 ± 0.02 px"."""
    cells = line({key: score for key, score in scores.items() if key != "structure_error"})
    return cells | {"structure error": f"{plus_minus(scores['structure_error'], 2)} px"}


def run(args: Namespace) -> None:
    """`python -m eval structure`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance, args.device, args.form)))
