"""IP-Adapter Plus and Full, for fine-grained features: the projections, their files and whole pictures against diffusers'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from peers import max_error, number_of, official_projection, randn, randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import BASES, Ask, Model, adapter, build, flat, theirs
from tiny import difference, draw
from torch import Tensor

from checkpoints import cards
from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.clip import load_image_encoder
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect
from checkpoints.names import adapter_names, projection_names
from checkpoints.stable_diffusion import load_unet
from model.adapter import IPAdapter
from model.image_encoder import ImageEncoder, normalise
from model.image_projection import ImageProjection, MLPProjection, Projection, Resampler
from model.unet import SD15, SDXL, UNet, UNetConfig
from sampling import command
from sampling.embeddings import PictureWeights
from sampling.images import to_images
from sampling.loading import load
from sampling.pipeline import Pipeline
from sampling.request import ImagePrompt, Request

Tensors = dict[str, Tensor]
TOLERANCE = 1e-12  # measured: 4e-15
LEVEL = 1
SMALL = BASES["sd15"]
SIZES = {"Plus": {"tokens": 5, "width": 20, "heads": 2}, "Full": {}}  # of what the small encoder's features go through


def in_official_names(projection: Projection) -> Tensors:
    state = {f"image_projection.{name}": tensor for name, tensor in projection.state_dict().items()}
    return {theirs.removeprefix("image_proj."): state[ours] for ours, (theirs,) in projection_names(state).items()}


# The projections.


@pytest.mark.parity("diffusers IPAdapterPlusImageProjection, IPAdapterFullImageProjection", TOLERANCE)
@pytest.mark.parametrize("batch, features, heads", [(1, 2, 1), (3, 7, 1), (2, 257, 3)])
@pytest.mark.parametrize("form", ["Plus", "Full"])
def test_the_projection_equals_diffusers(form: str, batch: int, features: int, heads: int) -> None:
    """diffusers reads our weights by their official names. They are float64 that float32 can hold, as it reads into that."""
    ours = Resampler(15, 12, tokens=5, width=22, heads=heads) if form == "Plus" else MLPProjection(15, 12)
    state = in_official_names(randomise(ours, seed=heads).float().double())
    peer: Any = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers(None, state, False)
    assert type(peer) is (IPAdapterPlusImageProjection if form == "Plus" else IPAdapterFullImageProjection)
    peer.double()
    x = randn(batch, features, 15)
    assert ours(x).shape == (batch, 5 if form == "Plus" else features, 12)
    assert max_error(ours(x), peer(x)) <= TOLERANCE


# The official size.

PARAMETERS = {
    "Plus": (SD15, Resampler, {}, 49_087_488, 83),
    "Plus for SDXL": (SDXL, Resampler, {"width": 1280, "heads": 20}, 423_748_864, 191),
    "Full": (SD15, MLPProjection, {}, 21_794_304, 38),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_size(name: str) -> None:
    """Parameters and tensors of the released files; the names are a bijection onto theirs, between tensors of one shape."""
    config, form, sizes, parameters, tensors = PARAMETERS[name]
    with torch.device("meta"):
        unet = UNet(config)
        whole = IPAdapter(unet, form(1280, config.context_dim, **sizes))
    assert number_of(whole) == (parameters, tensors)
    assert adapter_names(whole.state_dict(), unet).keys() == whole.state_dict().keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in in_official_names(whole.image_projection).items()}
    assert len(shapes) == len(whole.image_projection.state_dict())
    assert shapes == official_projection(name[:4], 1280, config.context_dim, **sizes)


# Files in the official layout.


def write(model: Model, form: str, seed: int, path: Path) -> Tensors:
    """A random adapter of the small base; the projection of a .bin is in float32, its layers in float16, as released."""
    shapes = official_projection(form, SMALL.image.width, SMALL.unet.context_dim, **SIZES[form])

    def random(i: int, name: str, shape: tuple[int, ...]) -> Tensor:
        noise = randn(*shape, seed=1000 * seed + i, dtype=torch.float32)
        if len(shape) == 1:
            return 0.3 * noise + ("norm" in name or name.endswith("1.0.weight")) * name.endswith("weight")
        return noise * shape[-1] ** -0.5 * (2 if "to_q" in name or "to_kv" in name else 1)

    file = adapter(model.peers[0].unet, 1, seed)
    file["image_proj"] = {name: random(i, name, shape) for i, (name, shape) in enumerate(shapes.items())}
    if path.suffix == ".bin":
        file["ip_adapter"] = {name: tensor.half() for name, tensor in file["ip_adapter"].items()}
        torch.save(file, path)
    else:
        save_file(flat(file), path)
    return flat(file)


@dataclass(frozen=True)
class Files:
    """A small base model on disk, and by their names adapters of all forms for it, with what was written."""

    model: Model
    paths: dict[str, Path]
    tensors: dict[str, Tensors]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    model = build(tmp_path_factory.mktemp("plus"), "sd15")
    folder = model.adapters[0].parent
    paths = {"Plus": folder / "plus.safetensors", "Full": folder / "full.bin"}
    tensors = {form: write(model, form, 5 + i, path) for i, (form, path) in enumerate(paths.items())}
    return Files(model, paths | {"base": model.adapters[0]}, tensors)


@pytest.fixture(scope="module")
def unet(files: Files) -> UNet:
    return load_unet(files.model.base / "unet")


@pytest.mark.parametrize("form", ["Plus", "Full"])
def test_files_there_and_back(files: Files, unet: UNet, tmp_path: Path, form: str) -> None:
    """Bit for bit, with every size read from the shapes."""
    actual = load_adapter(files.paths[form], unet, SMALL.image, dtype=None)
    save_adapter(actual, unet, tmp_path / "back.safetensors", {"a": 1}, dtype=None)
    convert(files.paths[form], tmp_path / "converted.safetensors")
    for name in ("back", "converted"):
        back = load_file(tmp_path / f"{name}.safetensors")
        assert back.keys() == files.tensors[form].keys()
        assert all(t.dtype == back[k].dtype and torch.equal(t, back[k]) for k, t in files.tensors[form].items())
        assert verify(files.paths[form], tmp_path / f"{name}.safetensors") == []
    assert not any(p.is_meta or p.requires_grad for p in actual.parameters()) and not actual.training


@pytest.mark.parity("IP-Adapter trainer, the names that it saves", 0)
def test_the_official_trainers_checkpoint_is_read(files: Files, unet: UNet, tmp_path: Path) -> None:
    names = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    trained = files.tensors["Plus"]
    for new, old in names.items():
        trained = {name.replace(new, old, 1): tensor for name, tensor in trained.items()}
    save_file(trained | {"unet.conv_in.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert verify(files.paths["Plus"], tmp_path / "model.safetensors") == []
    assert isinstance(load_adapter(tmp_path / "model.safetensors", unet).image_projection, Resampler)


def test_inspect(files: Files, tmp_path: Path) -> None:
    plus, full = inspect(files.paths["Plus"]), inspect(files.paths["Full"])
    assert plus[0] == "IP-Adapter Plus for 24-d, reads the fine features of 24-d, 5 tokens"
    assert full[0] == "IP-Adapter Full for 24-d, reads the fine features of 24-d, one token per feature"
    assert plus[1].endswith("in 65 tensors, float32")
    assert full[1].endswith("in 20 tensors, 8,448 float16, 1,248 float32")
    for form, lines in (("Plus", plus), ("Full", full)):
        assert f"{sum(t.numel() for t in files.tensors[form].values()):,} parameters" in lines[1]
        assert len(lines) == 4 and lines[2].startswith("needs --image-encoder: ") and lines[3].startswith("goes with 24-d")
    shapes = official_projection("Plus", 1280, 768)
    layers = {f"{i}.to_{x}_ip.weight": (1, 768) for i in range(1, 33, 2) for x in "kv"}
    sizes = {f"image_proj.{k}": v for k, v in shapes.items()} | {f"ip_adapter.{k}": v for k, v in layers.items()}
    tensors = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in sizes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    head, *lines = inspect(tmp_path / "a.safetensors")
    odd = [line for line in lines if line.startswith("odd")]
    assert head == (
        "IP-Adapter Plus for Stable Diffusion 1.5 (768-d), reads the fine features of ViT-H (1280-d), 16 tokens"
    )
    assert len(odd) == 1 and "not float32" in odd[0]


# What does not fit.

PREFIX = "image_proj."
BROKEN: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "latents": ("Plus", lambda t: t.update({PREFIX + "latents": torch.ones(5, 20)}), "latents is missing or misshapen"),
    "in": ("Plus", lambda t: t.pop(PREFIX + "proj_in.weight"), r"proj_in\.weight is missing or misshapen"),
    "empty": ("Plus", lambda t: t.update({PREFIX + "latents": torch.ones(1, 0, 20)}), "latents is missing or"),
    "heads": ("Plus", lambda t: t.update({PREFIX + "layers.0.0.to_q.weight": torch.ones(65, 20)}), "heads of width 64"),
    "keys": ("Plus", lambda t: t.pop(PREFIX + "layers.2.0.to_kv.weight"), r"it also holds|it lacks"),
    "a layer": ("Plus", lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k], r"lacks image_proj\.layers\.1"),
    "width": (
        "Plus",
        lambda t: t.update({PREFIX + "layers.3.1.1.weight": torch.ones(60, 20)}),
        r"\[60, 20\], not \[80",
    ),
    "norm": ("Plus", lambda t: t.pop(PREFIX + "norm_out.bias"), r"lacks image_proj\.norm_out\.bias"),
    "more": ("Full", lambda t: t.update({PREFIX + "norm.weight": torch.ones(24)}), r"also holds image_proj\.norm"),
    "first": ("Full", lambda t: t.pop(PREFIX + "proj.0.weight"), r"proj\.0\.weight is missing or misshapen"),
    "hidden": ("Full", lambda t: t.update({PREFIX + "proj.2.weight": torch.ones(24, 30)}), r"is \[24, 30\], not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(files: Files, unet: UNet, tmp_path: Path, case: str) -> None:
    form, edit, sentence = BROKEN[case]
    tensors = dict(files.tensors[form])
    edit(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=sentence) as refused:
        load_adapter(tmp_path / "a.safetensors", unet)
    assert "a.safetensors" in str(refused.value)


@pytest.mark.parametrize("form", ["Plus", "Full"])
def test_another_encoder_or_base_is_refused(files: Files, unet: UNet, form: str) -> None:
    wants = r"needs the fine features of 24-d, but you gave the fine features of ViT-bigG \(1664-d\): pass that encoder as"
    with pytest.raises(ValueError, match=wants):
        load_adapter(files.paths[form], unet, replace(SMALL.image, output_dim=24, width=1664))
    wide = copy.deepcopy(unet)
    wide.config = UNetConfig(context_dim=768)
    with pytest.raises(ValueError, match=r"is an adapter for 24-d, but you gave a base model of Stable Diffusion 1\.5"):
        load_adapter(files.paths[form], wide)
    other = load_adapter(files.paths[form], unet, replace(SMALL.image, output_dim=7)).image_projection  # the embedding's width says nothing
    with pytest.raises(ValueError, match="reads fine features of width 24, but the image encoder gives 25: use the"):
        other(torch.zeros(1, 3, 25))
    with pytest.raises(ValueError, match="reads fine features, a matrix for each picture"):
        other(torch.zeros(1, 1, 24))
    with pytest.raises(ValueError, match="reads image embeddings, a vector for each picture"):
        ImageProjection(24, 6)(torch.zeros(1, 3, 24))


# Whole pictures.

FOX, OWL = "A photo of a fox, 4k", "blurry; an owl"
ASKS = {
    "Plus": (["Plus"], Ask(FOX, OWL, [[0]], [0.7])),
    "Plus, image alone": (["Plus"], Ask("", "", [[1]], [1.0], guidance=3)),
    "Plus, three pictures": (["Plus"], Ask(FOX, "", [[0, 1, 2]], [0.7], num=2)),
    "Full": (["Full"], Ask(FOX, OWL, [[0]], [0.7], num=2)),
    "Full, two pictures": (["Full"], Ask("", "", [[2, 1]], [1.0], eta=1)),
    "base and Plus": (["base", "Plus"], Ask(FOX, OWL, [[0], [1, 2]], [0.5, 0.6])),
    "Plus, base and Full": (["Plus", "base", "Full"], Ask(FOX, OWL, [[0, 2], [1], [2]], [0.5, 0.6, 0.4], num=2)),
}


def ours(files: Files, forms: list[str], ask: Ask, pictures: list[Path]) -> np.ndarray:
    pipe = load(files.model.base, [files.paths[form] for form in forms], files.model.encoder)
    opened = [[Image.open(pictures[i]).convert("RGB") for i in numbers] for numbers in ask.images]
    drawn = pipe.sample(
        [ask.prompt] * ask.num,
        [ask.seed + i for i in range(ask.num)],
        [pipe.embed(prompt, adapter=i) for i, prompt in enumerate(opened)],
        [ask.negative] * ask.num,
        ask.scales,
        ask.guidance,
        ask.steps,
        ask.eta,
        ask.size,  # type: ignore[arg-type]
    )
    return np.stack([np.asarray(image).astype(int) for image in to_images(drawn)])


def diffusers(files: Files, forms: list[str], ask: Ask, pictures: list[Path]) -> np.ndarray:
    pipe, folder = files.model.peers[0], files.model.encoder.parent
    pipe.load_ip_adapter(folder.parent, subfolder="models", weight_name=[files.paths[form].name for form in forms])
    try:
        return theirs(replace(files.model, peers=(pipe,) * (len(forms) + 1)), ask, pictures)  # type: ignore[arg-type]
    finally:
        pipe.unload_ip_adapter()


@pytest.mark.parity("diffusers StableDiffusionPipeline with Plus and Full, in levels of 255", LEVEL)
@pytest.mark.parametrize("name", ASKS)
def test_the_picture_is_diffusers(files: Files, pictures: list[Path], name: str) -> None:
    forms, ask = ASKS[name]
    want, got = diffusers(files, forms, ask, pictures), ours(files, forms, ask, pictures)
    assert want.shape == (ask.num, 24, 40, 3)
    assert difference(got, want) <= LEVEL
    assert want.std() > 20 and ((want == 0) | (want == 255)).mean() < 0.5  # neither grey nor cut off


def test_each_adapter_of_a_request_has_its_own_pictures(files: Files, pictures: list[Path]) -> None:
    """Pictures, weights and negatives of each image prompt, encoded as its adapter reads them."""
    pipe = load(files.model.base, [files.paths["base"], files.paths["Plus"]], files.model.encoder)
    a, b, c = pictures[:3]
    prompts = ImagePrompt((a, b), 0.5, weights=(0.3, 1.5), negatives=(c,)), ImagePrompt((b, c), 0.6, weights=(0.4, 0.9), negatives=(a,))
    drawn = pipe.draw(Request(FOX, prompts, steps=2, width=40, height=24))
    want = pipe.sample(
        FOX,
        0,
        [pipe.embed([a, b]), pipe.embed([b, c], adapter=1)],
        scale=[0.5, 0.6],
        steps=2,
        size=(24, 40),
        against=[pipe.embed(c), pipe.embed(a, adapter=1)],
        weights=[PictureWeights((0.3, 1.5)), PictureWeights((0.4, 0.9))],
    )
    assert difference(np.asarray(drawn).astype(int), np.asarray(to_images(want)[0]).astype(int)) == 0


def zero_features(_: Pipeline, __: IPAdapter, like: Tensor) -> Tensor:
    return torch.zeros_like(like)


def black_picture(self: Pipeline, _: IPAdapter, like: Tensor) -> Tensor:
    size = SMALL.image.image_size
    return self.image.fine(normalise(torch.zeros(1, 3, size, size))).expand_as(like)  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["Plus", "Full"])
@pytest.mark.parametrize("null", [zero_features, black_picture])
def test_another_null_image_shows(
    files: Files, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, form: str, null: Callable[..., Tensor]
) -> None:
    """Zero pixels after normalisation, through the encoder, are neither a zero embedding nor a black picture."""
    ask = Ask(FOX, OWL, [[0]], [1.0])
    right = ours(files, [form], ask, pictures)
    monkeypatch.setattr(Pipeline, "null", null)
    assert difference(ours(files, [form], ask, pictures), right) > 10


@pytest.mark.parametrize("form", ["Plus", "Full"])
def test_an_encoder_of_another_width_is_refused_at_load(files: Files, form: str, tmp_path: Path) -> None:
    encoder = load_image_encoder(files.model.encoder)
    wider = ImageEncoder(replace(encoder.config, width=2 * encoder.config.width))
    cards.save(wider, tmp_path / "image_encoder.safetensors", {})
    with pytest.raises(ValueError, match="needs the fine features of 24-d, but you gave the fine features of 48-d"):
        load(files.model.base, [files.paths[form]], tmp_path / "image_encoder.safetensors")


def test_without_the_encoder_there_is_no_null_image(files: Files) -> None:
    pipe = load(files.model.base, [files.paths["Plus"]])
    e = torch.zeros(1, 1, 17, SMALL.image.width)
    with pytest.raises(ValueError, match="computed by the image encoder: load one"):
        pipe.contexts([""], [""], e)


def test_an_embedding_of_plus_needs_the_encoder_for_its_null_image(
    files: Files, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for before the weights are read. A negative picture takes the place of the null image."""
    kept, common = tmp_path / "kept.safetensors", ["--steps", 1, "--width", 16, "--height", 16]
    files_of = ["--ip-adapter", files.paths["Plus"], "--image-encoder", files.model.encoder]
    draw(files.model.base, tmp_path / "a.png", *common, *files_of, "--image", pictures[0], "--save-embedding", kept)
    draw(files.model.base, tmp_path / "b.png", *common, *files_of[:2], "--image", kept, "--negative-image", kept)
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(FileNotFoundError, match=r"an image prompt needs --image-encoder, because .* has none"):
        draw(files.model.base, tmp_path / "c.png", *common, *files_of[:2], "--image", kept)
