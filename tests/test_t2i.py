"""T2I-Adapter against diffusers' T2IAdapter, in float64 with equal random weights, alone and in a UNet."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from control_peers import SMALL_T2I, t2i_pair
from peers import SMALL_SD15, SMALL_SDXL, Pair, UNetPair, added_inputs, inputs, max_error, number_of, randn
from torch import Tensor

from model.context import Context
from model.t2i import T2I_LIGHT, T2I_SD15, T2I_SD15_GREY, T2I_SDXL, T2IAdapter, T2IConfig, places, residuals
from model.unet import MINI, SD15, SDXL

SIZES = [(16, 16), (17, 13), (9, 5)]
TOLERANCE = 1e-12  # measured: 3e-14 and less


@cache
def both(name: str) -> tuple[Any, T2IAdapter]:
    return t2i_pair(SMALL_T2I[name])


def hint_for(config: T2IConfig, h: int, w: int) -> Tensor:
    return randn(2, config.hint_channels, config.unshuffle * h, config.unshuffle * w, seed=4).sigmoid()


@pytest.mark.parity("diffusers T2IAdapter", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SMALL_T2I)
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    peer, ours = both(name)
    hint = hint_for(ours.config, *size)
    want, got = peer(hint), ours(hint)
    assert len(got) == len(want) == 4 and min(float(each.std()) for each in want) > 0.01
    assert max(max_error(a, b) for a, b in zip(got, want, strict=True)) < TOLERANCE


@pytest.mark.parity("diffusers T2IAdapter, float32", "2 times the peer's own + 1e-06")
@pytest.mark.parametrize("name", ["full", "light"])
def test_float32_is_as_close_to_the_truth_as_diffusers(name: str) -> None:
    peer, ours = t2i_pair(SMALL_T2I[name], seed=5)
    hint = hint_for(ours.config, 17, 13)
    truth = ours(hint)
    theirs, actual = peer.float()(hint.float()), ours.float()(hint.float())
    own, peers = (max(max_error(a.double(), b) for a, b in zip(each, truth, strict=True)) for each in (actual, theirs))
    assert own < 2 * peers + 1e-6


@pytest.mark.parity("diffusers UNet2DConditionModel with T2IAdapter", TOLERANCE)
@pytest.mark.parametrize("size", [(16, 16), (17, 13)])
@pytest.mark.parametrize(("name", "base"), [("full", "sd15"), ("light", "sd15"), ("xl", "sdxl")])
def test_the_unet_reads_it_as_diffusers_does(pair: Pair, name: str, base: str, size: tuple[int, int]) -> None:
    """Main path and skip both; SDXL's last feature map goes to the middle."""
    (peer, ours), unets = both(name), pair(base)
    config = unets.ours.config
    x, t, text = inputs(config, *size)
    h, w = ((side + 1) // 2 for side in size) if name == "xl" else size
    hint = hint_for(ours.config, h, w)
    want, plain = predictions(unets, x, t, text, peer(hint))
    got = unets.ours(x, t, Context(text, added=added_inputs(config)[1]), residuals(ours(hint), config))
    assert max_error(got, want) < TOLERANCE and max_error(got, plain) > 0.01


def predictions(unets: UNetPair, x: Tensor, t: Tensor, text: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """diffusers' with the feature maps and without. It pops those that it is given."""
    added = added_inputs(unets.ours.config)[0]
    given = ({"down_intrablock_additional_residuals": [each.clone() for each in features]}, {})
    with_it, plain = (unets.peer(x, t, text, added_cond_kwargs=added, **each).sample for each in given)
    return with_it, plain


def test_where_the_feature_maps_go() -> None:
    assert places(SD15) == places(SMALL_SD15) == [2, 5, 8, 11]
    assert places(SDXL) == places(SMALL_SDXL) == [3, 5, 8]
    assert places(MINI) == [1, 3, 5]
    features = [torch.full((1,), float(i)) for i in range(4)]
    actual = residuals(features, SDXL)
    assert actual.mid is features[3] and actual.hidden == dict(zip([3, 5, 8], features, strict=False)) and not actual.skips
    assert residuals(features, SD15).mid is None


@pytest.mark.parametrize(
    ("config", "parameters", "keys"),
    [
        (T2I_SD15, 77_369_280, 38),
        (T2I_SD15_GREY, 77_000_640, 38),
        (T2I_LIGHT, 18_689_200, 80),
        (T2I_SDXL, 79_028_160, 38),
        (T2IConfig(hint_channels=1, unshuffle=16, form="xl"), 77_553_600, 38),
    ],
)
def test_official_sizes(config: T2IConfig, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        assert number_of(T2IAdapter(config)) == (parameters, keys)
    assert config.factor == 8
