"""Score the shipped mini weights against the ground truth.  `python -m eval world`

The prompts cover all concepts. Each prompt is drawn once, with seeds 0 .. n-1; nothing is selected. The judge scores

- `true`, `reconstructed`: held-out pictures, and the same pictures through the VAE, an upper limit for all drawings;
- `text`: "a fox on a pink background"; no colour is named, so the palette error is at chance level;
- `scene`: "a small fox on a pink background, top left": the scene of a complementary prompt, given by text alone;
- `colour`: "a teal fox on a pink background", with the coarse name of the image prompt's first colour;
- `image`: the image prompt alone (empty text, lambda 1);
- `complementary`: the image prompt with a text that names another background, size and place (eval/scenes.py);
- `apart`: the same at lambda 1, with more guidance by the text than by the image prompt;
- `conflict`: the image prompt with a text that names another concept and background, a stress test.

`complementary` and `conflict` use the lambda, equal in all layers, that is best on validation prompts, and `apart` the weight of the text
that is best there. For comparison, `grey` and `another` are the
palette errors of a uniform grey and of another image prompt's palette.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from checkpoints.files import check_output, write_json
from eval.bench import Row, draw_prompts, embed, through_the_vae
from eval.device import device_of
from eval.header import header
from eval.prompts import Prompts
from eval.scenes import ScenePrompts
from eval.scores import GREY, Scores, Target, mean, score, values_of
from eval.tables import summary
from eval.world_rules import RULES, best_apart
from eval.world_table import table
from sampling.device import check_device
from sampling.loading import load
from sampling.pipeline import Pipeline
from train.colour import coarse_name
from train.judge import Judge, delta_e, load_judge
from train.vae import psnr
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, caption

VALIDATION = 128  # lambda is chosen on at most this many prompts
LAMBDAS = {"complementary": (0.4, 0.6, 0.8, 1.0), "conflict": (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)}
TEXT_GUIDANCE = 6.0, 7.0, 8.0, 9.0, 10.0  # of `apart`


@dataclass(frozen=True)
class Task:
    """n texts, the target of their drawings, and the image prompts, if there are any."""

    texts: Sequence[str]
    target: Target
    images: Sequence[Image.Image] | None = None


@dataclass(frozen=True)
class Measure:
    """Draws tasks and scores the drawings with the judge."""

    pipeline: Pipeline
    judge: Judge
    steps: int
    guidance: float

    def draw(self, task: Task, lam: float, name: str, text_guidance: float | None = None) -> Scores:
        """Draw a task as `drawings` does, and score the drawings."""
        scores = score(self.judge, self.drawings(task, lam, name, text_guidance), task.target)
        print(name, summary(values_of(scores)), flush=True)
        return scores

    def drawings(self, task: Task, lam: float, name: str, text_guidance: float | None = None) -> Tensor:
        """Draw a task at lambda, in all layers. `name`: the label of the progress bar. With `text_guidance`, `guidance` is the weight of
        the image prompt alone."""
        embedding = None if task.images is None else embed(self.pipeline, task.images)
        texts, both = list(task.texts), (self.guidance, None) if text_guidance is None else (text_guidance, self.guidance)
        return draw_prompts(self.pipeline, texts, embedding, lam, both[0], self.steps, name, image_guidance=both[1])


def conflict_target(prompts: Prompts) -> Target:
    """Build the target of conflicting prompts: the text's concept and background in the image prompt's palette."""
    truth = prompts.truth
    assert truth is not None
    return Target(truth.concept, truth.background, truth.labels["palette"])


def own(prompts: Prompts) -> Target:
    """Build the target of drawings that should reproduce the image prompts."""
    assert prompts.truth is not None
    return Target.of_scenes(prompts.truth.scenes)


def tasks_of(n: int, seed: int) -> dict[str, Task]:
    """Build all tasks, with n prompts each."""
    prompts, scenes = Prompts.of_the_world(n, seed), ScenePrompts.of_the_world(n, seed)
    both = Task(scenes.texts(), scenes.target, scenes.images)
    return {
        "text": Task(prompts.conflicts, conflict_target(prompts)),
        "scene": Task(scenes.texts(subject=True), scenes.target),
        "colour": Task(texts_with_colour(prompts), conflict_target(prompts)),
        "image": Task([""] * n, own(prompts), prompts.images),
        "complementary": both,
        "apart": both,
        "conflict": Task(prompts.conflicts, conflict_target(prompts), prompts.images),
    }


def texts_with_colour(prompts: Prompts) -> list[str]:
    """Add the coarse name of the image prompt's first colour to the conflicting texts."""
    truth = prompts.truth
    assert truth is not None
    names = [coarse_name(scene.palette[0]) for scene in truth.scenes]
    triples = zip(truth.concept, names, truth.background, strict=True)
    return [caption(CONCEPT_NAMES[c], name, BACKGROUND_NAMES[b]) for c, name, b in triples]


def choose_lambdas(measure: Measure, n: int) -> tuple[dict[str, float], dict[str, list[Row]]]:
    """Choose lambda for each task in `LAMBDAS` on n validation prompts. Return (chosen lambdas, scores at all lambdas)."""
    tasks, sweep = tasks_of(n, seed=1), dict[str, list[Row]]()
    for key, scales in LAMBDAS.items():
        sweep[key] = [{"lambda": lam, **measure.draw(tasks[key], lam, f"{key}, lambda {lam:g}")} for lam in scales]
    return {key: float(RULES[key](rows)["lambda"]) for key, rows in sweep.items()}, sweep


def choose_text_guidance(measure: Measure, n: int) -> tuple[float, list[Row]]:
    """Choose the weight of the text for `apart` on n validation prompts. Return it, and the scores at all weights."""
    task = tasks_of(n, seed=1)["apart"]
    rows = [{"guidance": w, **measure.draw(task, 1.0, f"apart, text guidance {w:g}", w)} for w in TEXT_GUIDANCE]
    return float(best_apart(rows)["guidance"]), rows


def floors(palette: Tensor) -> dict[str, Scores]:
    """Compute the palette errors of a uniform grey and of another prompt's palette. `palette`: `n 2 3`, CIELAB."""
    others = {"grey": GREY.to(palette).expand_as(palette), "another": palette.roll(1, dims=0)}
    return {key: {"palette_error": mean(delta_e(other, palette))} for key, other in others.items()}


def evaluate(weights: Path, out: Path, n: int, steps: int, guidance: float, device: str) -> dict[str, Any]:
    """Measure everything, and write `out` (JSON) after each task."""
    check_output(out)
    check_device(device)
    measure = Measure(load(weights, device=device), load_judge(weights / "judge.safetensors").to(device), steps, guidance)
    test, vae = Prompts.of_the_world(n, seed=2), measure.pipeline.vae
    target, through = own(test), through_the_vae(vae, test.pixels)
    lambdas, sweep = choose_lambdas(measure, min(VALIDATION, n))
    text_guidance, sweep["apart"] = choose_text_guidance(measure, min(VALIDATION, n))
    scores = {
        "true": score(measure.judge, test.pixels, target),
        "reconstructed": score(measure.judge, through, target),
    }
    results = {
        **header("world", weights, n, steps, guidance, device),
        "vae_psnr": psnr(vae, test.pixels.to(device_of(vae))),
        "lambda": lambdas,
        "text_guidance": text_guidance,
        "sweep": sweep,
        "scores": scores,
    }
    for key, task in tasks_of(n, seed=2).items():
        lam = 0.0 if task.images is None else lambdas.get(key, 1.0)
        scores[key] = measure.draw(task, lam, key, text_guidance if key == "apart" else None)
        write_json(out, results)
    scores |= floors(target.palette)
    write_json(out, results)
    return results


def run(args: Namespace) -> None:
    """`python -m eval world`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance, args.device)))
