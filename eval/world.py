"""How good the shipped mini weights are, against the truth.  `python -m eval world`

All concepts x backgrounds, one picture each, seeds 0 .. n-1, nothing picked. Every number is read by the judge:

- `true`, `reconstructed`: held-out pictures, and the same through the VAE: the ceiling for everything below.
- `text`: "a fox on a pink background"; its palette error is that of chance, since the caption says no colour.
- `colour`: "a teal fox on a pink background", the right coarse name of the reference's first colour.
- `image`: the reference alone, empty text, lambda 1.
- `conflict`: the reference with the text of another concept and background, at one lambda, fixed on validation prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import weights_convert
from eval import attributes
from sampling.images import to_images
from sampling.pipeline import Pipeline, load
from train.colour import coarse_name
from train.vae import psnr, to_tensor
from train.world import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    CONCEPT_NAMES,
    CONCEPTS,
    Scene,
    World,
    caption,
    pictures,
    random_scene,
)

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
FOLLOW = 0.75  # the text-following that the chosen lambda must keep on validation prompts


@dataclass(frozen=True)
class Task:
    """n prompts: a reference picture each, and another concept and background for the text."""

    references: list[Scene]
    pixels: Tensor  # n 3 64 64 in [-1, 1]
    concept: Tensor
    background: Tensor

    @property
    def palette(self) -> Tensor:
        return attributes.truth(self.references)["palette"]

    def captions(self) -> list[str]:
        return [
            caption(CONCEPT_NAMES[c], None, BACKGROUND_NAMES[b])
            for c, b in zip(self.concept, self.background, strict=True)
        ]


def examples(folder: Path, n: int = 12) -> None:
    """Writes the demo's image prompts: the first held-out pictures of n different concepts, each named after its own."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Scene] = {}
    for i in range(1000):
        scene = World("test")[i]
        found.setdefault(CONCEPT_NAMES[scene.concept], scene)
        if len(found) == n:
            break
    for name, scene in found.items():
        Image.fromarray(pictures([scene])[0]).save(folder / f"{name.replace(' ', '_')}.png")


def task(n: int, seed: int) -> Task:
    """Cell i of concepts x backgrounds (again from the start after the last), with a reference whose concept and background differ."""
    rng, cells = np.random.default_rng((917, seed)), len(CONCEPTS) * len(BACKGROUNDS)
    order = np.concatenate([rng.permutation(cells) for _ in range(-(-n // cells))])[:n]
    concept, background = order // len(BACKGROUNDS), order % len(BACKGROUNDS)
    references = [
        random_scene(
            rng,
            int((c + rng.integers(1, len(CONCEPTS))) % len(CONCEPTS)),
            int((b + rng.integers(1, len(BACKGROUNDS))) % len(BACKGROUNDS)),
        )
        for c, b in zip(concept, background, strict=True)
    ]
    return Task(references, to_tensor(pictures(references)), torch.from_numpy(concept), torch.from_numpy(background))


def draw(
    pipeline: Pipeline,
    prompts: list[str],
    pixels: Tensor | None,
    scale: float,
    guidance: float,
    steps: int,
    name: str,
    batch: int = 64,
) -> Tensor:
    """One picture for each prompt, seeds 0 .. n-1; `pixels` are the image prompts."""
    drawn = []
    for first in tqdm(range(0, len(prompts), batch), desc=name, unit="batch"):
        rows = slice(first, min(first + batch, len(prompts)))
        embedding = None
        if pixels is not None:
            embedding = torch.cat([pipeline.embed([image]) for image in to_images(pixels[rows])])
        seeds = list(range(rows.start, rows.stop))
        drawn.append(pipeline.draw(prompts[rows], seeds, embedding, scale=scale, guidance=guidance, steps=steps))
    return torch.cat(drawn)


def choose_lambda(
    pipeline: Pipeline, judge: attributes.Judge, guidance: float, steps: int, n: int
) -> tuple[float, list[dict[str, float]]]:
    """The largest lambda whose pictures still follow the text's concept in `FOLLOW` of the validation prompts, and the sweep."""
    val, sweep = task(n, seed=1), []
    for scale in LAMBDAS:
        read = attributes.read(
            judge, draw(pipeline, val.captions(), val.pixels, scale, guidance, steps, f"lambda {scale}")
        )
        sweep.append({"lambda": scale, **attributes.score(read, val.concept, val.background, val.palette)})
    keep = [row["lambda"] for row in sweep if row["concept"] >= FOLLOW]
    return (max(keep) if keep else LAMBDAS[0]), sweep


def evaluate(
    weights: Path,
    out: Path,
    n: int = 1024,
    steps: int = 12,
    guidance: float = 4.0,
) -> dict[str, Any]:
    """Measures everything and writes `out` (JSON)."""
    pipeline, judge = load(weights), attributes.load(weights / "judge.safetensors")
    test = task(n, seed=2)
    own = attributes.truth(test.references)
    with torch.no_grad():
        reconstructed = torch.cat([pipeline.vae.decode(pipeline.vae.encode(part)) for part in test.pixels.split(64)])
    results: dict[str, Any] = {
        "command": f"python -m eval world --n {n} --steps {steps} --guidance {guidance:g}",
        "settings": {"n": n, "steps": steps, "guidance": guidance, "seeds": f"0..{n - 1}"},
        "sha256": {path.name: weights_convert.sha256(path) for path in sorted(weights.glob("*.safetensors"))},
        "vae_psnr": psnr(pipeline.vae, test.pixels),
        "true": attributes.score(
            attributes.read(judge, test.pixels), own["concept"], own["background"], own["palette"]
        ),
        "reconstructed": attributes.score(
            attributes.read(judge, reconstructed), own["concept"], own["background"], own["palette"]
        ),
    }
    scale, sweep = choose_lambda(pipeline, judge, guidance, steps, max(64, n // 8))
    results |= {"lambda": scale, "sweep": sweep}
    names = [coarse_name(scene.palette[0]) for scene in test.references]
    colour = [
        caption(CONCEPT_NAMES[c], name, BACKGROUND_NAMES[b])
        for c, name, b in zip(test.concept, names, test.background, strict=True)
    ]
    for key, prompts, pixels, lam, concept, background in (
        ("text", test.captions(), None, 0.0, test.concept, test.background),
        ("colour", colour, None, 0.0, test.concept, test.background),
        ("image", [""] * n, test.pixels, 1.0, own["concept"], own["background"]),
        ("conflict", test.captions(), test.pixels, scale, test.concept, test.background),
    ):
        read = attributes.read(judge, draw(pipeline, prompts, pixels, lam, guidance, steps, key))
        results[key] = attributes.score(read, concept, background, test.palette)
        print(key, attributes.summary(results[key]))
        weights_convert.write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """The results as the table of the README."""
    rows = {
        "true": "true pictures, held out",
        "reconstructed": "the same through the VAE: the ceiling",
        "text": "text: concept and background",
        "colour": "text: with the right colour name",
        "image": "image prompt alone, λ = 1",
        "conflict": f"image prompt against text, λ = {results['lambda']:g}",
    }
    lines = ["| | concept | background | palette error |", "|---|---|---|---|"]
    for key, name in rows.items():
        r = results[key]
        lines.append(f"| {name} | {r['concept']:.1%} | {r['background']:.1%} | {r['palette_error']:.1f} |")
    return "\n".join(lines)
