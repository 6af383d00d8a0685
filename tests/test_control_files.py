"""Files of ControlNets and T2I-Adapters: every layout there and back, at small and at true size, and bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from base_files import equal
from control_peers import SMALL_CONTROLS, SMALL_T2I, controlnet_pair, t2i_pair
from diffusers import ControlNetModel
from diffusers import T2IAdapter as PeerT2I
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from peers import SMALL_SD15, randomise
from safetensors.torch import load_file, save_file
from test_names import check_bijection, check_ldm, on_meta
from torch import Tensor

from checkpoints.cards import save
from checkpoints.control_configs import controlnet_diffusers, ldm_controlnet, official_t2i, t2i_diffusers, without_yaml
from checkpoints.control_names import controlnet_rows, t2i_rows
from checkpoints.controls import Control, load_control, open_control, save_control_diffusers
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect, kind_of
from checkpoints.names import map_names
from checkpoints.single_file import load_single
from checkpoints.stable_diffusion import load_base
from model.controlnet import CONTROLNET_SD15, CONTROLNET_SD21, CONTROLNET_SDXL, ControlNet, ControlNetConfig
from model.t2i import T2I_LIGHT, T2I_SD15, T2I_SD15_GREY, T2I_SDXL, T2IAdapter, T2IConfig
from model.unet import SD15, SDXL, UNetConfig

TRUE_CONTROLS = {"sd15": (CONTROLNET_SD15, 340), "sd21": (CONTROLNET_SD21, 340), "sdxl": (CONTROLNET_SDXL, 844)}
TRUE_T2I = {"colour": (T2I_SD15, 38), "grey": (T2I_SD15_GREY, 38), "light": (T2I_LIGHT, 80), "xl": (T2I_SDXL, 38)}
# A single file has no config: 8 heads, groups of 32.
UNET = UNetConfig(channels=(32, 64), depth=(1, 0), heads=(8, 8), context_dim=16)
CONTROL = ControlNetConfig.of(UNET, (4, 6, 8, 10))
T2I = T2IConfig(channels=(32, 48, 64, 64))
LIGHT = T2IConfig(channels=(32, 48, 64, 64), blocks=3, form="light")
Tensors = dict[str, Tensor]


@pytest.mark.parity("diffusers ControlNetModel", 0)
@pytest.mark.parametrize("name", TRUE_CONTROLS)
def test_a_controlnet_in_diffusers(name: str) -> None:
    config, count = TRUE_CONTROLS[name]
    ours, settings = on_meta(ControlNet, config), controlnet_diffusers(config)
    peer = on_meta(ControlNetModel, **{k: v for k, v in settings.items() if not k.startswith("_")})
    check_bijection(ours, map_names(ours.state_dict(), controlnet_rows(config), 1), peer, count)


@pytest.mark.parity("diffusers convert_controlnet_checkpoint", 0)
@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_controlnet_in_an_official_file(name: str, prefix: str) -> None:
    """diffusers' converter, fed with numbers under our table's LDM names, gives our table's diffusers names."""
    config, _ = TRUE_CONTROLS[name]
    settings = controlnet_diffusers(config)
    check_ldm(
        on_meta(ControlNet, config),
        controlnet_rows(config),
        lambda file: convert_controlnet_checkpoint(file, settings),
        prefix,
    )


@pytest.mark.parity("diffusers T2IAdapter", 0)
@pytest.mark.parametrize("name", TRUE_T2I)
def test_a_t2i_adapter_in_diffusers(name: str) -> None:
    config, count = TRUE_T2I[name]
    ours, settings = on_meta(T2IAdapter, config), t2i_diffusers(config)
    peer = on_meta(PeerT2I, **{k: v for k, v in settings.items() if not k.startswith("_")})
    check_bijection(ours, map_names(ours.state_dict(), t2i_rows(config), 1), peer, count)


def official_names(config: T2IConfig) -> set[str]:
    """The names in an official file, written down from its module: blocks in one list, or in one list for each level."""
    levels = range(len(config.channels))
    if config.form == "light":
        convs = [f"body.{i}.{name}" for i in levels for name in ("in_conv", "out_conv")]
        convs += [f"body.{i}.body.{j}.block{n}" for i in levels for j in range(config.blocks) for n in (1, 2)]
    else:
        convs = ["conv_in", *(f"body.{i}.block{n}" for i in range(len(levels) * config.blocks) for n in (1, 2))]
        changes = [i for i in levels[1:] if config.channels[i] != config.channels[i - 1]]
        convs += [f"body.{i * config.blocks}.in_conv" for i in changes]
    return {f"{conv}.{leaf}" for conv in convs for leaf in ("weight", "bias")}


@pytest.mark.parametrize("name", TRUE_T2I)
def test_a_t2i_adapter_in_an_official_file(name: str) -> None:
    """At true size, onto the official names, and the shapes give the config back."""
    config, count = TRUE_T2I[name]
    ours = on_meta(T2IAdapter, config).state_dict()
    names = map_names(ours, t2i_rows(config), 2)
    assert len(names) == count and {theirs for (theirs,) in names.values()} == official_names(config)
    assert official_t2i({names[name][0]: tuple(tensor.shape) for name, tensor in ours.items()}) == config


# Small files, there and back.


@pytest.mark.parity("diffusers save_pretrained, from_pretrained", 0)
@pytest.mark.parametrize("name", SMALL_CONTROLS)
def test_a_controlnet_folder_there_and_back(name: str, tmp_path: Path) -> None:
    (peer, ours), config = controlnet_pair(*SMALL_CONTROLS[name]), SMALL_CONTROLS[name][0]
    peer.save_pretrained(tmp_path / "peer")
    actual = load_control(tmp_path / "peer", dtype=None)
    equal(actual, ours, torch.float64)
    assert isinstance(actual, ControlNet)
    assert replace(actual.config, prediction=config.prediction) == config and kind_of(tmp_path / "peer") == "controlnet"
    back_and_forth(actual, ControlNetModel, peer, tmp_path)


@pytest.mark.parity("diffusers save_pretrained, from_pretrained", 0)
@pytest.mark.parametrize("name", SMALL_T2I)
def test_a_t2i_folder_there_and_back(name: str, tmp_path: Path) -> None:
    peer, ours = t2i_pair(SMALL_T2I[name])
    peer.save_pretrained(tmp_path / "peer")
    actual = load_control(tmp_path / "peer", dtype=None)
    equal(actual, ours, torch.float64)
    assert actual.config == SMALL_T2I[name] and kind_of(tmp_path / "peer") == "t2i"
    back_and_forth(actual, PeerT2I, peer, tmp_path)


def back_and_forth(control: Control, kind: Any, peer: Any, folder: Path) -> None:
    """To our own format, from there to a folder of diffusers, which diffusers reads."""
    convert(folder / "peer", folder / "own.safetensors")
    equal(load_control(folder / "own.safetensors", dtype=None), control, torch.float64)
    convert(folder / "own.safetensors", folder / "back", diffusers=True)
    back, want = kind.from_pretrained(folder / "back", torch_dtype=torch.float64).state_dict(), peer.state_dict()
    assert back.keys() == want.keys()
    assert all(torch.equal(tensor.reshape(want[name].shape), want[name]) for name, tensor in back.items())
    assert verify(folder / "peer", folder / "back") == [] == verify(folder / "own.safetensors", folder / "back")


def official(control: Control, prefix: str = "") -> Tensors:
    """The tensors of a control under the official names, with 1 x 1 convolutions around the transformers."""
    rows = controlnet_rows(control.config) if isinstance(control, ControlNet) else t2i_rows(control.config)
    names = map_names(control.state_dict(), rows, 2)
    conv = {name for name in names if name.endswith(("attn.proj_in.weight", "attn.proj_out.weight"))}
    state = {name: t[:, :, None, None] if name in conv else t for name, t in control.state_dict().items()}
    return {prefix + names[name][0]: tensor.contiguous() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def control() -> ControlNet:
    return randomise(ControlNet(CONTROL), 1).float()


LAYOUTS = {"whole": "control_model.", "v1.1": "control_model.", "without a prefix": ""}


@pytest.mark.parametrize(("layout", "suffix"), zip(LAYOUTS, (".ckpt", ".pth", ".safetensors"), strict=True))
def test_official_controlnets(control: ControlNet, layout: str, suffix: str, tmp_path: Path) -> None:
    """v1.0 is a whole checkpoint; of it, only the control is read."""
    tensors = official(control, LAYOUTS[layout])
    if layout == "whole":
        tensors |= {"model.diffusion_model.out.2.weight": torch.ones(4, 32, 3, 3), "betas": torch.ones(3)}
    path = write(tensors, tmp_path / f"control{suffix}")
    equal(load_control(path), control)
    assert load_control(path).config == CONTROL and kind_of(path) == "controlnet"
    convert(path, tmp_path / "own.safetensors")
    assert verify(path, tmp_path / "own.safetensors") == []
    said = inspect(path)[0]
    assert said.startswith("ControlNet for 16-d, ") and f"{len(control.state_dict())} tensors, float32" in said


def write(tensors: Tensors, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if "control_model" in next(iter(tensors)) else tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["", "adapter."])
@pytest.mark.parametrize("config", [T2I, replace(T2I, hint_channels=1), LIGHT, replace(T2I, unshuffle=16, form="xl")])
def test_official_t2i_adapters(config: T2IConfig, prefix: str, tmp_path: Path) -> None:
    ours = randomise(T2IAdapter(config), 2).float()
    path = write(official(ours, prefix), tmp_path / "t2i.pth")
    actual = load_control(path)
    equal(actual, ours)
    assert actual.config == config and kind_of(path) == "t2i"
    convert(path, tmp_path / "back", diffusers=True)
    assert verify(path, tmp_path / "back") == []
    assert inspect(path)[0].startswith("T2I-Adapter, ")


def test_a_yaml_beside_a_controlnet_gives_its_heads(control: ControlNet, tmp_path: Path) -> None:
    path = write(official(control), tmp_path / "control.pth")
    unet = {"unet_config": {"params": {"num_heads": -1, "num_head_channels": 16}}}
    path.with_suffix(".yaml").write_text(json.dumps({"model": {"params": unet}}))
    assert load_control(path).config.heads == (2, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TRUE_CONTROLS)
def test_a_controlnet_without_a_yaml_has_the_heads_of_its_base(name: str) -> None:
    """At true size: SD 1.5 has 8 heads, SD 2.x and SDXL have heads of width 64."""
    config, _ = TRUE_CONTROLS[name]
    state = on_meta(ControlNet, config).state_dict()
    names = map_names(state, controlnet_rows(config), 2)
    shapes = {names[k][0]: tuple(t.shape) for k, t in state.items()}
    actual = ldm_controlnet(shapes, without_yaml(shapes, "control"))
    assert actual == replace(config, prediction=actual.prediction, sample_size=actual.sample_size)


POOLED: dict[str, tuple[str, dict[str, object] | None, bool]] = {  # name; entries of the yaml, or None without one; pooled
    "the official file": ("control_v11e_sd15_shuffle.pth", {"global_average_pooling": True}, True),
    "another name": ("mine.safetensors", {"global_average_pooling": True}, True),
    "a yaml that says no": ("shuffle.pth", {"global_average_pooling": False}, False),
    "a yaml that says nothing": ("shuffle.pth", {}, False),
    "the name alone": ("control_v11e_sd15_Shuffle_fp16.safetensors", None, True),
    "no name": ("control_v11p_sd15_canny.pth", None, False),
}


@pytest.mark.parametrize("case", POOLED)
def test_shuffle_is_pooled(control: ControlNet, case: str, tmp_path: Path) -> None:
    """By its yaml, or else by its name; and it stays so in the other layouts."""
    name, entries, pooled = POOLED[case]
    path = write(official(control, "control_model."), tmp_path / name)
    if entries is not None:
        params = entries | {"unet_config": {"params": {"num_heads": 8}}}
        path.with_suffix(".yaml").write_text(json.dumps({"model": {"params": params}}))
    assert load_control(path).config == replace(CONTROL, pooled=pooled)
    convert(path, tmp_path / "own.safetensors")
    convert(path, tmp_path / "folder", diffusers=True)
    for other in (tmp_path / "own.safetensors", tmp_path / "folder"):
        assert load_control(other).config.pooled == pooled  # type: ignore[union-attr]


# What is refused.

Change = Callable[[Tensors], object]


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


BROKEN: dict[str, tuple[Change, str]] = {
    "a tensor missing": (lambda t: t.pop("zero_convs.3.0.bias"), "not a complete ControlNet: it lacks zero_convs.3.0.bias"),
    "a tensor too many": (lambda t: t.update(extra=torch.ones(1)), "it also holds extra"),
    "another shape": (lambda t: t.update({"zero_convs.0.0.bias": torch.ones(3)}), r"the shape of zero_convs.0.0.bias is \[3\]"),
    "not finite": (lambda t: t["middle_block_out.0.bias"].fill_(float("nan")), "not finite"),
    "integers": (lambda t: t.update({"zero_convs.0.0.bias": torch.ones(32, dtype=torch.int64)}), "only float32"),
    "no hint network": (lambda t: [t.pop(n) for n in list(t) if n.startswith("input_hint")], "only ControlNets and T2I-Adapters"),
    "no middle": (lambda t: [t.pop(n) for n in list(t) if n.startswith("middle_block.")], "not a complete ControlNet: it lacks"),
    "four channels": (
        lambda t: t.update({"input_hint_block.0.weight": torch.ones(4, 4, 3, 3)}),
        "reads hints of 4 channels, but only pictures, of 1 or 3",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_controlnets_are_refused(control: ControlNet, case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    tensors = {name: tensor.clone() for name, tensor in official(control).items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load_control(write(tensors, tmp_path / "control.safetensors"))


BROKEN_T2I: dict[str, tuple[Change, str]] = {
    "a tensor missing": (lambda t: t.pop("body.3.block2.bias"), "it lacks body.3.block2.bias"),
    "a block missing": (lambda t: [t.pop(n) for n in list(t) if n.startswith("body.7.")], "not a complete T2I-Adapter"),
    "odd channels": (lambda t: t.update({"conv_in.weight": torch.ones(32, 100, 3, 3)}), "reads 100 channels"),
    "style": (lambda t: t.update(style_embedding=torch.ones(1, 8, 4)), "a T2I style adapter; only"),
}


@pytest.mark.parametrize("case", BROKEN_T2I)
def test_broken_t2i_adapters_are_refused(case: str, tmp_path: Path) -> None:
    change, message = BROKEN_T2I[case]
    tensors = official(T2IAdapter(T2I))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load_control(write(tensors, tmp_path / "t2i.safetensors"))


def test_other_files_are_named(control: ControlNet, tmp_path: Path) -> None:
    """And a control is no base model and no adapter."""
    base = write({"model.diffusion_model.out.2.weight": torch.ones(1)}, tmp_path / "base.safetensors")
    adapter = write({"image_proj.proj.weight": torch.ones(1)}, tmp_path / "adapter.safetensors")
    for path, kind in ((base, "Stable Diffusion 1.x"), (adapter, "not a base model")):
        with pytest.raises(ValueError, match=f"is {kind}; only ControlNets and T2I-Adapters"):
            open_control(path)
    with pytest.raises(FileNotFoundError, match="is not there: name a ControlNet"):
        open_control(tmp_path / "nothing.pth")
    path = write(official(control, "control_model."), tmp_path / "control.safetensors")
    for load in (load_single, load_base):
        with pytest.raises(ValueError, match="is a ControlNet; a base model can be"):
            load(path)
    diffusers = tmp_path / "alone" / "control.safetensors"
    save_control_diffusers(control, tmp_path / "folder")
    diffusers.parent.mkdir()
    save_file(load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors"), diffusers)
    with pytest.raises(ValueError, match=r"in diffusers' layout: put its config\.json beside it"):
        open_control(diffusers)


CONFIGS = {
    "bgr": ({"controlnet_conditioning_channel_order": "bgr"}, "reads its hint as 'bgr'"),
    "other blocks": ({"down_block_types": ["SimpleDownBlock2D"] * 2}, "blocks that are not supported"),
    "more levels": ({"block_out_channels": [32, 64, 64]}, "not a supported config of a ControlNet"),
    "another class": ({"_class_name": "AutoencoderTiny", "cross_attention_dim": None}, "not a supported config"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_ask_for_more_are_refused(control: ControlNet, case: str, tmp_path: Path) -> None:
    change, message = CONFIGS[case]
    save_control_diffusers(control, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_control(tmp_path)


def test_a_control_for_another_base_is_refused(control: ControlNet, tmp_path: Path) -> None:
    path, t2i = tmp_path / "control.safetensors", tmp_path / "t2i.safetensors"
    save(control, path, {})
    save(T2IAdapter(T2I), t2i, {})
    assert load_control(path, UNET, factor=8).config == CONTROL
    for file, unet, message in (
        (path, SD15, r"is a control for 16-d, but you gave a base model of Stable Diffusion 1\.5 \(768-d\)"),
        (path, replace(UNET, channels=(32, 32)), "with feature maps of width 32, 64, but"),
        (path, SMALL_SD15, "is a control for 16-d"),
        (t2i, SDXL, "with feature maps of width 32, 48, 64, 64, but you gave a base model of Stable Diffusion XL"),
        (t2i, UNET, "use a control made for this base model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_control(file, unet)
    with pytest.raises(ValueError, match="for latents 8 times smaller than the picture, but those here are 4 times"):
        load_control(path, UNET, factor=4)
    fitting = replace(UNET, channels=(32, 48, 64, 64))
    assert load_control(t2i, fitting).config == T2I


def test_an_interrupted_card_is_refused(control: ControlNet, tmp_path: Path) -> None:
    path = tmp_path / "control.safetensors"
    save(control, path, {})
    card = path.with_suffix(".json")
    config = json.loads(card.read_text())["config"]
    card.write_text(json.dumps({"config": config | {"hint": "wide"}}))
    with pytest.raises(ValueError, match=r"control\.json does not describe a network"):
        load_control(path)
