"""Stable Diffusion XL whole: its options, edits, controls and layers against diffusers' pipelines, from the same files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_peers import controlnet_pair, t2i_pair
from diffusers import (
    ControlNetModel,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers import T2IAdapter as PeerT2I
from input_pictures import write_inputs
from PIL import Image
from small_models import BASES, Model, build
from tiny import difference

from checkpoints.stable_diffusion import load_base
from model.controlnet import ControlNetConfig
from model.t2i import T2IConfig
from sampling import __main__ as cli
from sampling.loading import load
from sampling.micro import Micro

FOX, OWL = "A photo of a fox, 4k", "blurry; an owl"
LEVEL = 1  # of 255
SIZE = (32, 48)
UNET = BASES["sdxl"].unet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("sdxl")
    controlnet_pair(ControlNetConfig.of(UNET, (4, 6)), True, seed=20)[0].float().save_pretrained(folder / "controlnet")
    t2i_pair(T2IConfig((*UNET.channels, UNET.channels[-1]), unshuffle=4, form="xl"), seed=30)[0].float().save_pretrained(folder / "t2i")
    write_inputs(folder, SIZE, 96)
    return build(folder, "sdxl")


def opened(model: Model, name: str) -> Image.Image:
    return Image.open(model.base.parent / name)


def ours(model: Model, options: str, folder: Path, adapter: bool = True) -> np.ndarray:
    """What the command line draws; `{}` in the options is the folder of the files."""
    files = f"--checkpoint {model.base} --out {folder / 'out.png'}"
    if adapter:
        files += f" --ip-adapter {model.adapters[0]} --image-encoder {model.encoder} --image {model.base.parent / 'prompt.png'}"
    size = "" if "--init-image" in options else f"--height {SIZE[0]} --width {SIZE[1]}"
    given = f"{files} {size} --seed 11 --steps 5 --guidance 4 {options.replace('{}', str(model.base.parent))}"
    negative = [] if "--zero-negative" in options else ["--negative-prompt", OWL]
    cli.run([*given.split(), "--prompt", FOX, *negative])
    return np.asarray(Image.open(folder / "out.png")).astype(int)


def theirs(model: Model, kind: Any = None, scale: Any = None, parts: dict[str, Any] | None = None, **given: Any) -> np.ndarray:
    """What a pipeline of diffusers draws, with an adapter if a `scale` is given."""
    pipe = model.peers[0 if scale is None else 1]
    if kind:
        watermark = {} if kind is StableDiffusionXLAdapterPipeline else {"add_watermarker": False}
        pipe = kind(**pipe.components, **(parts or {}), **watermark)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the VAE's factor
    if scale is not None:
        pipe.set_ip_adapter_scale(scale)
        given["ip_adapter_image"] = [[opened(model, "prompt.png").convert("RGB")]]
    given = {"negative_prompt": OWL, "generator": torch.Generator().manual_seed(11)} | given
    if kind is not StableDiffusionXLImg2ImgPipeline:
        given |= {"height": SIZE[0], "width": SIZE[1]}
    return np.asarray(pipe(FOX, num_inference_steps=5, guidance_scale=4, **given).images[0]).astype(int)


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert want.shape == (*SIZE, 3) and difference(got, want) <= LEVEL
    assert want.std() > 20 and ((want == 0) | (want == 255)).mean() < 0.5  # neither grey nor cut off


@pytest.mark.parity("diffusers StableDiffusionXLPipeline, in levels of 255", LEVEL)
def test_sizes_and_negatives(model: Model, tmp_path: Path) -> None:
    sizes = {"original_size": (70, 90), "crops_coords_top_left": (3, 5), "target_size": (60, 50)}
    negative = {f"negative_{name}": value for name, value in sizes.items()}
    got = ours(model, "--original-size 90 70 --crop-corner 5 3 --target-size 50 60", tmp_path, adapter=False)
    same(got, theirs(model, **sizes, **negative))
    plain = ours(model, "", tmp_path, adapter=False)
    same(plain, theirs(model))
    zeros = ours(model, "--zero-negative", tmp_path, adapter=False)
    same(zeros, theirs(model, negative_prompt=None))
    assert difference(got, plain) > 10 and difference(zeros, plain) > 10


STYLE, LAYOUT = {"up": {"block_0": [0.0, 1.0, 0.0]}}, {"down": {"block_2": [0.0, 1.0]}}
BLOCKS = {"down": {"block_1": [0.0, 0.5]}, "mid": 0.7, "up": {"block_0": [0.1, 1.0, 0.3], "block_1": 0.2}}


@pytest.mark.parity("diffusers StableDiffusionXLPipeline.set_ip_adapter_scale, in levels of 255", LEVEL)
@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("style", STYLE), ("layout", LAYOUT), (json.dumps(BLOCKS, separators=(",", ":")), BLOCKS)],
    ids=["style", "layout", "blocks"],
)
def test_layers(model: Model, tmp_path: Path, layers: str, blocks: Any) -> None:
    """InstantStyle's presets name SDXL's blocks, and a dict names any."""
    got = ours(model, f"--image-layers {layers}", tmp_path)
    same(got, theirs(model, scale=blocks))
    assert difference(got, ours(model, "--scale 0", tmp_path)) > 10


@pytest.mark.parity("diffusers StableDiffusionXLPipeline ip_adapter_masks, in levels of 255", LEVEL)
def test_a_mask(model: Model, tmp_path: Path) -> None:
    left = torch.from_numpy(np.array(opened(model, "left.png"))).float() / 255
    got = ours(model, "--scale 0.8 --image-mask {}/left.png", tmp_path)
    same(got, theirs(model, scale=0.8, cross_attention_kwargs={"ip_adapter_masks": [left[None, None]]}))
    assert difference(got, ours(model, "--scale 0.8", tmp_path)) > 10


@pytest.mark.parity("diffusers StableDiffusionXLImg2ImgPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
def test_image_to_image(model: Model, tmp_path: Path, strength: float) -> None:
    init = opened(model, "init.png")
    got = ours(model, f"--scale 0.6 --init-image {{}}/init.png --strength {strength}", tmp_path)
    same(got, theirs(model, StableDiffusionXLImg2ImgPipeline, 0.6, image=init, strength=strength))


@pytest.mark.parity("diffusers StableDiffusionXLInpaintPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(model: Model, tmp_path: Path, strength: float) -> None:
    files = {"image": opened(model, "init.png"), "mask_image": opened(model, "mask.png")}
    options = f"--scale 0.6 --init-image {{}}/init.png --mask {{}}/mask.png --no-paste --strength {strength}"
    same(ours(model, options, tmp_path), theirs(model, StableDiffusionXLInpaintPipeline, 0.6, **files, strength=strength))


@pytest.mark.parity("diffusers StableDiffusionXLControlNetPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("guess", [False, True])
def test_a_controlnet(model: Model, tmp_path: Path, guess: bool) -> None:
    net = ControlNetModel.from_pretrained(model.base.parent / "controlnet")
    options = "--scale 0.6 --control {}/controlnet --hint {}/hint.png --control-scale 0.8"
    given = {"image": opened(model, "hint.png"), "controlnet_conditioning_scale": 0.8, "guess_mode": guess}
    want = theirs(model, StableDiffusionXLControlNetPipeline, 0.6, {"controlnet": net}, **given)
    same(ours(model, options + (" --guess" if guess else ""), tmp_path), want)


@pytest.mark.parity("diffusers StableDiffusionXLAdapterPipeline, in levels of 255", LEVEL)
def test_a_t2i_adapter(model: Model, tmp_path: Path) -> None:
    net: Any = PeerT2I.from_pretrained(model.base.parent / "t2i")
    hint = opened(model, "hint.png").resize(SIZE[::-1], Image.Resampling.LANCZOS)
    want = theirs(model, StableDiffusionXLAdapterPipeline, 0.6, {"adapter": net}, image=hint, adapter_conditioning_scale=0.8)
    same(ours(model, "--scale 0.6 --control {}/t2i --hint {}/hint.png --control-scale 0.8", tmp_path), want)


def test_float16_keeps_the_vae_in_float32(model: Model, tmp_path: Path) -> None:
    """Its activations exceed float16. Beside a UNet in float16 the picture is that of float32, nearly."""
    half = load(model.base, model.adapters[0], model.encoder, torch.float16)
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for part in (half.unet, half.text, *half.adapters) for p in part.parameters()} == {torch.float16}
    loud = replace(half.vae.config, force_upcast=False)
    (tmp_path / "vae").mkdir()
    config = json.loads((model.base / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        (model.base / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    other = load_base(model.base, torch.float16, vae=tmp_path / "vae").vae
    assert other.config == loud and {p.dtype for p in other.parameters()} == {torch.float16}
    one, two = (ours(model, f"--dtype {dtype}", tmp_path) for dtype in ("float32", "bfloat16"))
    assert 0 < difference(one, two) < 60


def test_an_empty_prompt_is_not_zeroed(model: Model) -> None:
    """Only an empty negative prompt is."""
    uncond, cond = load(model.base).texts([""], [""], (16, 24), Micro(zero_negative=True))
    assert cond.text.any() and not uncond.text.any()
