"""Compute the Fréchet distance between drawings and held-out pictures.  `python -m eval frechet`

Like FID (arXiv 1706.08500), it compares means and covariances of image features. The features come from the mini world's second CLIP,
which no other network uses. The distance is 0 only if both moments are equal. We measure three sets of pictures:

- `another`: other held-out pictures, the floor for this number of pictures;
- `reconstructed`: the held-out pictures, encoded and decoded by the VAE;
- `drawn`: drawings of the held-out pictures' captions, with seeds 0 .. n-1, without image prompts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from checkpoints.files import check_output, write_json
from eval import clip_score
from eval.bench import draw_prompts, through_the_vae
from eval.clip_score import Scorer
from eval.header import header
from eval.tables import markdown
from sampling.device import check_device
from sampling.images import to_images
from sampling.loading import load
from train.vae import bytes_to_tensor
from train.world import Scene, World, pictures

NAMES = {
    "another": "other held-out pictures: the floor",
    "reconstructed": "held-out pictures through the VAE",
    "drawn": "drawings of their captions",
}
Moments = tuple[Tensor, Tensor]


def moments(x: Tensor) -> Moments:
    """Compute the mean `e` and the covariance `e e` of features `n e`, in float64."""
    x = x.double()
    return x.mean(dim=0), x.T.cov()


def root(matrix: Tensor) -> Tensor:
    """Compute the square root of a symmetric positive semidefinite matrix. Negative eigenvalues, from rounding, count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.matmul(vectors * values.clamp(min=0).sqrt(), vectors.T)


def distance(a: Moments, b: Moments) -> float:
    """Compute |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), the squared Fréchet distance of two Gaussians."""
    (mean_a, a_cov), (mean_b, b_cov) = a, b
    half = root(a_cov)
    return float((mean_a - mean_b).square().sum() + torch.trace(a_cov + b_cov - 2 * root(half @ b_cov @ half)))


def features(scorer: Scorer, x: Tensor) -> Tensor:
    """Compute the scorer's image features of pictures `n 3 h w`: `n e`."""
    return torch.cat([scorer.images(to_images(part)) for part in x.split(1000)])


def evaluate(weights: Path, out: Path, n: int, steps: int, guidance: float, device: str) -> dict[str, Any]:
    """Measure the distances with n pictures, and write `out` (JSON). Raises ValueError if n is 1, because one picture has no covariance."""
    if n < 2:
        raise ValueError("the Fréchet distance needs at least 2 pictures: give a larger --n")
    check_output(out)
    check_device(device)
    pipeline, scorer, world = load(weights, (), device=device), clip_score.load(weights, device), World("test")
    scenes, others = ([world[i] for i in range(first, first + n)] for first in (0, n))
    held_out, texts = pixels_of(scenes), [scene.caption for scene in scenes]
    sets: dict[str, Callable[[], Tensor]] = {
        "another": lambda: pixels_of(others),
        "reconstructed": lambda: through_the_vae(pipeline.vae, held_out),
        "drawn": lambda: draw_prompts(pipeline, texts, None, 0.0, guidance, steps, "captions"),
    }
    reference = moments(features(scorer, held_out))
    results = {
        **header("frechet", weights, n, steps, guidance, device),
        "scorer": scorer.name,
        "distance": {key: distance(reference, moments(features(scorer, make()))) for key, make in sets.items()},
    }
    write_json(out, results)
    return results


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Render scenes, `n 3 64 64` in [-1, 1]."""
    return bytes_to_tensor(pictures(scenes))


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/world.md."""
    distances = [f"{results['distance'][key]:.2f}" for key in NAMES]
    return markdown(pd.DataFrame({"": list(NAMES.values()), "Fréchet distance": distances}))


def run(args: Namespace) -> None:
    """`python -m eval frechet`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance, args.device)))
