"""Stable Diffusion 2.x and XL: their text encoders against transformers, and their single files against diffusers' names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from base_files import Tensors, as_ldm, equal, names, nest, write_tokenizer
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from peers import max_error, number_of, text_pair, unet_pair, vae_pair
from safetensors.torch import load_file, save_file
from small_models import EULER, SCHEDULER
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from checkpoints.base import Base
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect
from checkpoints.diffusers_folder import text_settings
from checkpoints.ldm import open_clip_text
from checkpoints.names import map_names, unet_rows, vae_rows
from checkpoints.single_file import FAMILIES, load_single
from checkpoints.stable_diffusion import load_base, load_vae, scheduler_config, unet_config
from model.text_encoder import END, SD15_TEXT, SD21_TEXT, SDXL_TEXT_2, START, TextConfig, TextEncoder, TextEncoderPair
from model.unet import SD21, SDXL, UNet, UNetConfig
from model.vae import SDXL_VAE, VAE, VAEConfig
from sampling import __main__ as cli
from sampling.scheduler_file import schedule_of

TOLERANCE = 1e-12  # measured: 2e-14 and less
# Heads are 64 wide in these families, and groups have 32 channels, which a single file does not say.
UNETS = {
    "sd2": UNetConfig(
        channels=(64, 64), depth=(1, 0), heads=(1, 1), res_blocks=1, context_dim=24, prediction="v", sample_size=96
    ),
    "sdxl": UNetConfig(
        channels=(64, 64, 128),
        depth=(0, 1, 2),
        mid_depth=2,
        heads=(1, 1, 2),
        res_blocks=1,
        context_dim=16 + 24,
        added_dim=6 * 256 + 12,
        sample_size=128,
    ),
}
VAES = {"sd2": VAEConfig((32, 64)), "sdxl": replace(SDXL_VAE, channels=(32, 64))}
OPEN = TextConfig(width=24, layers=2, heads=1, activation="gelu", pad=0)
PREFIX = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
KINDS = {"sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}


@dataclass(frozen=True)
class Files:
    """One base model as a diffusers folder and as a single file, and the modules that ought to come out."""

    folder: Path
    single: Path
    ours: Base


def open_clip_tensors(text: TextEncoder, peer: Any, prefix: str) -> Tensors:
    """A text tower as a single file has it. That the names are these is diffusers' word."""
    tensors = {f"{prefix}{name.removeprefix('clip.')}": tensor for name, tensor in text.state_dict().items()}
    converted = convert_open_clip_checkpoint(SimpleNamespace(config=peer.config), tensors, prefix=prefix)
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in peer.state_dict().items()}
    assert converted and {name.removeprefix("text_model."): tensor.tolist() for name, tensor in converted.items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }
    tensors[f"{prefix}logit_scale"] = torch.tensor(4.6)
    if not text.config.output_dim:  # SD 2.x: a last layer and a projection that are not used
        start, end = (f"{prefix}transformer.resblocks.{i}." for i in (0, text.config.layers))
        tensors |= {name.replace(start, end): 3 * tensor for name, tensor in tensors.items() if name.startswith(start)}
        tensors[f"{prefix}text_projection"] = torch.ones(text.config.width, text.config.width)
    return tensors


def build(root: Path, name: str) -> Files:
    config, xl = UNETS[name], name == "sdxl"
    pair, (vae, our_vae) = unet_pair(config, linear=True), vae_pair(VAES[name])
    text, our_text = text_pair(replace(OPEN, output_dim=12) if xl else OPEN)
    first, our_first = text_pair(TextConfig(width=16, layers=2, heads=1))
    for module in (pair.peer, pair.ours, vae, our_vae, text, our_text, first, our_first):
        module.float()
    ldm = [f"model.diffusion_model.{n}" for (n,) in map_names(pair.ours.state_dict(), unet_rows(config), 2).values()]
    settings = {"layers_per_block": config.res_blocks} | ({"addition_embed_type": "text_time"} if xl else {})
    tensors = as_ldm(pair.peer.state_dict(), ldm, lambda file: convert_ldm_unet_checkpoint(file, settings))
    ldm = [f"first_stage_model.{n}" for (n,) in map_names(our_vae.state_dict(), vae_rows(VAES[name]), 2).values()]
    blocks = {"down_block_types": [""] * 2, "up_block_types": [""] * 2}
    tensors |= as_ldm(vae.state_dict(), ldm, lambda file: convert_ldm_vae_checkpoint(file, blocks))
    tensors |= open_clip_tensors(our_text, text, PREFIX[name])
    folder = root / name
    pair.peer.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    scheduler = EULER if xl else SCHEDULER | {"prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if xl:
        for key, tensor in first.state_dict().items():
            tensors[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
        first.save_pretrained(folder / "text_encoder")
        write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    text.save_pretrained(folder / ("text_encoder_2" if xl else "text_encoder"))
    write_tokenizer(folder / ("tokenizer_2" if xl else "tokenizer"), "!")
    save_file({n: t.contiguous() for n, t in tensors.items()}, root / f"{name}.safetensors")
    return Files(folder, root / f"{name}.safetensors", Base(pair.ours, our_vae, TextEncoderPair(our_first, our_text) if xl else our_text))


Get = Callable[[str], Files]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Get:
    made: dict[str, Files] = {}

    def get(name: str) -> Files:
        if name not in made:
            made[name] = build(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def tokens(pad: int) -> Tensor:
    words = [[START, *[7 * i for i in range(40)], END], [START, 320, 2368, END]]
    return torch.tensor([[*row, *[pad] * (77 - len(row))] for row in words])


@pytest.mark.parity("transformers CLIPTextModel, CLIPTextModelWithProjection", TOLERANCE)
def test_the_pair_is_transformers() -> None:
    """As in diffusers' `encode_prompt`: both penultimate states side by side, and the second encoder's `text_embeds`."""
    (first, a), (second, b) = text_pair(TextConfig(16, 3, 2)), text_pair(TextConfig(24, 4, 3, output_dim=10, activation="gelu", pad=0))
    pair = TextEncoderPair(a, b)
    ids = pair.tokenize(["a fox, 4k", ""])
    for row, ours in zip(ids.unbind(1), (a, b), strict=True):
        assert torch.equal(row, ours.tokenize(["a fox, 4k", ""]))
    assert not torch.equal(ids[:, 0], ids[:, 1]) and set(ids[1, 1, 2:].tolist()) == {0}
    ids = torch.stack([tokens(END), tokens(0)], dim=1)
    states = [peer(row, output_hidden_states=True) for peer, row in zip((first, second), ids.unbind(1), strict=True)]
    assert max_error(pair(ids), torch.cat([state.hidden_states[-2] for state in states], dim=-1)) < TOLERANCE
    assert max_error(pair.pooled(ids), states[1].text_embeds) < TOLERANCE
    assert pair.width == 40


def test_a_long_prompt_is_reported_once() -> None:
    pair = TextEncoderPair(*(text_pair(TextConfig(16, 1, 1, pad=pad, output_dim=4))[1] for pad in (END, 0)))
    with pytest.warns(UserWarning, match="these words are cut off: teapot$") as messages:
        pair.tokenize(["cat " * 75 + "teapot"])
    assert len(messages) == 1


@pytest.mark.parity("transformers CLIPTextModelWithProjection, diffusers convert_open_clip_checkpoint", 0)
def test_official_sizes() -> None:
    """The parts add up to the released file, and diffusers reads the second text encoder under the names that we expect."""
    with torch.device("meta"):
        parts = UNet(SDXL), VAE(SDXL_VAE), TextEncoder(SD15_TEXT), TextEncoder(SDXL_TEXT_2)
        peer = CLIPTextModelWithProjection(CLIPTextConfig(**text_settings(SDXL_TEXT_2)))
    assert [number_of(part)[0] for part in parts] == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert number_of(parts[0])[1] + 248 + 196 + len(parts[3].state_dict()) + 1 == 2514  # 1 is logit_scale
    assert SDXL.context_dim == TextEncoderPair(parts[2], parts[3]).width and SDXL.added_dim == 1280 + 6 * SDXL.added_time_dim
    tensors = {f"{PREFIX['sdxl']}{name.removeprefix('clip.')}": t for name, t in parts[3].state_dict().items()}
    converted = convert_open_clip_checkpoint(SimpleNamespace(config=peer.config), tensors, prefix=PREFIX["sdxl"])
    theirs = {name.removeprefix("text_model."): t.shape for name, t in peer.state_dict().items()}
    assert len(theirs) == 517 and {name.removeprefix("text_model."): t.shape for name, t in converted.items()} == theirs
    assert SD21.context_dim == SD21_TEXT.width


@pytest.mark.parity("diffusers convert_open_clip_checkpoint", 0)
@pytest.mark.parametrize("blocks", [24, 23])
def test_the_text_encoder_of_sd2_has_23_layers(blocks: int) -> None:
    """The official files hold a 24th, which diffusers ignores by its name; diffusers' own single files don't."""
    config = replace(SD21_TEXT, layers=23, skip=0)
    with torch.device("meta"):
        whole = TextEncoder(replace(config, layers=blocks)).state_dict()
        peer = CLIPTextModel(CLIPTextConfig(**text_settings(config)))
    file = {name.removeprefix("clip."): tensor for name, tensor in whole.items()}
    assert open_clip_text({name: tuple(tensor.shape) for name, tensor in file.items()}, pooled=False) == config
    settings = SimpleNamespace(config=peer.config)
    converted = convert_open_clip_checkpoint(settings, {f"{PREFIX['sd2']}{name}": tensor for name, tensor in file.items()})
    theirs = {name.removeprefix("text_model."): tensor.shape for name, tensor in peer.state_dict().items()}
    assert {name.removeprefix("text_model."): tensor.shape for name, tensor in converted.items()} == theirs


@pytest.mark.parity("diffusers convert_ldm_unet_checkpoint, convert_open_clip_checkpoint, save_pretrained", 0)
@pytest.mark.parametrize("name", UNETS)
def test_a_single_file_and_a_folder_are_one_model(files: Get, name: str) -> None:
    made = files(name)
    for path, prediction in ((made.single, "v" if name == "sd2" else None), (made.folder, None)):
        actual = load_base(path, prediction=prediction)
        for part in ("unet", "vae"):
            equal(getattr(actual, part), getattr(made.ours, part))
        equal(actual.text, made.ours.text)
        assert actual.unet.config == replace(UNETS[name], sample_size=actual.unet.config.sample_size)
        assert actual.vae.config == VAES[name]
        texts = (actual.text.first, actual.text.second) if isinstance(actual.text, TextEncoderPair) else (actual.text,)
        assert [text.config.pad for text in texts] == ([END, 0] if name == "sdxl" else [0])
    assert verify(made.single, made.folder) == []


@pytest.mark.parametrize("name", UNETS)
def test_to_our_own_format_and_back(files: Get, tmp_path: Path, name: str) -> None:
    made, own = files(name), tmp_path / "own"
    convert(made.folder, own)
    assert verify(made.single, own) == []
    assert ("text_encoder_2.safetensors" in names(own)) == (name == "sdxl")
    assert unet_config(own) == unet_config(made.folder)
    assert schedule_of(scheduler_config(own)) == schedule_of(scheduler_config(made.folder))


def test_what_sdxls_single_file_does_not_say(files: Get) -> None:
    made = files("sdxl")
    assert unet_config(made.single).sample_size == 128 and unet_config(made.single) == UNETS["sdxl"]
    assert schedule_of(scheduler_config(made.single)) == schedule_of(EULER)
    assert load_single(made.single, torch.float16).vae.post_quant_conv.weight.dtype == torch.float32


def test_sdxls_vae_alone_has_its_scale(files: Get, tmp_path: Path) -> None:
    """A VAE in LDM's layout says nothing of its scale: it is that of the base model's family."""
    made, path = files("sdxl"), tmp_path / "vae.safetensors"
    tensors = map_names(made.ours.vae.state_dict(), vae_rows(VAES["sdxl"]), 2)
    save_file({theirs: made.ours.vae.state_dict()[ours] for ours, (theirs,) in tensors.items()}, path)
    assert [load_base(base, vae=path).vae.config for base in (made.single, made.folder)] == [VAES["sdxl"]] * 2
    assert load_vae(path).config.scale == 0.18215


def test_sd2_needs_its_prediction(files: Get, tmp_path: Path) -> None:
    """Of two models with the same tensors one predicts v, the other epsilon."""
    made = files("sd2")
    with pytest.raises(ValueError, match="does not say what its UNet predicts: give --prediction v"):
        load_base(made.single)
    for prediction, side in (("v", 96), ("epsilon", 64)):
        config = load_single(made.single, prediction=prediction).unet.config
        assert (config.prediction, config.sample_size) == (prediction, side)
    path = tmp_path / "sd2.safetensors"
    path.symlink_to(made.single)
    unet = {"params": {"num_head_channels": 64}}
    params = {"parameterization": "v", "linear_start": 0.00085, "linear_end": 0.012, "unet_config": unet}
    path.with_suffix(".yaml").write_text(json.dumps({"model": {"params": params}}))
    assert load_base(path).unet.config == UNETS["sd2"]


def marked(path: Path, target: Path, *markers: str) -> Path:
    """A single file with markers, which are empty tensors."""
    save_file(load_file(path) | {marker: torch.zeros(0) for marker in markers}, target)
    return target


@pytest.mark.parametrize("name", UNETS)
def test_a_marker_of_v_prediction_counts(files: Get, tmp_path: Path, name: str) -> None:
    path = marked(files(name).single, tmp_path / "a.safetensors", "v_pred")
    side = UNETS[name].sample_size
    for prediction, expected in ((None, "v"), ("v", "v"), ("epsilon", "epsilon")):
        assert load_base(path, prediction=prediction).unet.config.prediction == expected  # type: ignore[arg-type]
    assert (unet_config(path).prediction, unet_config(path).sample_size) == ("v", side)
    assert not any("odd" in line or "does not say" in line for line in inspect(path))
    convert(path, tmp_path / "folder", diffusers=True)
    assert scheduler_config(tmp_path / "folder")["prediction_type"] == "v_prediction"
    convert(path, tmp_path / "own")
    assert load_base(tmp_path / "own").unet.config.prediction == "v"


MARKERS = {"ztsnr": "a noise schedule that ends at zero SNR", "edm_vpred.sigma_max": "the continuous noise levels of EDM"}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("marker", MARKERS)
def test_markers_of_other_noise_are_refused(files: Get, tmp_path: Path, name: str, marker: str) -> None:
    path = marked(files(name).single, tmp_path / "a.safetensors", "v_pred", marker)
    sentence = rf"a\.safetensors was trained with {MARKERS[marker]}, as its tensor {marker} says, which is not supported: use"
    for refuse in (load_base, unet_config, scheduler_config, lambda path: convert(path, tmp_path / "own")):
        with pytest.raises(ValueError, match=sentence):
            refuse(path)
    assert not (tmp_path / "own").exists() and any(marker in line for line in inspect(path) if line.startswith("odd: "))


def test_inspect(files: Get) -> None:
    lines = inspect(files("sdxl").single)
    assert lines[0].startswith("Stable Diffusion XL, a single file:") and not any("odd" in line for line in lines)
    assert [line.split(":")[0] for line in lines[1:]] == ["UNet", "VAE", "text encoder", "second text encoder"]
    lines = inspect(files("sd2").single)
    assert lines[0].startswith("Stable Diffusion 2.x, a single file:") and "does not say whether the UNet predicts" in lines[-1]
    lines = inspect(files("sdxl").folder)
    assert not any("odd" in line for line in lines) and any(line.startswith("text_encoder_2: ") for line in lines)


OTHERS = {
    "joint_blocks.0.x": "Stable Diffusion 3",
    "model.diffusion_model.joint_blocks.0.x": "Stable Diffusion 3",
    "double_blocks.0.x": "Flux",
    "conditioner.embedders.0.model.ln_final.weight": "the refiner of Stable Diffusion XL",
}


@pytest.mark.parametrize("tensor", OTHERS)
def test_other_models_in_a_single_file(tensor: str, tmp_path: Path) -> None:
    save_file(nest(tensor, "model.diffusion_model.x"), tmp_path / "a.safetensors")
    for load in (load_base, unet_config):
        with pytest.raises(ValueError, match=rf"a\.safetensors is {OTHERS[tensor]}; a base model can be Stable Diffusion 1\.x, 2\.x or XL"):
            load(tmp_path / "a.safetensors")


FOLDERS = {
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "Flux",
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_models_in_a_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ValueError, match=f"is {FOLDERS[kind]}; a base model can be"):
        cli.run(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out.png")])


def test_text_encoders_that_do_not_fit(files: Get, tmp_path: Path) -> None:
    made = files("sdxl")
    for part in ("unet", "vae", "tokenizer", "scheduler"):
        (tmp_path / part).symlink_to(made.folder / part)
    (tmp_path / "text_encoder").symlink_to(made.folder / "text_encoder_2")
    with pytest.raises(ValueError, match="reads text tokens of width 40, but its text encoder gives 24"):
        load_base(tmp_path)


def test_every_family_is_named() -> None:
    assert set(FAMILIES) == {"Stable Diffusion 1.x", *KINDS.values()}
