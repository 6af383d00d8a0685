"""Other libraries' configs: equivalent spellings, what is asked for beyond them, and padding tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from base_files import IMAGE, TEXT, change_json, write_tokenizer
from diffusers import AutoencoderKL, UNet2DConditionModel
from peers import SMALL_UNETS, max_error, randn, text_pair, vision_pair
from transformers import CLIPTokenizer

from checkpoints.clip import load_text_encoder
from checkpoints.configs import check_values, pad_token, unet_config, vae_config
from checkpoints.diffusers_folder import save_unet
from checkpoints.fill import empty_module
from checkpoints.stable_diffusion import load_unet
from model.text_encoder import END
from model.unet import UNet

ROOT = Path(__file__).parent.parent
DOUBLE = 1e-11  # measured: 1e-13
SINGLE = 1e-5  # in float32


@pytest.mark.parametrize("entries", [
    {"layers_per_block": [1, 1]}, {"cross_attention_dim": [6, 6]}, {"only_cross_attention": [False, False]}, {"act_fn": "swish"},
    {"dual_cross_attention": None}, {"dropout": 0.0, "upcast_attention": True}, {"attention_head_dim": [2, 2]},
], ids=str)  # fmt: skip
def test_equivalent_spellings_of_a_unet(pair: Any, entries: dict[str, Any]) -> None:
    config = dict(pair("one_block").peer.config) | entries
    assert unet_config(config) == SMALL_UNETS["one_block"][0]
    UNet2DConditionModel.from_config(config)  # diffusers takes it too


@pytest.mark.parametrize("entries", [
    {"time_embedding_act_fn": "silu"}, {"time_embedding_dim": 64}, {"layers_per_block": [1, 2]}, {"cross_attention_dim": [6, 8]},
    {"only_cross_attention": [False, True]}, {"addition_embed_type": "image"}, {"act_fn": "mish"}, {"transformer_layers_per_block": 0},
], ids=str)  # fmt: skip
def test_unets_that_ask_for_more_are_refused(pair: Any, entries: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        empty_module(UNet, unet_config(dict(pair("one_block").peer.config) | entries))


@pytest.mark.parametrize(
    "entries", [{"latents_std": [1.0] * 4}, {"latents_mean": [0.0] * 4}, {"layers_per_block": [1, 2]}], ids=str
)
def test_vaes_that_ask_for_more_are_refused(entries: dict[str, Any]) -> None:
    config = dict(
        AutoencoderKL(
            block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
        ).config
    )
    assert vae_config(config).res_blocks == 1 and vae_config(config | {"layers_per_block": [1]}).res_blocks == 1
    assert vae_config(config | {"act_fn": "swish"}) == vae_config(config)
    with pytest.raises(ValueError):
        check_values(vae_config(config | entries))


@pytest.mark.parity("transformers CLIPTextModel, float32", SINGLE)
@pytest.mark.parametrize("inner", [64, 40, 37, 100])
def test_the_mlps_of_a_text_tower_have_their_own_width(tmp_path: Path, inner: int) -> None:
    peer, _ = text_pair(TEXT)
    config = peer.config
    config.intermediate_size = inner
    wide = type(peer)(config).eval()
    wide.save_pretrained(tmp_path / "text_encoder")
    tower, tokens = load_text_encoder(tmp_path / "text_encoder"), torch.tensor([[49406, 320, 1125, 49407]])
    with torch.no_grad():
        assert max_error(tower(tokens), wide(tokens).last_hidden_state) < SINGLE


@pytest.mark.parity("transformers CLIPVisionModelWithProjection", DOUBLE)
def test_fine_features_of_a_tower_of_one_layer_are_what_enters_it() -> None:
    for layers in (1, 2, 3):
        peer, ours = vision_pair(replace(IMAGE, layers=(layers,)))
        pixels = randn(2, 3, 32, 32, seed=3)
        want = peer(pixels, output_hidden_states=True).hidden_states[-2]
        assert max_error(ours.fine(pixels), want) < DOUBLE


@pytest.mark.parity("diffusers UNet2DConditionModel.from_pretrained", 0)
@pytest.mark.parametrize("width", [8, 128, 256])
def test_the_size_embedding_of_an_added_condition_is_kept(pair: Any, tmp_path: Path, width: int) -> None:
    unet = UNet(replace(SMALL_UNETS["sdxl"][0], added_time_dim=width, added_dim=6 * width + 10))
    save_unet(unet, tmp_path / "unet")
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.addition_time_embed_dim == width
    assert load_unet(tmp_path / "unet").config == unet.config


SPECIAL: dict[str, dict[str, Any]] = {
    "SD 1.5": {"pad_token": "<|endoftext|>"},
    "SD 2.1": {"pad_token": "!"},
    "an added token": {
        "pad_token": {"content": "!", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    },
    "nothing": {},
}
OFFICIAL = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


@pytest.mark.parity("transformers CLIPTokenizer.from_pretrained", 0)
@pytest.mark.parametrize("decoder", [False, True], ids=["", "added_tokens_decoder"])
@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!", None])
def test_the_pad_token_is_transformers(tmp_path: Path, pad: str | None, case: str, decoder: bool) -> None:
    """special_tokens_map.json counts, where tokenizer_config.json has no added_tokens_decoder."""
    write_tokenizer(tmp_path / "tokenizer", pad)
    settings: dict[str, Any] = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"} | (
        {"pad_token": pad} if pad else {}
    )
    if decoder:
        settings["added_tokens_decoder"] = {
            "49407": {
                "content": "<|endoftext|>",
                "lstrip": False,
                "normalized": True,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
        }
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(OFFICIAL | SPECIAL[case]))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\ni n</w>\n")
    words = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text())
    assert (
        pad_token(words, settings, OFFICIAL | SPECIAL[case])
        == CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").pad_token_id
    )


def test_sd21s_tokenizer_pads_with_zero(own_folder: Path) -> None:
    (own_folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(OFFICIAL | SPECIAL["SD 2.1"]))
    assert load_text_encoder(own_folder / "text_encoder").config.pad == 0
    change_json(own_folder / "tokenizer" / "tokenizer_config.json", added_tokens_decoder={})
    assert load_text_encoder(own_folder / "text_encoder").config.pad == END
