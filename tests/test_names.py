"""Each table of names is a bijection, at full size, onto the names in the networks of the other projects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from checkpoints.configs import diffusers_config
from checkpoints.diffusers_folder import text_settings, vision_settings
from checkpoints.names import (
    TRANSPOSED,
    Names,
    Row,
    adapter_names,
    image_names,
    map_names,
    text_names,
    unet_rows,
    vae_rows,
)
from eval.peers.official import peer_autoencoder
from model.adapter import IPAdapter
from model.attention import CrossAttention
from model.image_encoder import VIT_H, ImageEncoder
from model.image_projection import ImageProjection
from model.text_encoder import SD15_TEXT, TextConfig, TextEncoder
from model.unet import SD15, SD21, SDXL, UNet, UNetConfig
from model.vae import SD_VAE, VAE, VAEConfig

UNETS = {"sd15": (SD15, 686), "sd21": (SD21, 686), "sdxl": (SDXL, 1680)}
DIFFUSERS, LDM = 1, 2


def on_meta(module: Callable[..., Any], *arguments: object, **settings: Any) -> Any:
    with torch.device("meta"):
        return module(*arguments, **settings)


def peer_unet(config: UNetConfig) -> Any:
    settings = {k: v for k, v in diffusers_config(config).items() if not k.startswith("_")}
    return on_meta(UNet2DConditionModel, **settings)


def peer_vae(config: VAEConfig) -> Any:
    return on_meta(peer_autoencoder, config)


def check_bijection(ours: nn.Module, names: Names, theirs: nn.Module, count: int) -> None:
    """Check that names map one to one onto those of the peer, and that shapes agree.

    Exceptions are concatenated and transposed tensors, and 1 x 1 convolutions.
    """
    here, there = ours.state_dict(), theirs.state_dict()
    flat = [name for joined in names.values() for name in joined]
    assert names.keys() == here.keys()
    assert len(flat) == count and sorted(flat) == sorted(there)
    for name, joined in names.items():
        shapes = [tuple(there[part].shape) for part in joined]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        shape = shape[::-1] if joined[0] in TRANSPOSED else shape
        wanted = tuple(here[name].shape)
        assert shape in (wanted, (*wanted, 1, 1)), name


@pytest.mark.parity("diffusers UNet2DConditionModel", 0)
@pytest.mark.parametrize("name", UNETS)
def test_the_unet_in_diffusers(name: str) -> None:
    config, count = UNETS[name]
    unet = on_meta(UNet, config)
    check_bijection(unet, map_names(unet.state_dict(), unet_rows(config), DIFFUSERS), peer_unet(config), count)


@pytest.mark.parity("diffusers AutoencoderKL", 0)
def test_the_vae_in_diffusers() -> None:
    vae = on_meta(VAE)
    check_bijection(vae, map_names(vae.state_dict(), vae_rows(SD_VAE), DIFFUSERS), peer_vae(SD_VAE), 248)


def marked(names: Iterable[str], prefix: str) -> dict[str, Any]:
    """Build a checkpoint whose tensors are distinct numbers, so that one can see where a converter puts each of them."""
    return {prefix + name: torch.tensor(i) for i, name in enumerate(names)}


def check_ldm(
    ours: nn.Module, rows: list[Row], convert: Callable[[dict[str, Any]], dict[str, Any]], prefix: str
) -> None:
    """Check that diffusers' converter maps the LDM name of each tensor to the diffusers name in the table."""
    state = ours.state_dict()
    ldm, diffusers = map_names(state, rows, LDM), map_names(state, rows, DIFFUSERS)
    assert ldm.keys() == diffusers.keys() == state.keys()
    assert len({name for (name,) in ldm.values()}) == len(state)
    converted = convert(marked((name for (name,) in ldm.values()), prefix))
    assert {name: int(i) for name, i in converted.items()} == {name: i for i, (name,) in enumerate(diffusers.values())}


@pytest.mark.parity("diffusers convert_ldm_unet_checkpoint", 0)
@pytest.mark.parametrize("name", UNETS)
def test_the_unet_in_a_single_file(name: str) -> None:
    config, _ = UNETS[name]
    settings = diffusers_config(config)
    check_ldm(
        on_meta(UNet, config),
        unet_rows(config),
        lambda file: convert_ldm_unet_checkpoint(file, settings),
        "model.diffusion_model.",
    )


@pytest.mark.parity("diffusers convert_ldm_vae_checkpoint", 0)
def test_the_vae_in_a_single_file() -> None:
    blocks = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    check_ldm(
        on_meta(VAE), vae_rows(SD_VAE), lambda file: convert_ldm_vae_checkpoint(file, blocks), "first_stage_model."
    )


SMALL_UNETS = (
    UNetConfig(channels=(32,), depth=(0,), heads=(8,)),
    UNetConfig(channels=(32, 64), depth=(1, 0), heads=(8, 8), res_blocks=1),
    UNetConfig(channels=(32, 64, 64), depth=(0, 3, 2), mid_depth=2, heads=(8, 4, 4), res_blocks=3, added_dim=10),
)


@pytest.mark.parametrize("config", [SD15, SD21, SDXL, *SMALL_UNETS])
def test_every_row_of_the_unet_is_used(config: UNetConfig) -> None:
    """The only unused rows are `skip` in residual blocks that keep their width, and the added embedding of models other than SDXL."""
    used = {name.rpartition(".")[0] for name in on_meta(UNet, config).state_dict()}
    rows = [row[0] for row in unet_rows(config)]
    left = {re.sub(r"\d+", "N", row) for row in rows if row not in used}
    assert len(set(rows)) == len(rows)
    assert left <= {
        "down.N.res.skip",
        "up.N.res.skip",
        "mid.N.res.skip",
        *([] if config.added_dim else ["added_embed.N"]),
    }
    assert "down.0.res.skip" not in used and "up.0.res.skip" in used


@pytest.mark.parametrize("config", [SD_VAE, VAEConfig(channels=(32,), res_blocks=1), VAEConfig(channels=(32, 64, 96))])
def test_every_row_of_the_vae_is_used(config: VAEConfig) -> None:
    used = {name.rpartition(".")[0] for name in on_meta(VAE, config).state_dict()}
    rows = [row[0] for row in vae_rows(config)]
    assert len(set(rows)) == len(rows)
    assert all(row.endswith(".skip") for row in rows if row not in used)


@pytest.mark.parity("transformers CLIPTextModel, CLIPTextModelWithProjection", 0)
@pytest.mark.parametrize("output_dim", [0, 768], ids=["states", "projection"])
def test_the_text_tower_in_transformers(output_dim: int) -> None:
    """Whether names have the prefix depends on the version of transformers."""
    config = TextConfig(output_dim=output_dim)
    kind = CLIPTextModelWithProjection if output_dim else CLIPTextModel
    peer = on_meta(kind, CLIPTextConfig(**text_settings(config)))
    ours = on_meta(TextEncoder, config)
    prefix = "text_model." if any(name.startswith("text_model.") for name in peer.state_dict()) else ""
    check_bijection(ours, text_names(ours.state_dict(), config, prefix), peer, 197 if output_dim else 196)


def test_the_text_towers_prefix_is_the_only_difference() -> None:
    state = on_meta(TextEncoder, SD15_TEXT).state_dict()
    with_it, without = text_names(state, SD15_TEXT), text_names(state, SD15_TEXT, "")
    assert with_it == {name: tuple(f"text_model.{part}" for part in joined) for name, joined in without.items()}
    assert len({part for joined in with_it.values() for part in joined}) == 196


@pytest.mark.parity("transformers CLIPVisionModelWithProjection", 0)
def test_the_image_tower_in_transformers() -> None:
    ours, sizes = on_meta(ImageEncoder, VIT_H), CLIPVisionConfig(**vision_settings(VIT_H))
    check_bijection(ours, image_names(ours.state_dict(), VIT_H), on_meta(CLIPVisionModelWithProjection, sizes), 520)


def adapter(config: UNetConfig) -> tuple[IPAdapter, UNet]:
    unet = on_meta(UNet, config)
    return on_meta(IPAdapter, unet, on_meta(ImageProjection, 1024, config.context_dim)), unet


def test_the_adapters_keys() -> None:
    """The keys are 1, 3, 5, ... in diffusers' order. The middle, which is layer 6 in execution order, comes last: key 31."""
    ours, unet = adapter(SD15)
    names = adapter_names(ours.state_dict(), unet)
    assert names.keys() == ours.state_dict().keys()
    keys = [
        0,
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        6,
    ]  # what the layer with key 2 i + 1 is when the network runs
    layers = {
        f"to_{x}.{keys[i]}.weight": (f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight",) for i in range(16) for x in "kv"
    }
    projection = {
        f"image_projection.{part}.{leaf}": (f"image_proj.{part}.{leaf}",)
        for part in ("proj", "norm")
        for leaf in ("weight", "bias")
    }
    assert names == layers | projection


@pytest.mark.parity("diffusers attn_processors", 0)
@pytest.mark.parametrize("name", UNETS)
def test_the_adapters_keys_count_diffusers_processors(name: str) -> None:
    """Key n is the n-th of `attn_processors`. The table of the UNet gives the corresponding layer of ours."""
    config, _ = UNETS[name]
    ours, unet = adapter(config)
    theirs = {row[1]: row[0] for row in unet_rows(config)}
    layer_of = {name: module.layer for name, module in unet.named_modules() if isinstance(module, CrossAttention)}
    want = {}
    for key, processor in enumerate(peer_unet(config).attn_processors):
        attention = processor.removesuffix(".processor")
        if attention.endswith("attn2"):
            layer = layer_of[theirs[f"{attention}.to_q"].removesuffix(".to_q")]
            for x in "kv":
                want[f"to_{x}.{layer}.weight"] = (f"ip_adapter.{key}.to_{x}_ip.weight",)
    names = adapter_names(ours.state_dict(), unet)
    assert {k: v for k, v in names.items() if not k.startswith("image_projection.")} == want
    assert len(want) == 2 * len(layer_of)
