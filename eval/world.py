"""How good the shipped mini weights are, against the truth.  `python -m eval world`

All concepts x backgrounds, one picture each, seeds 0 .. n-1, nothing picked. Every number is read by the judge:

- `true`, `reconstructed`: held-out pictures, and the same through the VAE: the ceiling for everything below.
- `text`: "a fox on a pink background"; its palette error is that of chance, since the caption says no colour.
- `colour`: "a teal fox on a pink background", the right coarse name of the reference's first colour.
- `image`: the reference alone, empty text, lambda 1.
- `conflict`: the reference with the text of another concept and background, at one lambda, fixed on validation prompts: a
  number for all cross-attention layers, or for those of the finest level alone (`Lambda.layers`), which carry colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import sha256, write_json
from eval import attributes
from model.attention import Fuse, decoupled
from model.vae import VAE
from sampling.embeddings import Strength
from sampling.images import to_images
from sampling.lambdas import Lambda
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

LAMBDAS = {"all": (0.2, 0.3, 0.4, 0.6), "finest": (0.5, 0.6, 0.7, 0.8, 1.0)}
FOLLOW = {"concept": 0.75, "background": 0.9}  # what must follow the text on validation prompts at the chosen lambda


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


def embedding(pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
    """What the pipeline's adapter reads of pictures, each a prompt of its own, `n 1 ...`."""
    return torch.cat([pipeline.embed([image]) for image in images])


@torch.no_grad()
def through_the_vae(vae: VAE, pixels: Tensor) -> Tensor:
    """Pictures `n 3 h w`, encoded and decoded again."""
    device = next(vae.parameters()).device
    return torch.cat([vae.decode(vae.encode(part.to(device))).cpu() for part in pixels.split(32)])


def draw(
    pipeline: Pipeline,
    prompts: list[str],
    pictured: Tensor | None,
    scale: Strength,
    guidance: float,
    steps: int,
    name: str,
    fuse: Fuse = decoupled,
    batch: int = 32,
) -> Tensor:
    """One picture for each prompt, beside what an adapter reads of its image prompt, `n 1 ...`, if any; seeds 0 .. n-1, in bfloat16."""
    drawn, device = [], next(pipeline.unet.parameters()).device.type
    for first in tqdm(range(0, len(prompts), batch), desc=name, unit="batch"):
        rows = slice(first, min(first + batch, len(prompts)))
        seen, seeds = None if pictured is None else pictured[rows], list(range(rows.start, rows.stop))
        with torch.autocast(device, torch.bfloat16):
            x = pipeline.draw(prompts[rows], seeds, seen, scale=scale, guidance=guidance, steps=steps, fuse=fuse)
        drawn.append(x.float().cpu())
    return torch.cat(drawn)


def lambda_of(layers: str, scale: float) -> Lambda:
    """lambda in all layers, or in those of a preset."""
    return Lambda(scale, None if layers == "all" else layers)


def choose_lambda(
    pipeline: Pipeline, judge: attributes.Judge, guidance: float, steps: int, n: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of the lambdas whose pictures follow the text as often as `FOLLOW` asks on validation prompts, the one with the lowest
    palette error; and the sweep."""
    val, sweep = task(n, seed=1), []
    seen = embedding(pipeline, to_images(val.pixels))
    for layers, scales in LAMBDAS.items():
        for scale in scales:
            lam, name = lambda_of(layers, scale), f"lambda {scale:g}, {layers} layers"
            read = attributes.read(judge, draw(pipeline, val.captions(), seen, lam, guidance, steps, name))
            scores = attributes.score(read, val.concept, val.background, val.palette)
            sweep.append({"lambda": scale, "layers": layers, **scores})
            print(name, attributes.summary(scores), flush=True)
    keep = [row for row in sweep if all(row[key] >= least for key, least in FOLLOW.items())]
    return min(keep or sweep[:1], key=lambda row: float(row["palette_error"])), sweep


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
    reconstructed = through_the_vae(pipeline.vae, test.pixels)
    results: dict[str, Any] = {
        "command": f"python -m eval world --n {n} --steps {steps} --guidance {guidance:g}",
        "settings": {"n": n, "steps": steps, "guidance": guidance, "dtype": "bfloat16", "seeds": f"0..{n - 1}"},
        "sha256": {path.name: sha256(path) for path in sorted(weights.glob("*.safetensors"))},
        "vae_psnr": psnr(pipeline.vae, test.pixels),
        "true": attributes.score(
            attributes.read(judge, test.pixels), own["concept"], own["background"], own["palette"]
        ),
        "reconstructed": attributes.score(
            attributes.read(judge, reconstructed), own["concept"], own["background"], own["palette"]
        ),
    }
    chosen, sweep = choose_lambda(pipeline, judge, guidance, steps, max(64, n // 8))
    results |= {"lambda": chosen["lambda"], "layers": chosen["layers"], "sweep": sweep}
    lam = lambda_of(chosen["layers"], chosen["lambda"])
    names = [coarse_name(scene.palette[0]) for scene in test.references]
    colour = [
        caption(CONCEPT_NAMES[c], name, BACKGROUND_NAMES[b])
        for c, name, b in zip(test.concept, names, test.background, strict=True)
    ]
    seen = embedding(pipeline, to_images(test.pixels))
    for key, prompts, pictured, strength, concept, background in (
        ("text", test.captions(), None, 0.0, test.concept, test.background),
        ("colour", colour, None, 0.0, test.concept, test.background),
        ("image", [""] * n, seen, 1.0, own["concept"], own["background"]),
        ("conflict", test.captions(), seen, lam, test.concept, test.background),
    ):
        read = attributes.read(judge, draw(pipeline, prompts, pictured, strength, guidance, steps, key))
        results[key] = attributes.score(read, concept, background, test.palette)
        print(key, attributes.summary(results[key]))
        write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """The results as the table of the README."""
    rows = {
        "true": "true pictures, held out",
        "reconstructed": "the same through the VAE: the ceiling",
        "text": "text: concept and background",
        "colour": "text: with the right colour name",
        "image": "image prompt alone, λ = 1",
        "conflict": f"image prompt against text, λ = {results['lambda']:g} in {results['layers']} layers",
    }
    lines = ["| | concept | background | palette error |", "|---|---|---|---|"]
    for key, name in rows.items():
        r = results[key]
        lines.append(f"| {name} | {r['concept']:.1%} | {r['background']:.1%} | {r['palette_error']:.1f} |")
    return "\n".join(lines)
