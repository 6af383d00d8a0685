"""The autoencoder against diffusers' AutoencoderKL, in float64 with equal random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import max_error, number_of, randn, randomise, vae_pair

from model.vae import MINI_VAE, SD_VAE, VAE, VAEConfig

THREE = VAEConfig(channels=(8, 16, 24, 24), groups=4)
TWO = VAEConfig(channels=(8, 12), res_blocks=1, latent_channels=3, groups=2, scale=0.5)
TOLERANCE = 1e-12  # measured: 7e-15 and less


@pytest.fixture(scope="module", params=[THREE, TWO], ids=["four_levels", "two_levels"])
def both(request: pytest.FixtureRequest) -> tuple[Any, VAE]:
    return vae_pair(request.param)


@pytest.mark.parity("diffusers AutoencoderKL", TOLERANCE)
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (33, 19)])
def test_encode_equals_diffusers(both: tuple[Any, VAE], size: tuple[int, int]) -> None:
    peer, ours = both
    x = randn(2, 3, *size).clamp(-1, 1)
    want = peer.encode(x).latent_dist
    mean, logvar = ours.moments(x)
    assert max_error(mean, want.mean) < TOLERANCE
    assert max_error(logvar, want.logvar) < TOLERANCE
    assert max_error(ours.encode(x), want.mean * peer.config.scaling_factor) < TOLERANCE


@pytest.mark.parity("diffusers AutoencoderKL", TOLERANCE)
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 7)])
def test_decode_equals_diffusers(both: tuple[Any, VAE], size: tuple[int, int]) -> None:
    peer, ours = both
    z = randn(2, ours.config.latent_channels, *size)
    picture = ours.decode(z)
    assert picture.shape == (2, 3, *(ours.config.factor * side for side in size))
    assert max_error(picture, peer.decode(z / peer.config.scaling_factor).sample) < TOLERANCE


@pytest.mark.parity("diffusers AutoencoderKL", TOLERANCE)
def test_a_sample_equals_diffusers(both: tuple[Any, VAE]) -> None:
    peer, ours = both
    x = randn(2, 3, 16, 24)
    want = peer.encode(x).latent_dist.sample(torch.Generator().manual_seed(3)) * peer.config.scaling_factor
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    assert max_error(ours.encode(x, noise), want) < TOLERANCE
    assert max_error(ours.encode(x), want) > 1e-3


@pytest.mark.parity("diffusers AutoencoderKL", 0)
@pytest.mark.parametrize(("bias", "limit"), [(-1e3, -30.0), (1e3, 20.0)])
def test_the_log_variance_is_clamped_as_in_diffusers(bias: float, limit: float) -> None:
    peer, ours = vae_pair(TWO)
    for module in (peer, ours):
        module.quant_conv.bias[TWO.latent_channels :] = bias
    x = randn(1, 3, 8, 8)
    logvar = ours.moments(x)[1]
    assert torch.equal(logvar, torch.full_like(logvar, limit))
    assert torch.equal(logvar, peer.encode(x).latent_dist.logvar)


def test_the_scale_cancels() -> None:
    """`decode` divides by the scale and `encode` multiplies by it, so another scale changes the latents but not the picture."""
    x, pictures = randn(1, 3, 8, 8), []
    for scale in (0.18215, 0.13025):
        vae = randomise(VAE(VAEConfig(channels=(8, 8), groups=2, scale=scale)))
        pictures.append(vae.decode(vae.encode(x)))
        assert max_error(vae.encode(x) / scale, vae.moments(x)[0]) < TOLERANCE
    assert max_error(*pictures) < TOLERANCE


def test_official_size() -> None:
    with torch.device("meta"):
        vae = VAE(SD_VAE)
    assert number_of(vae) == (83_653_863, 248)
    assert (SD_VAE.factor, MINI_VAE.factor, SD_VAE.scale) == (8, 4, 0.18215)
