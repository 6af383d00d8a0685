"""The UNet against diffusers' UNet2DConditionModel, in float64 with equal random weights."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from peers import (
    SMALL_SD15,
    SMALL_SDXL,
    SMALL_UNETS,
    Pair,
    added_inputs,
    inputs,
    max_error,
    number_of,
    randn,
    unet_pair,
)

from model.context import Context
from model.layers import timestep_embedding
from model.unet import SD15, SD21, SDXL, Residuals, UNet, UNetConfig

SIZES = [(16, 16), (17, 13), (9, 5), (8, 33)]
TOLERANCE = 1e-12  # measured: 3e-14 and less


def skip_shapes(unet: UNet, h: int, w: int, batch: int = 2) -> list[tuple[int, ...]]:
    """Shapes of the skips, counted by hand: stride 2 rounds up."""
    shapes = [(batch, unet.config.channels[0], h, w)]
    for level, channels in enumerate(unet.config.channels):
        shapes += [(batch, channels, h, w)] * unet.config.res_blocks
        if level < len(unet.config.channels) - 1:
            h, w = math.ceil(h / 2), math.ceil(w / 2)
            shapes.append((batch, channels, h, w))
    return shapes


@pytest.mark.parity("diffusers UNet2DConditionModel", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SMALL_UNETS)
def test_equals_diffusers(pair: Pair, name: str, size: tuple[int, int]) -> None:
    config, (peer, ours) = SMALL_UNETS[name][0], (pair(name).peer, pair(name).ours)
    x, t, text = inputs(config, *size)
    theirs, added = added_inputs(config)
    want = peer(x, t, text, added_cond_kwargs=theirs).sample
    assert want.std() > 0.1
    assert max_error(ours(x, t, Context(text, added=added)), want) < TOLERANCE


@pytest.mark.parity("diffusers UNet2DConditionModel, float32", "4 times the peer's own + 1e-06")
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_float32_is_as_close_to_the_truth_as_diffusers(name: str) -> None:
    """Peaky weights amplify rounding, so the judge is the float64 answer and the peer's own distance from it."""
    both = unet_pair(*SMALL_UNETS[name], seed=5)
    config = SMALL_UNETS[name][0]
    x, t, text = inputs(config, 17, 13)
    theirs, added = added_inputs(config)
    truth = both.ours(x, t, Context(text, added=added))
    ours = both.ours.float()(x.float(), t, Context(text.float(), added=None if added is None else added.float()))
    peer = both.peer.float()(
        x.float(), t, text.float(), added_cond_kwargs={k: v.float() for k, v in theirs.items()}
    ).sample
    assert ours.dtype == torch.float32
    assert max_error(ours.double(), truth) < 4 * max_error(peer.double(), truth) + 1e-6


@pytest.mark.parity("diffusers get_timestep_embedding", 0)
@pytest.mark.parametrize("dim", [8, 320])
def test_timestep_embedding_is_diffusers(dim: int) -> None:
    t = torch.tensor([0, 1, 500, 999])
    ours = timestep_embedding(t, dim)
    assert torch.equal(ours, get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0))
    assert torch.equal(ours[0], torch.cat([torch.ones(dim // 2), torch.zeros(dim // 2)]))  # cosines first


def test_one_timestep_for_a_batch(pair: Pair) -> None:
    ours = pair("sd15").ours
    x, _, text = inputs(SMALL_SD15, 9, 5)
    assert torch.equal(ours(x, 500, Context(text)), ours(x, torch.tensor([500, 500]), Context(text)))


def test_pictures_of_a_batch_do_not_meet(pair: Pair) -> None:
    ours = pair("sd21").ours
    x, t, text = inputs(ours.config, 9, 5)
    alone = torch.cat([ours(x[i : i + 1], t[i : i + 1], Context(text[i : i + 1])) for i in range(2)])
    assert max_error(ours(x, t, Context(text)), alone) < TOLERANCE


@pytest.mark.parity("diffusers UNet2DConditionModel with ControlNet's residuals", TOLERANCE)
@pytest.mark.parametrize("size", [(16, 16), (17, 13)])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_controlnet_residuals_equal_diffusers(pair: Pair, name: str, size: tuple[int, int]) -> None:
    config, (peer, ours) = SMALL_UNETS[name][0], (pair(name).peer, pair(name).ours)
    x, t, text = inputs(config, *size)
    theirs, added = added_inputs(config)
    skips = [randn(*shape, seed=10 + i) for i, shape in enumerate(skip_shapes(ours, *size))]
    mid = randn(*skips[-1].shape, seed=9)
    want = peer(
        x, t, text, added_cond_kwargs=theirs, down_block_additional_residuals=skips, mid_block_additional_residual=mid
    ).sample
    got = ours(x, t, Context(text, added=added), Residuals(skips, mid))
    assert max_error(got, want) < TOLERANCE
    assert max_error(got, ours(x, t, Context(text, added=added))) > 0.1


@pytest.mark.parity("diffusers UNet2DConditionModel with T2I-Adapter's residuals", TOLERANCE)
@pytest.mark.parametrize("size", [(16, 16), (17, 13)])
def test_t2i_residuals_equal_diffusers(pair: Pair, size: tuple[int, int]) -> None:
    """diffusers adds one feature a level after the level's last block, before it is kept as a skip: our stages 2, 5, 8, 11."""
    peer, ours = pair("sd15").peer, pair("sd15").ours
    x, t, text = inputs(SMALL_SD15, *size)
    shapes = skip_shapes(ours, *size)
    hidden = {i: randn(*shapes[i], seed=i) for i in (2, 5, 8, 11)}
    want = peer(x, t, text, down_intrablock_additional_residuals=list(hidden.values())).sample
    got = ours(x, t, Context(text), Residuals(hidden=hidden))
    assert max_error(got, want) < TOLERANCE
    assert max_error(got, ours(x, t, Context(text))) > 0.1


def test_zero_residuals_change_no_bit(pair: Pair) -> None:
    ours = pair("sd15").ours
    x, t, text = inputs(SMALL_SD15, 17, 13)
    zeros = [torch.zeros(shape, dtype=x.dtype) for shape in skip_shapes(ours, 17, 13)]
    assert len(zeros) == 12
    residuals = Residuals(zeros, zeros[-1], dict(enumerate(zeros)))
    assert torch.equal(ours(x, t, Context(text), residuals), ours(x, t, Context(text)))


@pytest.mark.parametrize("count", [1, 11, 13])
def test_wrong_number_of_residuals_raises(pair: Pair, count: int) -> None:
    x, t, text = inputs(SMALL_SD15, 8, 8)
    with pytest.raises(ValueError, match=f"12 skips, but the residuals are for {count}"):
        pair("sd15").ours(x, t, Context(text), Residuals([torch.zeros(1)] * count))


def test_missing_added_vector_raises(pair: Pair) -> None:
    x, t, text = inputs(SMALL_SDXL, 8, 8)
    with pytest.raises(ValueError, match=f"b x {SMALL_SDXL.added_dim}"):
        pair("sdxl").ours(x, t, Context(text))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_layers_are_numbered_in_execution_order(pair: Pair, name: str) -> None:
    ours, seen = pair(name).ours, []
    hooks = [
        layer.register_forward_hook(lambda module, *_: seen.append(module.layer)) for layer in ours.cross_attentions()
    ]
    x, t, text = inputs(ours.config, 8, 8)
    ours(x, t, Context(text, added=added_inputs(ours.config)[1]))
    for hook in hooks:
        hook.remove()
    assert seen == list(range(len(hooks)))


@pytest.mark.parametrize(
    ("config", "parameters", "keys", "cross"),
    [(SD15, 859_520_964, 686, 16), (SD21, 865_910_724, 686, 16), (SDXL, 2_567_463_684, 1680, 70)],
)
def test_official_sizes(config: UNetConfig, parameters: int, keys: int, cross: int) -> None:
    with torch.device("meta"):
        unet = UNet(config)
    assert number_of(unet) == (parameters, keys)
    assert len(unet.cross_attentions()) == cross
