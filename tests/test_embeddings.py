"""Weights of pictures, negative pictures, and a picture for each prompt, against diffusers and by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_peers import IMAGE
from diffusers import StableDiffusionPipeline
from peers import SMALL_UNETS, UNetPair, max_error, randn
from test_lambdas import with_adapter
from torch import Tensor

from model.features import Features
from model.image_projection import ImageProjection
from model.unet import SD15
from sampling.embeddings import PictureWeights, parts, weigh_embedding
from sampling.guidance import guided
from sampling.lambdas import Lambda, moving
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule

TOLERANCE = 1e-12


class Text:
    """A text encoder of one token a text, its length, that reads it as random states."""

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([[len(text)] for text in texts])

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.stack([randn(5, SMALL_UNETS["sd15"][0].context_dim, seed=int(t)) for t in tokens])


PROMPTS, NEGATIVES = ["a fox", "two owls"], ["", "bad"]


@pytest.fixture(scope="module")
def world() -> tuple[UNetPair, Pipeline]:
    both, adapter = with_adapter("sd15")
    return both, Pipeline(both.ours, None, Text(), Schedule(), None, (adapter,))  # type: ignore[arg-type]


def peer_guided(both: UNetPair, x: Tensor, embeds: Tensor, scale: Any, w: float, **masks: Any) -> Tensor:
    """diffusers' guidance of [uncond, cond] rows, `embeds` as its `ip_adapter_image_embeds`: negative half first."""
    for processor in both.peer.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    prepare = StableDiffusionPipeline.prepare_ip_adapter_image_embeds
    rows = prepare(SimpleNamespace(), None, [embeds], "cpu", 1, True)
    text = Text()(Text().tokenize([*NEGATIVES, *PROMPTS]))
    extra = {"cross_attention_kwargs": masks} if masks else {}
    eps = both.peer(torch.cat([x, x]), 500, text, added_cond_kwargs={"image_embeds": rows}, **extra).sample
    uncond, cond = eps.chunk(2)
    return uncond + w * (cond - uncond)


@pytest.mark.parity("diffusers ip_adapter_image_embeds", TOLERANCE)
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_negative_image_and_one_for_each_prompt_equal_diffusers(world: Any, pictures: int) -> None:
    """A different picture for each prompt of the batch, `b k e`; what is negative is the first half of the embeds."""
    both, pipe = world
    x, each, against = randn(2, 4, 9, 7, seed=1), randn(2, pictures, IMAGE, seed=2), randn(1, 1, IMAGE, seed=3)
    halves = torch.cat([against.expand(2, pictures, -1), each])
    each, against = each[:, :, None], against[:, :, None]
    contexts = pipe.contexts(PROMPTS, NEGATIVES, each, 0.7, against=[against])
    got = guided(pipe.unet, *contexts, 4.0)(x, 500)
    assert max_error(got, peer_guided(both, x, halves, 0.7, 4.0)) < TOLERANCE
    null = guided(pipe.unet, *pipe.contexts(PROMPTS, NEGATIVES, each, 0.7), 4.0)(x, 500)
    assert max_error(null, peer_guided(both, x, torch.cat([0 * each, each]).squeeze(2), 0.7, 4.0)) < TOLERANCE
    assert max_error(got, null) > 1e-3
    for i in range(2):
        alone = pipe.contexts(PROMPTS[i : i + 1], NEGATIVES[i : i + 1], each[i : i + 1], 0.7, against=[against])
        assert max_error(guided(pipe.unet, *alone, 4.0)(x[i : i + 1], 500), got[i : i + 1]) < TOLERANCE


@pytest.mark.parity("diffusers set_ip_adapter_scale with masks", TOLERANCE)
@pytest.mark.parametrize("negative", [0, 1, 2])
def test_weights_on_the_output_equal_diffusers(world: Any, negative: int) -> None:
    """diffusers weighs pictures where each has a mask: all ones are no mask, but a softmax for each picture."""
    both, pipe = world
    x, pictures = randn(2, 4, 8, 8, seed=1), randn(1, 2, 1, IMAGE, seed=2)
    against = randn(1, negative, 1, IMAGE, seed=3) if negative else None
    null = torch.zeros(1, 1, 1, IMAGE).double() if against is None else against
    halves = torch.cat([null.expand(2, 2, -1, -1), pictures.expand(2, -1, -1, -1)]).squeeze(2)
    lam, weights = Lambda(0.7), [PictureWeights((0.3, 1.5))]
    contexts = pipe.contexts(PROMPTS, NEGATIVES, pictures, lam, against=[against], weights=weights)
    ones = [torch.ones(1, 2, 64, 64, dtype=torch.float64)]
    want = peer_guided(both, x, halves, [0.7 * 0.3, 0.7 * 1.5], 4.0, ip_adapter_masks=ones)
    assert max_error(guided(pipe.unet, *contexts, 4.0)(x, 500), want) < TOLERANCE
    # and with a range: the same while it is on, the text alone after
    move = moving([replace(lam, end=0.5)] * 2, [500, 1])
    denoise = guided(pipe.unet, *contexts, 4.0, None, move)
    assert max_error(denoise(x, 500), want) < TOLERANCE
    assert max_error(denoise(x, 1), guided(pipe.unet, *pipe.contexts(PROMPTS, NEGATIVES), 4.0)(x, 1)) < TOLERANCE


def sources(pipe: Pipeline, pictures: Tensor, *weights: PictureWeights) -> tuple[Any, Any]:
    uncond, cond = pipe.contexts(PROMPTS[:1], NEGATIVES[:1], pictures, weights=weights or None)
    return uncond.image[0], cond.image[0]


def test_weights_on_the_embedding(world: Any) -> None:
    """w e before the projection; the null image stays, and weight 0 is one."""
    pipe, pictures, weights = world[1], randn(1, 2, 1, IMAGE, seed=2), (0.3, 0.0)
    uncond, cond = sources(pipe, pictures, PictureWeights(weights, "embedding"))
    _, want = sources(pipe, torch.stack([0.3 * pictures[:, 0], 0 * pictures[:, 1]], dim=1))
    null, _ = sources(pipe, pictures)
    for got, expected in ((cond, want), (uncond, null)):
        assert all(torch.equal(a.k, b.k) and torch.equal(a.v, b.v) for a, b in zip(got, expected, strict=True))
    assert torch.equal(cond[0].k[:, :, 4:], null[0].k[:, :, 4:])


def test_weights_on_the_embedding_are_undone_by_a_layer_norm() -> None:
    """Without a bias LayerNorm(w W e) is LayerNorm(W e), but for epsilon."""
    projection = ImageProjection(IMAGE, 12).double()
    projection.proj.bias.data.zero_()
    e = 50 * randn(1, 1, 1, IMAGE)
    error = max_error(projection(weigh_embedding(e, (0.3,))[0]), projection(e[0]))
    assert error < 1e-4 < max_error(projection(e[0]), projection(0 * e[0]))


def test_weights_on_the_tokens(world: Any) -> None:
    """K' and V' of w c, with c from the projection; the unconditional side is not weighed."""
    pipe, pictures, weights = world[1], randn(1, 2, 1, IMAGE, seed=2), (0.3, 1.5)
    (adapter,) = pipe.adapters
    uncond, cond = sources(pipe, pictures, PictureWeights(weights, "tokens"))
    tokens = torch.cat([w * adapter.tokens(pictures[:, j : j + 1]) for j, w in enumerate(weights)], dim=1)
    for source, (to_k, to_v), heads in zip(cond, adapter.projections(), adapter.heads, strict=True):
        for got, projected in ((source.k, to_k(tokens)), (source.v, to_v(tokens))):
            want = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
            assert max_error(got, want) < TOLERANCE
    null, _ = sources(pipe, pictures)
    assert all(torch.equal(a.k, b.k) for a, b in zip(uncond, null, strict=True))


def test_pictures_and_weights_that_do_not_fit_are_refused(world: Any) -> None:
    pipe, pictures = world[1], randn(1, 3, 1, IMAGE)
    with pytest.raises(ValueError, match="2 --image-weight for 3 pictures"):
        pipe.contexts(PROMPTS, NEGATIVES, pictures, weights=[PictureWeights((1.0, 2.0))])
    with pytest.raises(ValueError, match="2 negative images for 3 images"):
        pipe.contexts(PROMPTS, NEGATIVES, pictures, against=[pictures[:, :2]])
    weights = PictureWeights((1.0, 2.0, 3.0))
    each = parts(Features(pictures, randn(1, 1, 1, IMAGE)), 0.5, weights, SD15, (8, 8))
    assert [part.lambdas for part in each] == [[0.5 * weight] * 16 for weight in weights.values]
