"""The VAE in strips against the whole, ours and diffusers', and what tiles would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import max_error, randn, vae_pair
from tiny import difference, draw
from torch.overrides import TorchFunctionMode

from model.layers import Downsample
from model.vae import VAE, VAEConfig
from sampling import strips
from sampling.loading import load
from sampling.strips import in_strips

SMALL_SD = VAEConfig(channels=(8, 16, 24, 24), groups=4)
ONE = VAEConfig(channels=(8, 12), res_blocks=1, latent_channels=3, groups=2, scale=0.5)
TOLERANCE = 1e-12  # measured: 6e-15
STRIPS = [1, 2_000, 9_000]  # numbers: two rows at a time, some, all


@pytest.fixture(scope="module", params=[SMALL_SD, ONE], ids=["small_sd", "two_levels"])
def both(request: pytest.FixtureRequest) -> tuple[Any, VAE]:
    return vae_pair(request.param)


@pytest.mark.parity("diffusers AutoencoderKL, whole", TOLERANCE)
@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("size", [(9, 5), (4, 13)])
def test_strips_equal_the_whole(monkeypatch: pytest.MonkeyPatch, both: tuple[Any, VAE], strip: int, size: tuple[int, int]) -> None:
    monkeypatch.setattr(strips, "AREA", 8)
    monkeypatch.setattr(strips, "STRIP", strip)
    (peer, ours), sparing = both, in_strips(both[1])
    z = randn(2, ours.config.latent_channels, *size)
    want = peer.decode(z / peer.config.scaling_factor).sample
    assert max_error(sparing.decode(z), want) < TOLERANCE
    for odd in (0, 3):  # more rows and columns than the factor divides
        x = randn(2, 3, *(side * ours.config.factor + odd for side in size), seed=odd)
        assert max_error(sparing.moments(x)[0], peer.encode(x).latent_dist.mean) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_no_worse(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(strips, "AREA", 8)
    monkeypatch.setattr(strips, "STRIP", 2_000)
    _, ours = vae_pair(SMALL_SD)
    z = randn(1, 4, 12, 10)
    exact, ours = ours.decode(z), ours.to(dtype)
    errors = [max_error(vae.decode(z.to(dtype)).double(), exact) for vae in (in_strips(ours), ours)]
    assert errors[0] < 1.5 * errors[1]


def test_tiles_would_change_the_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained VAE: strips are the whole within a thousandth of a grey level. diffusers' way, feathered tiles, is far from it."""
    monkeypatch.setattr(strips, "AREA", 8)
    monkeypatch.setattr(strips, "STRIP", 50_000)
    vae = load().vae
    side, tile, overlap = 28, 16, 4
    coarse = torch.nn.functional.interpolate(randn(1, 3, 7, 7, dtype=torch.float32).clamp(-1, 1), size=4 * side, mode="bicubic")
    z = vae.encode(coarse)
    whole, pictures = vae.decode(z), torch.zeros(1, 3, 4 * side, 4 * side)
    assert 127.5 * max_error(in_strips(vae).decode(z), whole) < 1e-3
    weights = torch.zeros_like(pictures)
    for top in range(0, side - overlap, tile - overlap):
        for left in range(0, side - overlap, tile - overlap):
            part = vae.decode(z[..., top : top + tile, left : left + tile])
            ramps = [torch.arange(1, n + 1).minimum(torch.arange(n, 0, -1)).clamp(max=4 * overlap) for n in part.shape[-2:]]
            where = (..., slice(4 * top, 4 * (top + tile)), slice(4 * left, 4 * (left + tile)))
            feather = ramps[0][:, None] * ramps[1]
            pictures[where] += feather * part
            weights[where] += feather
    assert 127.5 * max_error(pictures / weights, whole) > 5


class Largest(TorchFunctionMode):
    """Note the largest tensor that goes into a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            self.numbers = max(self.numbers, args[0].numel())
        return func(*args, **(kwargs or {}))


def test_convolutions_read_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """None reads more than a strip and the few rows beside it, unless its map has the size of the latents."""
    vae = vae_pair(SMALL_SD)[1].float()
    z, sparing = randn(1, 4, 40, 3, dtype=torch.float32), in_strips(vae)
    monkeypatch.setattr(strips, "AREA", 8)
    monkeypatch.setattr(strips, "STRIP", latents := 24 * z[0, 0].numel())
    x = torch.zeros(1, 3, 8 * 40, 8 * 3)
    for run, given in ((sparing.decode, z), (sparing.encode, x)):
        with Largest() as seen:
            run(given)
        with Largest() as whole:
            getattr(vae, run.__name__)(given)
        assert seen.numbers <= 2 * latents < 4 * latents <= whole.numbers


def test_small_pictures_are_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = vae_pair(ONE)[1].float()
    sparing = in_strips(vae)
    assert sparing.state_dict().keys() == vae.state_dict().keys() and not sparing.training
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(sparing.parameters(), vae.parameters(), strict=True))
    monkeypatch.setattr(strips, "over_strips", lambda *_, **__: pytest.fail("in strips"))
    z = randn(1, 3, 64, 64, dtype=torch.float32)
    picture = sparing.decode(z)
    assert torch.equal(picture, vae.decode(z)) and sparing.encode(picture).shape == z.shape
    with pytest.raises(pytest.fail.Exception, match="in strips"):
        sparing.decode(torch.cat([z, z]))
    assert sum(isinstance(block, Downsample) for block in sparing.encoder.down) == 1


def test_the_command_line(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "AREA", 16)
    monkeypatch.setattr(strips, "STRIP", 1_000)
    first = tmp_path / "first.png"
    options = ("--prompt", "a fox", "--width", "48", "--height", "32", "--seed", "3")
    want = draw(weights, first, *options)
    assert difference(draw(weights, tmp_path / "a.png", *options, "--low-memory"), want) <= 1
    edit = ("--prompt", "an owl", "--init-image", first, "--strength", "0.7")
    assert difference(draw(weights, tmp_path / "b.png", *edit, "--low-memory"), draw(weights, tmp_path / "c.png", *edit)) <= 1
