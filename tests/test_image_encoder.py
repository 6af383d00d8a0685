"""The image encoder against transformers' CLIPVisionModelWithProjection, and preprocessing against its processor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peers import max_error, number_of, randn, randomise, vision_pair
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.image_encoder import (
    MEAN,
    MINI_IMAGE,
    STD,
    VIT_BIGG,
    VIT_H,
    VIT_L,
    ImageConfig,
    ImageEncoder,
    centre_square,
    normalise,
    padded_square,
)

TOLERANCE = 1e-12  # measured: 2e-14 and less
FLOAT32 = 1e-6  # measured: 0; one grey level would be 1.5e-2
LEVEL = 1
GREY = 1 / 255 / min(STD)  # one grey level, normalised
SMALL_VIT = ImageConfig(image_size=32, patch=8, width=24, layers=(3,), heads=3, mlp_ratio=3.0, output_dim=10)


def photo(width: int, height: int) -> Image.Image:
    """Noise over a slope: every pixel matters."""
    rng = np.random.default_rng(width * height)
    slope = np.linspace(0, 155, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((slope + rng.integers(0, 100, (height, width, 3))).astype(np.uint8))


@pytest.mark.parity("transformers CLIPVisionModelWithProjection", TOLERANCE)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_equal_transformers(activation: Any) -> None:
    """The embedding is not normalised; fine features are the penultimate layer's, class token first, without the last norm."""
    peer, ours = vision_pair(replace(SMALL_VIT, activation=activation))
    pixels = randn(2, 3, 32, 32)
    want = peer(pixels, output_hidden_states=True)
    assert max_error(ours(pixels), want.image_embeds) < TOLERANCE
    assert max_error(ours.fine(pixels), want.hidden_states[-2]) < TOLERANCE
    assert (ours(pixels).norm(dim=-1) - 1).abs().min() > 0.1
    assert ours.fine(pixels).shape == (2, 17, ours.config.fine_dim)


@pytest.mark.parametrize(("stem_pool", "side"), [(True, 2), (False, 4)])
def test_resnet_features(stem_pool: bool, side: int) -> None:
    """Fine features are the cells of the last feature map, row by row, plus the position embeddings of CLIP's attention pooling.
    In that pooling, the query is the mean of the cells; the keys and values are the mean and the cells."""
    ours = randomise(
        ImageEncoder(
            ImageConfig("resnet", 64, width=8, layers=(1, 1, 1, 1), heads=4, output_dim=10, stem_pool=stem_pool)
        )
    )
    seen: list[torch.Tensor] = []
    ours.clip.layer4.register_forward_hook(lambda _, __, out: seen.append(out))
    pixels = randn(2, 3, 64, 64)
    embedding, fine = ours(pixels), ours.fine(pixels)
    pool = ours.clip.attnpool
    grid = torch.stack([seen[0][:, :, i, j] for i in range(side) for j in range(side)], dim=1)
    assert torch.equal(fine, grid + pool.positional_embedding[1:])
    assert fine.shape == (2, side**2, ours.config.fine_dim)
    tokens = torch.cat([grid.mean(1, keepdim=True) + pool.positional_embedding[0], fine], dim=1)
    q, k, v = (
        proj(x).unflatten(-1, (4, -1))
        for proj, x in ((pool.q_proj, tokens[:, 0]), (pool.k_proj, tokens), (pool.v_proj, tokens))
    )
    weights = (torch.einsum("bhd,bmhd->bhm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    want = pool.c_proj(torch.einsum("bhm,bmhd->bhd", weights, v).flatten(1))
    assert max_error(embedding, want) < TOLERANCE


@pytest.mark.parity("transformers CLIPImageProcessorPil, float32", FLOAT32)
@pytest.mark.parametrize("size", [(633, 450), (450, 633), (65, 224), (17, 900), (224, 224), (301, 300)])
@pytest.mark.parametrize("side", [224, 64])
def test_preprocess_equals_transformers(size: tuple[int, int], side: int) -> None:
    picture = photo(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    want = processor(picture, return_tensors="pt")["pixel_values"][0]
    got = encoder(side).preprocess(picture)
    assert got.dtype == torch.float32
    assert max_error(got, want) < FLOAT32


def encoder(side: int) -> ImageEncoder:
    with torch.device("meta"):
        return ImageEncoder(ImageConfig(kind="resnet", image_size=side, width=8, layers=(1, 1, 1, 1), heads=4))


def test_squash_keeps_all_pixels_but_not_the_aspect_ratio() -> None:
    picture = photo(90, 40)
    want = normalise(
        torch.from_numpy(np.array(picture.resize((64, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1).float() / 255
    )
    assert torch.equal(encoder(64).preprocess(picture, "squash"), want)


@pytest.mark.parametrize("wide", [True, False])
def test_pad_keeps_the_aspect_ratio_and_adds_bars_of_the_mean(wide: bool) -> None:
    """The mean colour is 0 after normalisation, so the bars carry no information."""
    picture = Image.new("RGB", (128, 64) if wide else (64, 128), "white")
    pixels = encoder(64).preprocess(picture, "pad")
    pixels = pixels if wide else pixels.mT
    assert pixels.shape == (3, 64, 64)
    bars, middle = torch.cat([pixels[:, :14], pixels[:, -14:]], dim=1), pixels[:, 18:46]
    assert bars.abs().max() < GREY
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert max_error(middle, white[:, None, None].expand_as(middle)) < GREY


def test_fits_agree_on_a_square() -> None:
    crop, squash, pad = (encoder(64).preprocess(photo(100, 100), fit) for fit in ("crop", "squash", "pad"))
    assert torch.equal(crop, squash) and torch.equal(crop, pad)


@pytest.mark.parity("pillow paste, resize", 0)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (200, 60), (61, 203), (300, 1), (2, 130)])
def test_padding_row_by_row_is_padding_first(size: tuple[int, int]) -> None:
    """The results are equal bit for bit. The reference pastes into a full square and resizes it with Pillow."""
    picture, side = photo(*size), max(size)
    square = Image.new("RGB", (side, side), tuple(round(255 * m) for m in MEAN))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    want = square.resize((64, 64), Image.Resampling.BICUBIC)
    assert padded_square(picture, 64).tobytes() == want.tobytes()


@pytest.mark.parity("pillow resize, crop, in levels of 255", LEVEL)
@pytest.mark.parametrize("size", [(2570, 10), (2571, 10), (5, 1777), (640, 1), (1, 641), (520, 2)])
def test_a_strip_is_cut_where_resizing_it_whole_would_cut(size: tuple[int, int]) -> None:
    picture, short = photo(*size), min(size)
    whole = picture.resize((20 * size[0] // short, 20 * size[1] // short), Image.Resampling.BICUBIC)
    left, top = (whole.width - 20) // 2, (whole.height - 20) // 2
    want = whole.crop((left, top, left + 20, top + 20))
    drawn = centre_square(picture, 20, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(want).astype(int)).max() <= LEVEL


def test_strips_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No intermediate picture is larger than 64 MB. Resizing or padding 60000 x 1 as a whole would take 12 GB."""
    made, new, resize = [], Image.new, Image.Image.resize

    def watch(make: Any) -> Any:
        def watched(*args: Any, **options: Any) -> Image.Image:
            size = args[1]  # of Image.new(mode, size), and of resize(image, size)
            made.append(3 * size[0] * size[1])
            assert made[-1] < 1 << 26
            return make(*args, **options)

        return watched

    monkeypatch.setattr(Image, "new", watch(new))
    monkeypatch.setattr(Image.Image, "resize", watch(resize))
    for size in ((6000, 1), (60000, 1), (1, 60000), (30000, 7)):
        for fit in ("crop", "squash", "pad"):
            assert encoder(224).preprocess(Image.new("RGB", size), fit).shape == (3, 224, 224)
    assert len(made) > 12


def test_normalise_is_the_processors() -> None:
    processor = CLIPImageProcessorPil()
    assert tuple(processor.image_mean) == MEAN and tuple(processor.image_std) == STD
    rgb = randn(2, 3, 4, 5).sigmoid()
    want = torch.stack([(rgb[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    assert max_error(normalise(rgb), want) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "parameters"), [(VIT_H, 632_076_800), (VIT_BIGG, 1_844_907_264), (VIT_L, 303_966_208)]
)
def test_official_sizes(config: ImageConfig, parameters: int) -> None:
    with torch.device("meta"):
        assert number_of(ImageEncoder(config))[0] == parameters
    assert config.fine_dim == config.width
    assert MINI_IMAGE.fine_dim == 20 * 32
