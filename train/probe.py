"""Linear probes: measure how well an image embedding predicts concept, background and palette."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.image_encoder import ImageEncoder, normalise
from train.pool import pixels_of, scenes_of
from train.world import Split

FIRST = 10_000_000  # index of the first training scene of the probes


@functools.cache
def probe_data(device: str, train: int = 6000, test: int = 1500) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return (pixels, ground truth, number of training pictures). Training pictures come first, then held-out ones."""
    sets: tuple[tuple[Split, int, int], ...] = (("train", train, FIRST), ("val", test, 0))
    scenes = [scene for each in sets for scene in scenes_of(*each)]
    truth = {
        "concept": torch.tensor([scene.concept for scene in scenes]),
        "background": torch.tensor([scene.background for scene in scenes]),
        "palette": torch.stack([torch.from_numpy(scene.palette).flatten() for scene in scenes]).float(),
    }
    pixels = torch.cat([pixels_of(*each) for each in sets]).to(device)
    return normalise(pixels.float() / 255), {name: values.to(device) for name, values in truth.items()}, train


def classify(x: Tensor, y: Tensor, train: int) -> float:
    """Fit multinomial logistic regression on the first `train` rows; return the accuracy on the rest."""
    linear = nn.Linear(x.shape[1], int(y.max()) + 1, device=x.device)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x[:train]), y[:train]) + 1e-4 * linear.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float((linear(x[train:]).argmax(dim=1) == y[train:]).float().mean())


def regress(x: Tensor, y: Tensor, train: int, ridge: float = 1.0) -> float:
    """Fit ridge regression on the first `train` rows; return R^2 on the rest, averaged over columns."""
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).double()
    w = torch.linalg.solve(x[:train].T @ x[:train] + ridge * torch.eye(x.shape[1]).to(x), x[:train].T @ y[:train].double())
    residual, total = (
        (x[train:] @ w - y[train:]).square().sum(dim=0),
        (y[train:] - y[train:].mean(dim=0)).square().sum(dim=0),
    )
    return float((1 - residual / total).mean())


@torch.no_grad()
def probe(image: ImageEncoder) -> dict[str, float]:
    """Fit linear probes on the pooled embedding; return their scores on held-out pictures."""
    image.eval()
    pixels, truth, train = probe_data(str(next(image.parameters()).device))
    x = torch.cat([image(part.contiguous(memory_format=torch.channels_last)) for part in pixels.split(250)])
    image.train()
    x = (x - x[:train].mean(dim=0)) / x[:train].std(dim=0)
    return {
        "concept": classify(x, truth["concept"], train),
        "background": classify(x, truth["background"], train),
        "palette_r2": regress(x, truth["palette"], train),
    }
