"""Score the shipped mini weights against the ground truth.  `python -m eval world`

The prompts cover all concepts on all backgrounds, with one drawing each and seeds 0 .. n-1; nothing is selected. The judge scores

- `true`, `reconstructed`: held-out pictures, and the same pictures through the VAE, the ceiling for all drawings;
- `text`: "a fox on a pink background"; no colour is named, so the palette error is at chance level;
- `colour`: "a teal fox on a pink background", with the coarse name of the image prompt's first colour;
- `image`: the image prompt alone (empty text, lambda 1);
- `conflict`: the image prompt with a text that names another concept and background. Lambda is chosen on validation prompts; it
  applies to all cross-attention layers, or only to those of the finest level (`Lambda.layers`), which carry colours.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from checkpoints.files import check_output, sha256, write_json
from eval.bench import draw_prompts, dtype, embed, through_the_vae
from eval.prompts import Prompts
from eval.tables import markdown, summary
from sampling.embeddings import Strength
from sampling.lambdas import Lambda
from sampling.pipeline import Pipeline, load
from train.colour import coarse_name
from train.judge import Judge, load_judge
from train.vae import psnr
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, caption

LAMBDAS: dict[Literal["all", "finest"], tuple[float, ...]] = {
    "all": (0.2, 0.3, 0.4, 0.6),
    "finest": (0.5, 0.6, 0.7, 0.8, 1.0),
}
FOLLOW = {"concept": 0.75, "background": 0.9}  # minimum share of validation drawings that follow the text at the chosen lambda
Scores = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """Draws prompts of the mini world and scores the drawings with the judge."""

    pipeline: Pipeline
    judge: Judge
    steps: int
    guidance: float

    def score(self, prompts: Prompts, x: Tensor, whose: str) -> Scores:
        """Return the shares of pictures with the right concept and background, and the palette error against the image prompt.

        `whose`: compare concept and background with those of the image prompt ("own") or of the text ("wanted").
        """
        truth = prompts.truth
        assert truth is not None
        own = truth.own
        concept, background = (
            (own["concept"], own["background"]) if whose == "own" else (truth.concept, truth.background)
        )
        return self.judge.read(x).score(concept, background, own["palette"])

    def draw(self, prompts: Prompts, texts: list[str], lam: Strength | None, whose: str, name: str) -> Scores:
        """Draw the texts and score the drawings. Without `lam`, draw without the image prompts."""
        embedding = None if lam is None else embed(self.pipeline, prompts.images)
        scale = 0.0 if lam is None else lam
        return self.score(prompts, draw_prompts(self.pipeline, texts, embedding, scale, self.guidance, self.steps, name), whose)


def lambda_of(layers: Literal["all", "finest"], scale: float) -> Lambda:
    """Apply lambda to all layers, or only to those of the finest level."""
    return Lambda(scale, None if layers == "all" else layers)


def choose_lambda(measure: Measure, n: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Choose lambda on n validation prompts. Return (choice, all results).

    The choice has the lowest palette error among the lambdas whose drawings follow the text as often as `FOLLOW` requires. If none does,
    it is the first.
    """
    validation, sweep = Prompts.of_the_world(n, seed=1), list[dict[str, Any]]()
    for layers, scales in LAMBDAS.items():
        for scale in scales:
            name = f"lambda {scale:g}, {layers} layers"
            scores = measure.draw(validation, validation.other, lambda_of(layers, scale), "wanted", name)
            sweep.append({"lambda": scale, "layers": layers, **scores})
            print(name, summary(scores), flush=True)
    keep = [row for row in sweep if all(row[key] >= least for key, least in FOLLOW.items())]
    return min(keep or sweep[:1], key=lambda row: float(row["palette_error"])), sweep


def texts_with_colour(prompts: Prompts) -> list[str]:
    """Add the coarse name of the image prompt's first colour to the conflicting texts."""
    truth = prompts.truth
    assert truth is not None
    names = [coarse_name(scene.palette[0]) for scene in truth.scenes]
    named = zip(truth.concept, names, truth.background, strict=True)
    return [caption(CONCEPT_NAMES[c], name, BACKGROUND_NAMES[b]) for c, name, b in named]


def evaluate(weights: Path, out: Path, n: int, steps: int, guidance: float) -> dict[str, Any]:
    """Measure everything, and write `out` (JSON) after each part."""
    check_output(out)
    measure = Measure(load(weights), load_judge(weights / "judge.safetensors"), steps, guidance)
    test, vae = Prompts.of_the_world(n, seed=2), measure.pipeline.vae
    results: dict[str, Any] = {
        "command": f"python -m eval world --n {n} --steps {steps} --guidance {guidance:g}",
        "settings": {"n": n, "steps": steps, "guidance": guidance, "dtype": dtype(), "seeds": f"0..{n - 1}"},
        "sha256": {path.name: sha256(path) for path in sorted(weights.glob("*.safetensors"))},
        "vae_psnr": psnr(vae, test.pixels),
        "true": measure.score(test, test.pixels, "own"),
        "reconstructed": measure.score(test, through_the_vae(vae, test.pixels), "own"),
    }
    chosen, sweep = choose_lambda(measure, max(64, n // 8))
    results |= {"lambda": chosen["lambda"], "layers": chosen["layers"], "sweep": sweep}
    lam = lambda_of(chosen["layers"], chosen["lambda"])
    parts: dict[str, tuple[list[str], Strength | None, str]] = {
        "text": (test.other, None, "wanted"),
        "colour": (texts_with_colour(test), None, "wanted"),
        "image": ([""] * n, 1.0, "own"),
        "conflict": (test.other, lam, "wanted"),
    }
    for key, (texts, strength, whose) in parts.items():
        results[key] = measure.draw(test, texts, strength, whose, key)
        print(key, summary(results[key]), flush=True)
        write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/world.md."""
    names = {
        "true": "held-out pictures",
        "reconstructed": "held-out pictures through the VAE: the ceiling",
        "text": "text with concept and background",
        "colour": "text with the right colour name too",
        "image": "image prompt alone, λ = 1",
        "conflict": f"image prompt with a conflicting text, λ = {results['lambda']:g} in {results['layers']} layers",
    }
    frame = pd.DataFrame([results[key] for key in names])
    shares = {key: frame[key].map("{:.1%}".format) for key in ("concept", "background")}
    error = frame["palette_error"].map("{:.1f}".format)
    return markdown(pd.DataFrame({"": list(names.values()), **shares, "palette error": error}))


def run(args: Namespace) -> None:
    """`python -m eval world`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance)))
