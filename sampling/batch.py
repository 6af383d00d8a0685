"""Split pictures into batches, check that there is one prompt and one seed per picture, and check that results are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sampling.fields import check_seed

BATCH, AREA = 16, 64 * 64  # largest numbers of pictures and of latent positions in a batch; AREA is one 512 x 512 picture


def groups(seed: int, num: int, latents: int) -> list[range]:
    """Split the seeds seed, seed + 1, ... of `num` pictures into batches. `latents`: number of latent positions per picture."""
    many, seeds = max(1, min(BATCH, AREA // max(1, latents))), range(seed, seed + num)
    return [seeds[first : first + many] for first in range(0, num, many)]


def rows_of(
    prompts: str | Sequence[str], seeds: int | Sequence[int], negatives: str | Sequence[str]
) -> tuple[list[str], list[int], list[str]]:
    """Return prompts, seeds and negative prompts, one per picture. Raises ValueError if their numbers differ."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
    if not prompts or not len(prompts) == len(seeds) == len(negatives):
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(negatives)} negative prompts: give one of each per picture"
        )
    for seed in seeds:
        check_seed(seed)
    return prompts, seeds, negatives


def check_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x`. Raises ValueError if it is not finite; such values would become black pixels. `dtype`: dtype of the networks."""
    if x.isfinite().all():
        return x
    cure = "use --dtype bfloat16 or float32" if dtype == torch.float16 else "lower --guidance or --scale"
    raise ValueError(f"the result is not finite in {str(dtype).removeprefix('torch.')}: {cure}")
