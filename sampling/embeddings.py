"""Image prompts as embeddings: weights of pictures, negative pictures, and files of embeddings.

"The weight of a picture" is three different things in public code. Here each has a name, and `parts` applies it:

- output: Z = A(Q, K, V) + lambda sum_j w_j A(Q, K'_j, V'_j): a softmax for each picture (diffusers, with masks).
- embedding: e'_j = w_j e_j before the projection (ComfyUI_IPAdapter_plus, `IPAdapterEncoder`).
- tokens: c'_j = w_j c_j after the projection (refiners, cubiq/Diffusers_IPAdapter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.files import replacing
from model.context import Context
from model.features import Features
from model.image_projection import Projection
from model.unet import UNetConfig
from sampling.lambdas import Lambda, LayerLambda
from sampling.layer_weights import attention_layers
from sampling.request import Rule

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
AdapterLambda = LayerLambda | Sequence[LayerLambda] | Lambda  # lambda of one adapter: for all its layers, one for each, or as data


@dataclass(frozen=True)
class PictureWeights:
    """A weight for each picture of one prompt, and the rule that says what it multiplies. Without values, all weights are 1."""

    values: tuple[float, ...] = ()
    rule: Rule = "output"

    @property
    def prompts(self) -> int:
        """Return the number of image prompts in the Context: one for each picture with the rule "output", else one."""
        return len(self.values) if self.values and self.rule == "output" else 1


def of_prompts(lambdas: Sequence[AdapterLambda], weights: Sequence[PictureWeights] | None) -> list[AdapterLambda]:
    """Return the lambda of each image prompt of a Context, from the lambda of each adapter."""
    counts = [each.prompts for each in weights or [PictureWeights()] * len(lambdas)]
    return [lam for lam, count in zip(lambdas, counts, strict=True) for _ in range(count)]


@dataclass(frozen=True)
class Part:
    """One image prompt of a Context: features, lambda of each layer, and token weights."""

    features: Features
    lambdas: Sequence[LayerLambda]
    weights: tuple[float, ...] = ()


def parts(features: Features, lam: AdapterLambda, weights: PictureWeights, config: UNetConfig, grid: tuple[int, int]) -> list[Part]:
    """Return the image prompts of one adapter: one in all, or one for each picture with the rule "output".

    `features.null` holds one null image or negative picture for each picture, or one for all. Only the rule "output" also
    weighs these, as in diffusers. `config` and `grid`: as in `Lambda.by_layer`. Raises ValueError if the number of weights or
    negative pictures differs from the number of pictures.
    """
    pictures, negatives = features.pictures.shape[1], features.null.shape[1]
    if negatives not in (1, pictures):
        raise ValueError(f"{negatives} negative images for {pictures} images: give one, or {pictures}")
    if weights.values and len(weights.values) != pictures:
        raise ValueError(f"{len(weights.values)} --image-weight for {pictures} pictures: give each its own, also those in an embedding")
    if weights.values and weights.rule == "output":
        each = features.pictures.split(1, dim=1), features.null.expand(-1, pictures, -1, -1).split(1, dim=1)
        return [
            Part(Features(one, no), lambdas_of(lam, config, grid, weight))
            for one, no, weight in zip(*each, weights.values, strict=True)
        ]
    lambdas = lambdas_of(lam, config, grid)
    if weights.rule == "embedding":
        weighted = weigh_embedding(features.pictures, weights.values)
        return [Part(replace(features, pictures=weighted), lambdas)]
    return [Part(features, lambdas, weights.values)]


def lambdas_of(lam: AdapterLambda, config: UNetConfig, grid: tuple[int, int], weight: float = 1.0) -> list[LayerLambda]:
    """Return lambda of each layer, times `weight`."""
    if isinstance(lam, Lambda):
        return lam.by_layer(config, grid, weight)
    each = list(lam) if isinstance(lam, Sequence) else [lam] * len(attention_layers(config))
    return each if weight == 1 else [weight * one for one in each]


def weigh_embedding(embedding: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute e'_j = w_j e_j of `b k m e`, before the projection: the rule "embedding" of ComfyUI_IPAdapter_plus.

    The LayerNorm at the end of the projection cancels w, except for the effect of the bias and of epsilon. w = 0 is the null image.
    """
    if not weights:
        return embedding
    return embedding * embedding.new_tensor(weights).reshape(-1, 1, 1)


def weigh_tokens(context: Context, weights: Sequence[float]) -> Context:
    """Compute c'_j = w_j c_j for the k pictures of the last image prompt: the rule "tokens" of refiners and cubiq/Diffusers_IPAdapter.

    K' and V' are linear in c, so they are scaled instead. A large w sharpens the softmax and enlarges the values.
    """
    if not weights:
        return context

    def weigh(x: Tensor) -> Tensor:
        each = x.new_tensor(weights).repeat_interleave(x.shape[-2] // len(weights))
        return x * each[:, None]

    sources = tuple(replace(source, k=weigh(source.k), v=weigh(source.v)) for source in context.image[-1])
    return replace(context, image=(*context.image[:-1], sources))


def save_embedding(embedding: Tensor, path: Path | str) -> None:
    """Write the result of `Pipeline.embed` as safetensors, atomically."""
    with replacing(Path(path)) as part:
        save_file({"embedding": embedding.cpu().contiguous()}, part)


def load_embedding(path: Path | str, projection: Projection) -> Tensor:
    """Read a file that `save_embedding` wrote, `1 k m e`, for this projection. Older files store global embeddings as `1 k e`.

    Raises ValueError if it is another kind of file, was made for another adapter, or is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    embedding = tensors.get("embedding")
    if embedding is None or embedding.dtype not in FLOATS or 0 in embedding.shape or embedding.shape[:1] != (1,):
        raise ValueError(f"{path}: holds no image embedding; --save-embedding writes such files")
    shape, embedding = tuple(embedding.shape), embedding[:, :, None] if embedding.ndim == 3 else embedding
    if embedding.ndim != 4 or not projection.reads.accepts(embedding.shape[2]) or embedding.shape[3] != projection.image_dim:
        expected = f"{projection.reads.name}, {projection.reads.per_picture} of width {projection.image_dim} for each picture"
        raise ValueError(f"{path} has shape {shape}, but this adapter reads {expected}: make the embedding with this adapter")
    if not embedding.isfinite().all():
        raise ValueError(f"{path}: not all of its numbers are finite; make it again with --save-embedding")
    return embedding
