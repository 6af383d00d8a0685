"""Base models from single files and folders: loaded, held in memory, or refused."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from base_files import (
    IMAGE,
    TEXT,
    UNET,
    VAE_CONFIG,
    Peers,
    Tensors,
    change,
    change_json,
    check_base,
    equal,
    names,
    nest,
    write_single,
    write_tokenizer,
)
from diffusers import UNet2DConditionModel
from peers import SMALL_UNETS, Pair, max_error, randn, text_pair, vision_pair
from safetensors.torch import load_file, save_file

from checkpoints import configs
from checkpoints.cards import save
from checkpoints.clip import load_image_encoder, load_text_encoder
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect
from checkpoints.diffusers_folder import save_unet
from checkpoints.files import write_json
from checkpoints.single_file import load_single
from checkpoints.stable_diffusion import load_base, load_unet, load_vae, unet_config
from model.context import Context
from model.text_encoder import TextConfig
from model.vae import VAE
from weights_convert import main

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = 1e-11  # measured: 1e-13
SINGLE = 1e-5  # in float32


@pytest.mark.parity("diffusers convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint", 0)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file(base: Peers, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    """Old checkpoints nest everything in `state_dict` beside a class of Lightning's, which is not needed to read them."""
    path = write_single(base, tmp_path / f"sd{suffix}", dtype)
    actual = load_single(path, dtype=None)
    check_base(actual, base.ours, dtype)
    assert actual.unet.config == UNET and actual.vae.config == VAE_CONFIG and actual.text.config == TEXT
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def test_the_config_of_a_unet_without_its_weights(base: Peers, single: Path, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own" / "unet.safetensors"
    save(base.ours.unet, own, {})
    assert [unet_config(path) for path in (single, folder, own.parent)] == [UNET] * 3
    save_file({"conditioner.embedders.0.transformer.x": torch.ones(1)}, tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match="is not a complete base model"):
        unet_config(tmp_path / "xl.safetensors")


def test_a_single_file_without_anything_else(base: Peers, tmp_path: Path) -> None:
    check_base(load_base(write_single(base, tmp_path / "sd.safetensors", extra=False)), base.ours)


def test_a_single_file_in_another_dtype(base: Peers, single: Path) -> None:
    check_base(load_single(single, torch.float16), base.ours, torch.float16)


@pytest.mark.parity("diffusers UNet2DConditionModel", DOUBLE)
def test_a_single_file_gives_diffusers_predictions(base: Peers, single: Path) -> None:
    unet = load_single(single, torch.float64).unet
    x, t, text = randn(2, 4, 8, 16, seed=1), torch.tensor([7, 981]), randn(2, 5, UNET.context_dim, seed=2)
    want = copy.deepcopy(base.unet).double()(x, t, text).sample
    assert max_error(unet(x, t, Context(text)), want) < DOUBLE


def test_ema_takes_the_slow_copy(base: Peers, single: Path, tmp_path: Path) -> None:
    slow = load_single(single, ema=True)
    equal(slow.unet, {name: 2 * tensor for name, tensor in base.ours.unet.state_dict().items()})
    equal(slow.vae, base.ours.vae)
    main(["convert", "--ema", str(single), str(tmp_path / "out")])
    equal(load_unet(tmp_path / "out" / "unet.safetensors"), slow.unet)
    plain = write_single(base, tmp_path / "plain.safetensors", extra=False)
    with pytest.raises(ValueError, match=r"plain\.safetensors has no EMA copy"):
        load_single(plain, ema=True)


@pytest.mark.parity("diffusers save_pretrained", 0)
def test_a_diffusers_folder(base: Peers, folder: Path) -> None:
    actual = load_base(folder)
    check_base(actual, base.ours)
    assert actual.unet.config == UNET and actual.vae.config == VAE_CONFIG and actual.text.config == TEXT


def test_a_folders_tokenizer_and_scheduler_decide(own_folder: Path) -> None:
    shutil.rmtree(own_folder / "tokenizer")
    write_tokenizer(own_folder / "tokenizer", {"content": "!", "lstrip": False})
    change_json(own_folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    actual = load_base(own_folder)
    assert actual.text.config.pad == 0 and actual.unet.config.prediction == "v"
    words = json.loads((own_folder / "tokenizer" / "vocab.json").read_text())
    (own_folder / "tokenizer" / "vocab.json").unlink()
    (own_folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    assert load_base(own_folder).text.config.pad == 0


def test_older_names_of_the_vaes_attention(base: Peers, own_folder: Path) -> None:
    path = own_folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".attentions.0.to_" in name]:
            for new, before in old.items():
                if f".{new}." in name:
                    tensors[name.replace(new, before)] = tensors.pop(name)

    change(path, rename)
    equal(load_vae(own_folder / "vae"), base.ours.vae)


@pytest.mark.parity("diffusers UNet2DConditionModel.from_pretrained", 0)
@pytest.mark.parametrize("name", SMALL_UNETS)
def test_unets_of_several_sizes_there_and_back(pair: Pair, tmp_path: Path, name: str) -> None:
    """From a folder that diffusers wrote to one that it reads: heads and depths level by level, matrices or convolutions."""
    both, config = pair(name), SMALL_UNETS[name][0]
    both.peer.save_pretrained(tmp_path / "unet")
    if config.prediction == "v":
        write_json(tmp_path / "scheduler" / "scheduler_config.json", {"prediction_type": "v_prediction"})
    ours = load_unet(tmp_path / "unet", dtype=None)
    equal(ours, both.ours, torch.float64)
    assert ours.config == config
    save_unet(ours, tmp_path / "back" / "unet")
    back = UNet2DConditionModel.from_pretrained(tmp_path / "back" / "unet", torch_dtype=torch.float64)
    want = both.peer.state_dict()
    assert back.state_dict().keys() == want.keys()
    assert all(torch.equal(t.reshape(want[k].shape), want[k]) for k, t in back.state_dict().items())
    assert verify(tmp_path / "unet", tmp_path / "back" / "unet") == []
    heads = ("addition_time_embed_dim", "attention_head_dim", "cross_attention_dim")
    for key in (*heads, "block_out_channels", "transformer_layers_per_block"):
        assert list_of(back.config[key]) == list_of(both.peer.config[key])


def list_of(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value


def test_a_unet_that_diffusers_does_not_have() -> None:
    with pytest.raises(ValueError, match="diffusers has no UNet of depth"):
        configs.diffusers_config(replace(UNET, depth=(1, 1, 1, 2)))


@pytest.mark.parity("transformers CLIPTextModel.save_pretrained", 0)
@pytest.mark.parametrize("form", ["as written", "prefix", "no prefix", "positions"])
@pytest.mark.parametrize("output_dim", [0, 10], ids=["states", "projection"])
def test_text_towers(tmp_path: Path, output_dim: int, form: str) -> None:
    peer, ours = text_pair(TextConfig(width=16, layers=2, heads=2, activation="gelu", output_dim=output_dim))
    peer.float().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    prefix = "" if form == "no prefix" else "text_model."
    if form != "as written":
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
        path.unlink()
        extra = {"text_model.embeddings.position_ids": torch.arange(77)[None]} if form == "positions" else {}
        tower = {(name if "projection" in name else prefix + name): tensor for name, tensor in tensors.items()}
        save_file(tower | extra, path)
    encoder = load_text_encoder(tmp_path)
    equal(encoder, ours)
    assert encoder.config == ours.config


@pytest.mark.parity("transformers CLIPVisionModelWithProjection, float32", SINGLE)
@pytest.mark.parametrize("positions", [False, True])
def test_image_towers(tmp_path: Path, positions: bool) -> None:
    peer, ours = vision_pair(IMAGE)
    peer.float().save_pretrained(tmp_path)
    if positions:
        extra = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        change(tmp_path / "model.safetensors", lambda tensors: tensors.update(extra))
    encoder = load_image_encoder(tmp_path)
    equal(encoder, ours)
    assert encoder.config == IMAGE
    with torch.no_grad():
        pixels = randn(2, 3, 32, 32, dtype=torch.float32)
        assert max_error(encoder(pixels), peer(pixels).image_embeds) < SINGLE


def test_the_width_of_an_mlp_survives_the_ratio() -> None:
    """open_clip wants intermediate / hidden, and cuts hidden times that off: 488 / 56 x 56 falls below 488."""
    entries = {
        "image_size": 32,
        "patch_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "projection_dim": 8,
    }
    for hidden in (56, 768, 1152, 1664):
        for intermediate in (488, 3072, 4304, 8192):
            config = configs.image_config(entries | {"hidden_size": hidden, "intermediate_size": intermediate})
            assert int(hidden * config.mlp_ratio) == intermediate


# what is refused

SINGLE_BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no text": (lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_stage")], "is not a complete Stable"),
    "no vae": (lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage")], "is not a complete Stable"),
    "missing": (lambda t: t.pop("model.diffusion_model.out.2.bias"), r"lacks out\.2\.bias"),
    "extra": (lambda t: t.update({"first_stage_model.x.weight": torch.ones(1)}), r"also holds x\.weight"),
    "width": (lambda t: t.update(nest("model.diffusion_model.out.2.weight")), r"out\.2\.weight is \[2, 2\]"),
    "heads": (
        lambda t: t.update({"cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight": torch.ones(8, 32)}),
        r"k_proj\.weight.* is \[16, 16\] and \[8, 32\] and \[16, 16\], not \[48, 16\]",
    ),
    "words": (
        lambda t: t.update({"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(99, 16)}),
        "rows for 99 tokens",
    ),
    "blocks": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("model.diffusion_model.input_blocks.5.")],
        "is not a complete Stable",
    ),
    "nan": (lambda t: t["first_stage_model.decoder.conv_in.bias"].fill_(float("nan")), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", SINGLE_BROKEN)
def test_broken_single_files_are_refused(single: Path, tmp_path: Path, case: str) -> None:
    edit, sentence = SINGLE_BROKEN[case]
    path = change(Path(shutil.copy(single, tmp_path / "sd.safetensors")), edit)
    with pytest.raises(ValueError, match=rf"sd\.safetensors.*{sentence}"):
        load_single(path)
    with pytest.raises(ValueError, match=sentence):
        convert(path, tmp_path / "out")
    assert names(tmp_path) == ["sd.safetensors"]


def test_a_base_whose_parts_do_not_fit_is_refused(base: Peers, own_folder: Path, tmp_path: Path) -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(base.single | {first: torch.zeros(32, 5, 3, 3)}, tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match="reads 5 channels, but its VAE gives 4"):
        load_base(tmp_path / "five.safetensors")
    save_file(base.single | {first: torch.zeros(32, 9, 3, 3)}, tmp_path / "nine.safetensors")
    assert load_base(tmp_path / "nine.safetensors").unet.config.in_channels == 9
    shutil.rmtree(own_folder / "text_encoder")
    text_pair(replace(TEXT, width=8))[0].save_pretrained(own_folder / "text_encoder")
    with pytest.raises(ValueError, match="reads text tokens of width 16, but its text encoder gives 8"):
        load_base(own_folder)


UNSUPPORTED: dict[str, tuple[str, dict[str, object]]] = {
    "activation": ("unet", {"act_fn": "gelu"}),
    "class": ("unet", {"class_embed_type": "timestep"}),
    "blocks": ("unet", {"down_block_types": ["ResnetDownsampleBlock2D"] * 4}),
    "guidance": ("unet", {"time_cond_proj_dim": 256}),
    "middle": ("unet", {"mid_block_type": None}),
    "middle attention": ("unet", {"mid_block_only_cross_attention": True}),
    "blocks by level": ("unet", {"layers_per_block": [1, 2, 2, 2]}),
    "odd heads": ("unet", {"attention_head_dim": 7}),
    "half a head": ("unet", {"attention_head_dim": 8.5}),
    "no context": ("unet", {"cross_attention_dim": None}),
    "a million layers": ("unet", {"layers_per_block": 10**6}),
    "large": ("unet", {"block_out_channels": [10**30] * 4}),
    "groups": ("unet", {"norm_num_groups": 0}),
    "vae without quant": ("vae", {"use_quant_conv": False}),
    "vae mean": ("vae", {"latents_mean": [0.0] * 4}),
    "vae scale": ("vae", {"scaling_factor": 0}),
    "vae nan": ("vae", {"scaling_factor": float("nan")}),
    "text activation": ("text_encoder", {"hidden_act": "relu"}),
    "text norm": ("text_encoder", {"layer_norm_eps": 1e-6}),
    "text words": ("text_encoder", {"vocab_size": 1000}),
    "text layers": ("text_encoder", {"num_hidden_layers": 10**9}),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_configs_that_ask_for_more_are_refused(own_folder: Path, case: str) -> None:
    part, entries = UNSUPPORTED[case]
    change_json(own_folder / part / "config.json", **entries)
    with pytest.raises(ValueError, match=rf"{part}/config\.json is not a supported config of"):
        load_base(own_folder)


def test_folders_that_are_not_whole_are_refused(own_folder: Path) -> None:
    text = own_folder / "tokenizer" / "vocab.json"
    for path, content, error in (
        (own_folder / "scheduler" / "scheduler_config.json", '{"prediction_type": "sample"}', "prediction_type is 'sample'"),
        (own_folder / "unet" / "config.json", "[1]", r"config\.json is not a JSON object"),
        (own_folder / "unet" / "config.json", "[" * 10**5, r"config\.json is not a JSON object"),
        (own_folder / "vae" / "config.json", None, r"vae/config\.json is not there"),
        (own_folder / "vae" / "diffusion_pytorch_model.safetensors", None, "vae holds no weights"),
        (text, '{"a": 0}', "its vocabulary is not CLIP's, and no other is supported"),
        (own_folder / "tokenizer" / "tokenizer_config.json", '{"pad_token": "<nothing>"}', "lacks '<nothing>'"),
    ):
        before = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            load_base(own_folder)
        path.write_bytes(before)
    load_base(own_folder)


def test_cards_that_are_wrong_are_refused(base: Peers, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save(base.ours.vae, path, {})
    card = json.loads(path.with_suffix(".json").read_text())
    for entries in (
        {"scale": "x"},
        {"scale": -1.0},
        {"groups": 0},
        {"res_blocks": 10**7},
        {"more": 1},
        {"channels": 3},
    ):
        write_json(path.with_suffix(".json"), {"config": card["config"] | entries})
        with pytest.raises(ValueError, match=r"vae\.json does not describe a network"):
            load_vae(path)
    for wrong in ({}, {"config": None}, {"config": [1]}):
        write_json(path.with_suffix(".json"), wrong)
        with pytest.raises(ValueError, match=r"vae\.json does not describe a network"):
            load_vae(path)
        with pytest.raises(ValueError, match="is neither a base model"):
            inspect(path)
    write_json(path.with_suffix(".json"), card)
    assert isinstance(load_vae(path), VAE)
