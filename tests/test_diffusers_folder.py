"""Whole pipelines as diffusers folders: diffusers loads what we write and draws the same, and nothing is lost on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_families
import torch
from base_files import IMAGE, equal, names
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peers import clip_tokenizer, randomise, text_pair, vae_pair, vision_pair
from safetensors.torch import load_file, save_file
from small_models import BASES, EULER, SCHEDULER, Ask, Model, build, theirs
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from checkpoints.adapters import adapter_file, adapter_kind
from checkpoints.base import Base
from checkpoints.cards import save
from checkpoints.convert import convert, verify
from checkpoints.diffusers_folder import SCHEDULER as DEFAULT
from checkpoints.diffusers_folder import save_pipeline, save_tokenizer
from checkpoints.names import projection_names
from checkpoints.stable_diffusion import scheduler_config, unet_config
from model.image_projection import FacePlus
from model.unet import UNet
from sampling.scheduler_file import schedule_of
from weights_convert import main

Get = Callable[[str], Model]
PIPELINES: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Get:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = build(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def opened(folder: Path, name: str) -> Any:
    """Diffusers' pipeline, with nothing but the folder."""
    pipe = PIPELINES[name].from_pretrained(folder, **({"add_watermarker": False} if name == "sdxl" else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parity("diffusers StableDiffusionPipeline and StableDiffusionXLPipeline.from_pretrained", 0)
@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_draws_the_same(models: Get, tmp_path: Path, name: str) -> None:
    """From its own folder to ours, and back: bit for bit the same weights, and the same picture."""
    model, ask = models(name), Ask("A photo of a fox, 4k", "blurry", size=(24, 40), steps=3)
    convert(model.base, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back", diffusers=True)
    assert verify(model.base, tmp_path / "back") == []
    files = [folder / "scheduler" / "scheduler_config.json" for folder in (model.base, tmp_path / "back")]
    theirs_first, theirs_now = (json.loads(file.read_text()) for file in files)
    v = "v_prediction" if BASES[name].unet.prediction == "v" else "epsilon"
    assert theirs_now == theirs_first | {"prediction_type": v}
    pipe = opened(tmp_path / "back", name)
    pipe.scheduler = type(model.peers[0].scheduler).from_config(pipe.scheduler.config)
    want = theirs(model, ask, [])
    assert np.array_equal(theirs(replace(model, peers=(pipe,) * 3), ask, []), want) and want.std() > 20


@pytest.mark.parity("diffusers StableDiffusionPipeline.from_pretrained", 0)
def test_a_single_file_of_sd15(single: Path, folder: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "sd", diffusers=True)
    assert verify(folder, tmp_path / "sd") == []
    assert unet_config(tmp_path / "sd") == unet_config(single)
    pipe = opened(tmp_path / "sd", "sd15")
    assert pipe.safety_checker is None and type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert pipe.scheduler.config.clip_sample is False
    assert schedule_of(scheduler_config(tmp_path / "sd")) == schedule_of(scheduler_config(single)) == schedule_of({})
    convert(single, tmp_path / "slow", ema=True, diffusers=True, dtype=torch.bfloat16)
    slow = load_file(tmp_path / "slow" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in slow.values()} == {torch.bfloat16}


@pytest.mark.parity("diffusers StableDiffusionPipeline and StableDiffusionXLPipeline.from_pretrained", 0)
@pytest.mark.parametrize(("name", "kind"), [("sd2", "sd21"), ("sdxl", "sdxl")])
def test_a_single_file_of_sd2_and_sdxl(tmp_path: Path, name: str, kind: str) -> None:
    made = test_families.build(tmp_path, name)
    arguments = ["convert", "--diffusers", str(made.single), str(tmp_path / "out")]
    if name == "sd2":
        with pytest.raises(SystemExit, match="does not say what its UNet predicts: give --prediction v"):
            main(arguments)
        assert not (tmp_path / "out").exists()
        arguments += ["--prediction", "v"]
    main(arguments)
    assert verify(made.folder, tmp_path / "out") == []
    assert unet_config(tmp_path / "out") == test_families.UNETS[name]
    pipe = opened(tmp_path / "out", kind)
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    assert pipe.vae.config.scaling_factor == test_families.VAES[name].scale and pipe.vae.config.force_upcast == (name == "sdxl")
    assert (pipe.tokenizer_2 if name == "sdxl" else pipe.tokenizer).pad_token_id == 0
    if name == "sdxl":
        assert pipe.config.force_zeros_for_empty_prompt and schedule_of(scheduler_config(tmp_path / "out")) == schedule_of(EULER)


def test_an_inpainting_model(tmp_path: Path) -> None:
    unet, small = BASES["sd15"].unet, BASES["sd15"]
    ours = Base(randomise(UNet(replace(unet, in_channels=9))), vae_pair(small.vae)[1], text_pair(small.text)[1])
    save_pipeline(ours, SCHEDULER, tmp_path, torch.float32)
    pipe: Any = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    assert pipe.unet.config.in_channels == 9
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"


@pytest.mark.parity("transformers CLIPTokenizer.from_pretrained", 0)
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_tokenizer(tmp_path: Path, pad: str) -> None:
    wanted, prompts = clip_tokenizer(pad), ["A fox, 4k -- naïve café's", "", "ab " * 90]
    save_tokenizer(wanted.pad_token_id, tmp_path / "tokenizer")
    peer: Any = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    given = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert peer.model_max_length == 77 and peer(prompts, **given).input_ids == wanted(prompts, **given).input_ids
    assert json.loads((tmp_path / "tokenizer" / "vocab.json").read_text()) == wanted.get_vocab()


@pytest.mark.parity("diffusers and transformers from_pretrained", 0)
def test_one_network(tmp_path: Path) -> None:
    text = replace(BASES["sdxl"].text_2 or BASES["sdxl"].text, mlp_ratio=2.35)
    pairs: dict[str, tuple[Any, Any, Any]] = {
        "vae": (AutoencoderKL, *vae_pair(BASES["wide"].vae)),
        "text": (CLIPTextModelWithProjection, *text_pair(text)),
        "text without projection": (CLIPTextModel, *text_pair(BASES["wide"].text)),
        "image": (CLIPVisionModelWithProjection, *vision_pair(replace(IMAGE, mlp_ratio=3.7))),
    }
    for name, (kind, peer, ours) in pairs.items():
        save(ours, tmp_path / f"{name}.safetensors", {}, None)
        convert(tmp_path / f"{name}.safetensors", tmp_path / name, diffusers=True)
        module = kind.from_pretrained(tmp_path / name, torch_dtype=torch.float64)
        equal(module.eval().requires_grad_(False), peer, torch.float64)
        theirs_config, wanted = module.config, peer.config
        for key in ("hidden_act", "intermediate_size", "scaling_factor", "block_out_channels", "projection_dim"):
            assert (entry := getattr(theirs_config, key, None)) is None or list(np.ravel(entry)) == list(np.ravel(getattr(wanted, key)))
        convert(tmp_path / name, tmp_path / "again.safetensors")
        assert verify(tmp_path / f"{name}.safetensors", tmp_path / "again.safetensors") == []


def test_networks_that_transformers_lacks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no text encoder with a reduced vocabulary"):
        main(["convert", "--diffusers", "weights", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no text encoder with a reduced vocabulary"):
        main(["convert", "--diffusers", "weights/text_encoder.safetensors", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no CLIP image encoder that is a ResNet"):
        main(["convert", "--diffusers", "weights/image_encoder.safetensors", str(tmp_path / "out")])
    assert names(tmp_path) in ([], ["out"])


@pytest.mark.parity("diffusers load_ip_adapter", 0)
def test_adapters_as_both_official_files(models: Get, tmp_path: Path) -> None:
    model = models("sd15")
    bin_file, safe = model.adapters
    paths = [tmp_path / name for name in ("a.safetensors", "a.bin", "b.bin", "b.safetensors")]
    for source, target in zip((bin_file, paths[0], safe, paths[2]), paths, strict=True):
        convert(source, target)
    assert verify(bin_file, paths[0]) == verify(bin_file, paths[1]) == verify(safe, paths[2]) == verify(safe, paths[3]) == []
    nested, want = (torch.load(path, weights_only=True) for path in (paths[1], bin_file))
    assert {part: set(tensors) for part, tensors in nested.items()} == {part: set(tensors) for part, tensors in want.items()}
    assert paths[1].stat().st_size < 1.2 * bin_file.stat().st_size
    pipe = StableDiffusionPipeline.from_pretrained(model.base, safety_checker=None)
    for path in paths:
        pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
        assert torch.equal(pipe.unet.encoder_hid_proj.image_projection_layers[0].norm.weight, load_file(
            paths[0 if path.stem == "a" else 3])["image_proj.norm.weight"])  # fmt: skip
        pipe.unload_ip_adapter()
    with pytest.raises(ValueError, match=r"name TARGET\.safetensors or TARGET\.bin, not"):
        convert(bin_file, tmp_path / "a.pt")


def test_plus_v2_keeps_its_name(tmp_path: Path) -> None:
    state = FacePlus(1280, 768, 4, 8, heads=1).state_dict()
    tensors = {theirs: state[ours.removeprefix("image_projection.")] for ours, (theirs,) in projection_names(
        f"image_projection.{name}" for name in state).items()}  # fmt: skip
    for name, other in (("plusv2", "plus"), ("plus", "plusv2")):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"which only the name of a file says: name another TARGET than .*plusv2"):
            convert(tmp_path / f"{name}.safetensors", tmp_path / f"{other}.bin")
        convert(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.bin")
        assert adapter_kind(adapter_file(tmp_path / f"{name}.bin")).endswith("V2") == (name == "plusv2")


def test_the_default_schedule_is_ours() -> None:
    assert schedule_of(DEFAULT) == schedule_of({})
