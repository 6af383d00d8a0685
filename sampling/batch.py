"""Batches of pictures: which are drawn together, one prompt and one seed for each, and a check that the result is finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sampling.request import check_seed

BATCH, AREA = 16, 64 * 64  # most pictures, and most latents, of a batch; AREA is one picture of 512 x 512


def groups(seed: int, num: int, latents: int) -> list[range]:
    """The seeds seed, seed + 1, ... of `num` pictures with `latents` latents each, in batches."""
    many, seeds = max(1, min(BATCH, AREA // max(1, latents))), range(seed, seed + num)
    return [seeds[first : first + many] for first in range(0, num, many)]


def rows_of(
    prompts: str | Sequence[str], seeds: int | Sequence[int], negatives: str | Sequence[str]
) -> tuple[list[str], list[int], list[str]]:
    """Prompts, seeds and negative prompts, one for each picture. Raises ValueError when their numbers differ."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
    if not prompts or not len(prompts) == len(seeds) == len(negatives):
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(negatives)} negative prompts: give one of each for a picture"
        )
    for seed in seeds:
        check_seed(seed)
    return prompts, seeds, negatives


def check_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x`. Raises ValueError if it is not finite, since such values would be drawn black. `dtype` is that of the networks."""
    if x.isfinite().all():
        return x
    cure = "use --dtype bfloat16 or float32" if dtype == torch.float16 else "lower --guidance or --scale"
    raise ValueError(f"the result is not finite in {str(dtype).removeprefix('torch.')}: {cure}")
