"""Encoding pictures and captions, the null image of each kind of features, and the cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import max_error, randn, vae_pair

from model.features import FINE, GLOBAL
from model.image_encoder import ImageConfig, ImageEncoder, normalise
from model.text_encoder import TextEncoder
from model.vae import VAE, VAEConfig
from train import loss as loss_module
from train.clip import MINI_TEXT
from train.data import OnTheFly
from train.encode import WorldPictures, encode_texts, latents
from train.loss import sample_inputs
from train.world import World, elsewhere

HALF = 1e-3  # latents are stored in half precision; measured: 4e-4 and less


def tiny_encoders() -> tuple[VAE, TextEncoder, ImageEncoder]:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=(8, 8, 8), res_blocks=1, groups=4, scale=0.5))
    text = TextEncoder(replace(MINI_TEXT, width=8, layers=1, heads=2, output_dim=8))
    image = ImageEncoder(ImageConfig(image_size=64, patch=32, width=8, layers=(1,), heads=2, output_dim=12))
    return vae.eval(), text.eval(), image.eval()


def test_captions_are_encoded_once_each_the_empty_one_first() -> None:
    _, text, _ = tiny_encoders()
    captions = ["a fox", "", "an owl", "a fox"]
    texts, _, rows = encode_texts(text, captions)
    assert texts.shape == (3, 77, 8) and rows.tolist() == [1, 0, 2, 1]
    with torch.no_grad():
        torch.testing.assert_close(texts[rows].float(), text(text.tokenize(captions)), atol=5e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):  # a validation
        assert torch.equal(encode_texts(text, captions).tokens, texts)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_pairs_of_the_world_and_their_cache(tmp_path: Path) -> None:
    encoders, cache = tiny_encoders(), tmp_path / "new"  # the folder of a fresh run isn't there yet
    pairs = WorldPictures("val", 3).pairs(*encoders, cache)
    assert pairs.mean.shape == (3, 4, 16, 16) and pairs.features and pairs.features.pictures.shape == (3, 1, 1, 12)
    captions = [World("val")[i].caption for i in range(3)]
    texts, _, rows = encode_texts(encoders[1], captions)
    assert torch.equal(pairs.texts, texts) and torch.equal(pairs.caption, rows)
    prompts = torch.from_numpy(np.stack([elsewhere(World("val")[i]) for i in range(3)])).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(pairs.features.pictures[:, 0, 0].float(), encoders[2](normalise(prompts / 255)), atol=5e-3, rtol=5e-3)
    again = WorldPictures("val", 3).pairs(*encoders, cache)
    assert torch.equal(again.mean, pairs.mean) and again.features
    assert torch.equal(again.features.pictures, pairs.features.pictures)
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".safetensors"] * 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_no_picture_is_a_zero_embedding_or_zero_pixels(tmp_path: Path) -> None:
    """What a dropped picture is: zeros for the base form (section 3.2.3), the features of zero pixels for Plus."""
    encoders, drop = tiny_encoders(), torch.tensor([True, False])
    with torch.no_grad():
        wanted = {GLOBAL: torch.zeros(1, 12), FINE: encoders[2].fine(torch.zeros(1, 3, 64, 64))[0]}
    for reads, null in wanted.items():
        pairs = WorldPictures("val", 2).pairs(*encoders, tmp_path, reads)
        assert pairs.features and torch.equal(pairs.features.null[0, 0], null)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_module, "drops", lambda n, g: (~drop, drop))
            batch = sample_inputs(pairs.at(torch.arange(2)), torch.Generator().manual_seed(0), dropping=True)
        assert torch.equal(batch.image[0, 0], null)
        assert torch.equal(batch.image[1], pairs.features.pictures[1].float())
        assert torch.equal(batch.text[1], pairs.texts[0].float())


@pytest.mark.parity("diffusers AutoencoderKL, stored in half precision", HALF)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_latents_are_those_of_diffusers_times_its_scaling_factor(tmp_path: Path) -> None:
    """The mean and the standard deviation of q(z|x), of five pictures in batches of two."""
    peer, ours = vae_pair(VAEConfig(channels=(8, 12), res_blocks=1, latent_channels=3, groups=2, scale=0.4))
    x = randn(5, 3, 24, 10).clamp(-1, 1)
    mean, std = latents(ours, OnTheFly(lambda i: x[2 * i : 2 * i + 2]), torch.arange(5), tmp_path, "24x10", each=2)
    want, scale = peer.encode(x).latent_dist, peer.config.scaling_factor
    assert max_error(mean.all(), scale * want.mean) < HALF and max_error(std.all(), scale * want.std) < HALF


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_cache_of_other_data_is_not_used(tmp_path: Path) -> None:
    """After the autoencoder is trained again or gets another scale, or the number of pictures changes, the old latents are wrong."""
    vae, text, image = tiny_encoders()
    before = WorldPictures("val", 2).pairs(vae, text, image, tmp_path)
    assert len(WorldPictures("val", 3).pairs(vae, text, image, tmp_path)) == 3
    scaled = copy.deepcopy(vae)
    scaled.config = replace(vae.config, scale=2 * vae.config.scale)
    twice = WorldPictures("val", 2).pairs(scaled, text, image, tmp_path)
    torch.testing.assert_close([twice.mean, twice.std], [2 * before.mean, 2 * before.std])
    with torch.no_grad():
        for weight in vae.parameters():
            weight.mul_(1.5)
    assert not torch.equal(WorldPictures("val", 2).pairs(vae, text, image, tmp_path).mean, before.mean)
