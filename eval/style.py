"""Measure an adapter on another base model, as in Figure 4.  `python -m eval style`

The adapter was trained with the shipped base. Here it is used unchanged on the comic base, which `python -m train style` made from it.
Both bases draw the tasks of eval/world.py with the same prompts and noise:

- `text`: "a fox on a pink background";
- `image`: the image prompt alone (lambda 1);
- `complementary`: the image prompt with a text that names another background, size and place (lambda 0.8).

`dark` is the share of dark pixels (eval/structure.py::lines_of), in per cent: comic pictures have more because of their shadows. For
comparison, true pictures of both styles are scored too. The judge never saw the comic style in training, so its scores of true comic
pictures show how far it can be trusted.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from checkpoints.files import check_output, write_json
from eval.bench import through_the_vae
from eval.header import header
from eval.prompts import Prompts
from eval.scores import Scores, Target, mean, score, values_of
from eval.structure import lines_of
from eval.tables import markdown, summary
from eval.world import Measure, own, tasks_of
from eval.world_table import ERRORS, SHARES, line, plus_minus
from sampling.device import check_device
from sampling.loading import load
from train.comic import comic
from train.judge import Judge, load_judge
from train.vae import bytes_to_tensor
from train.world import Style, pictures, render

LAMBDAS = {"text": 0.0, "image": 1.0, "complementary": 0.8}
STYLES: dict[str, Style] = {"base": render, "comic": comic}
NAMES = {
    "true": "held-out pictures",
    "reconstructed": "held-out pictures through the VAE",
    "text": "text with concept and background",
    "image": "image prompt alone, λ = 1",
    "complementary": "image prompt, and a text with background, size and place, λ = 0.8",
}


def score_style(judge: Judge, drawings: Tensor, target: Target, name: str) -> Scores:
    """Score drawings with the judge, compute their share of dark pixels, and print the values."""
    scores = score(judge, drawings, target)
    scores["dark"] = mean(100 * lines_of(drawings).double().mean(dim=(1, 2)))
    print(name, summary(values_of(scores)), flush=True)
    return scores


def evaluate(weights: Path, out: Path, n: int, steps: int, guidance: float, device: str) -> dict[str, Any]:
    """Measure both bases with n prompts, and write `out` (JSON) after each row.

    Raises FileNotFoundError if the comic base is missing; the message names the command that trains it.
    """
    check_output(out)
    check_device(device)
    file = weights / "comic.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run `python -m train style` first")
    judge = load_judge(weights / "judge.safetensors").to(device)
    tasks, prompts = tasks_of(n, seed=2), Prompts.of_the_world(n, seed=2)
    results: dict[str, Any] = {**header("style", weights, n, steps, guidance, device), "scores": {}}
    assert prompts.truth is not None
    true = own(prompts)
    for name, style in STYLES.items():
        pipeline = load(weights, device=device, loras=[(file, 1.0)] if style is comic else [])
        measure = Measure(pipeline, judge, steps, guidance)
        images = bytes_to_tensor(pictures(prompts.truth.scenes, style))
        rows = results["scores"][name] = {"true": score_style(judge, images, true, f"{name}, true")}
        rows["reconstructed"] = score_style(judge, through_the_vae(pipeline.vae, images), true, f"{name}, reconstructed")
        for key, lam in LAMBDAS.items():
            task, label = tasks[key], f"{name}, {key}"
            rows[key] = score_style(judge, measure.drawings(task, lam, label), task.target, label)
            write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Make a table with a line per row, the two bases below each other, as value ± half of the 95 % interval."""
    lines = []
    for task, name in NAMES.items():
        for base, rows in results["scores"].items():
            cells = line({key: score for key, score in rows[task].items() if key != "dark"})
            lines.append({"": name, "base": base} | cells | {"dark pixels": f"{plus_minus(rows[task]['dark'])} %"})
    return markdown(pd.DataFrame(lines, columns=["", "base", *SHARES.values(), *ERRORS.values(), "dark pixels"]))


def run(args: Namespace) -> None:
    """`python -m eval style`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance, args.device)))
