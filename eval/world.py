"""How good the shipped mini weights are, against the truth.  `python -m eval world`

Every concept on every background, one picture each, seeds 0 .. n-1, nothing selected. The judge reads every number:

- `true`, `reconstructed`: held-out pictures, and the same through the VAE, which bounds everything below;
- `text`: "a fox on a pink background"; the caption names no colour, so the palette error is that of chance;
- `colour`: "a teal fox on a pink background", with the coarse name of the image prompt's first colour;
- `image`: the image prompt alone, empty text, lambda 1;
- `conflict`: the image prompt with a text that names another concept and background. One lambda is chosen on validation prompts:
  a number for all cross-attention layers, or for those of the finest level (`Lambda.layers`), which carry colours.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from checkpoints.files import check_output, sha256, write_json
from eval.bench import draw, dtype, embed, through_the_vae
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
FOLLOW = {"concept": 0.75, "background": 0.9}  # how often validation prompts must follow the text at the chosen lambda
Scores = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """Draws prompts of the mini world, and scores them by the judge."""

    pipeline: Pipeline
    judge: Judge
    steps: int
    guidance: float

    def score(self, prompts: Prompts, x: Tensor, whose: str) -> Scores:
        """Shares of pictures with the right concept and background ("own": the image prompt's, "wanted": the text's), and the
        palette error against the image prompt."""
        truth = prompts.truth
        assert truth is not None
        own = truth.own
        concept, background = (
            (own["concept"], own["background"]) if whose == "own" else (truth.concept, truth.background)
        )
        return self.judge.read(x).score(concept, background, own["palette"])

    def draw(self, prompts: Prompts, texts: list[str], lam: Strength | None, whose: str, name: str) -> Scores:
        """Draw the texts, with the image prompts unless `lam` is None, and score the drawings."""
        embedding = None if lam is None else embed(self.pipeline, prompts.images)
        scale = 0.0 if lam is None else lam
        return self.score(prompts, draw(self.pipeline, texts, embedding, scale, self.guidance, self.steps, name), whose)


def lambda_of(layers: Literal["all", "finest"], scale: float) -> Lambda:
    """lambda in all layers, or in those of the finest level."""
    return Lambda(scale, None if layers == "all" else layers)


def choose_lambda(measure: Measure, n: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(choice, sweep): on n validation prompts, the lambda with the lowest palette error among those whose pictures follow the text as
    often as `FOLLOW` asks; if none does, the first."""
    validation, sweep = Prompts.of_the_world(n, seed=1), list[dict[str, Any]]()
    for layers, scales in LAMBDAS.items():
        for scale in scales:
            name = f"lambda {scale:g}, {layers} layers"
            scores = measure.draw(validation, validation.other, lambda_of(layers, scale), "wanted", name)
            sweep.append({"lambda": scale, "layers": layers, **scores})
            print(name, summary(scores), flush=True)
    keep = [row for row in sweep if all(row[key] >= least for key, least in FOLLOW.items())]
    return min(keep or sweep[:1], key=lambda row: float(row["palette_error"])), sweep


def coloured_texts(prompts: Prompts) -> list[str]:
    """The conflicting texts with the coarse name of the image prompt's first colour."""
    truth = prompts.truth
    assert truth is not None
    names = [coarse_name(scene.palette[0]) for scene in truth.scenes]
    asked = zip(truth.concept, names, truth.background, strict=True)
    return [caption(CONCEPT_NAMES[c], name, BACKGROUND_NAMES[b]) for c, name, b in asked]


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
        "colour": (coloured_texts(test), None, "wanted"),
        "image": ([""] * n, 1.0, "own"),
        "conflict": (test.other, lam, "wanted"),
    }
    for key, (texts, strength, whose) in parts.items():
        results[key] = measure.draw(test, texts, strength, whose, key)
        print(key, summary(results[key]), flush=True)
        write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    names = {
        "true": "true pictures, held out",
        "reconstructed": "the same through the VAE: the ceiling",
        "text": "text: concept and background",
        "colour": "text: with the right colour name",
        "image": "image prompt alone, λ = 1",
        "conflict": f"image prompt against text, λ = {results['lambda']:g} in {results['layers']} layers",
    }
    frame = pd.DataFrame([results[key] for key in names])
    shares = {key: frame[key].map("{:.1%}".format) for key in ("concept", "background")}
    error = frame["palette_error"].map("{:.1f}".format)
    return markdown(pd.DataFrame({"": list(names.values()), **shares, "palette error": error}))


def run(args: Namespace) -> None:
    """`python -m eval world`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance)))
