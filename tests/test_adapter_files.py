"""Adapters from files: every layout there and back, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from base_files import IMAGE, Tensors, change, layers, names, nest
from peers import SMALL_UNETS, UNetPair, max_error, randn, unet_pair
from safetensors.torch import load_file, save_file

from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect
from checkpoints.names import adapter_names
from checkpoints.stable_diffusion import load_base
from model.adapter import IPAdapter
from model.context import Context
from model.image_encoder import VIT_H
from model.image_projection import ImageProjection
from model.unet import UNet, UNetConfig

IMAGE_DIM = 10
DOUBLE = 1e-11  # measured: 1e-13


DEEP = UNetConfig(channels=(8,), depth=(11,), mid_depth=11, heads=(2,), res_blocks=1, context_dim=6, groups=4)
ADAPTER_UNETS = {"sd15": SMALL_UNETS["sd15"], "sdxl": SMALL_UNETS["sdxl"], "deep": (DEEP, True)}
FORMS = ("bin", "safetensors", "old bin", "zipped bin", "trainer", "trainer bin", "new trainer")


@dataclass(frozen=True)
class Official:
    """An adapter as the official files have it, flat, and as the official trainer leaves it."""

    flat: Tensors
    processors: Tensors

    @property
    def nested(self) -> dict[str, Tensors]:
        return {
            part: {k.removeprefix(f"{part}."): v for k, v in self.flat.items() if k.startswith(f"{part}.")}
            for part in ("image_proj", "ip_adapter")
        }


def official(peer: Any) -> Official:
    """Random, for diffusers' UNet; the number of a layer is its place among the attention processors."""
    width = peer.config.cross_attention_dim
    flat = {
        "image_proj.proj.weight": randn(4 * width, IMAGE_DIM, seed=1),
        "image_proj.proj.bias": randn(4 * width, seed=2),
        "image_proj.norm.weight": randn(width, seed=3),
        "image_proj.norm.bias": randn(width, seed=4),
    }
    processors = {}
    for n, processor in enumerate(peer.attn_processors):
        if "attn2" in processor:
            like = peer.get_submodule(processor.removesuffix(".processor")).to_k.weight
            for i, to in enumerate(("to_k_ip.weight", "to_v_ip.weight")):
                flat[f"ip_adapter.{n}.{to}"] = randn(*like.shape, seed=10 + 2 * n + i)
                processors[f"unet.{processor}.{to}"] = flat[f"ip_adapter.{n}.{to}"]
    flat = {name: tensor.float() for name, tensor in flat.items()}
    return Official(flat, {name: tensor.float() for name, tensor in processors.items()})


def write_adapter(adapter: Official, peer: Any, path: Path, form: str) -> Path:
    path = path.with_suffix(".safetensors" if form in ("safetensors", "trainer", "new trainer") else ".bin")
    unet = {f"unet.{name}": tensor for name, tensor in peer.state_dict().items()}
    projection = {f"image_proj_model.{k}": v for k, v in adapter.nested["image_proj"].items()}
    modules = {f"adapter_modules.{k}": v for k, v in adapter.nested["ip_adapter"].items()}
    if form == "safetensors":
        save_file(adapter.flat, path)
    elif form == "trainer":
        save_file(unet | projection | modules, path)
    elif form == "trainer bin":
        torch.save(unet | projection | modules, path)
    elif form == "new trainer":  # accelerate drops one of two names for one tensor
        save_file(unet | projection | adapter.processors, path)
    else:
        torch.save(adapter.nested, path, _use_new_zipfile_serialization=form != "old bin")
    if form == "zipped bin":
        with ZipFile(path) as source:
            parts = {part: source.read(part) for part in source.namelist()}
        with ZipFile(path, "w", ZIP_DEFLATED) as target:
            for part, content in parts.items():
                target.writestr(part, content)
    return path


@pytest.fixture(scope="module")
def adapters() -> dict[str, tuple[UNetPair, Official]]:
    pairs = {name: unet_pair(*which) for name, which in ADAPTER_UNETS.items()}
    return {name: (pair, official(pair.peer)) for name, pair in pairs.items()}


Adapters = dict[str, tuple[UNetPair, Official]]


@pytest.mark.parity("IP-Adapter released files and trainer, the names in them", 0)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ADAPTER_UNETS)
def test_adapters_there_and_back(adapters: Adapters, tmp_path: Path, name: str, form: str) -> None:
    both, adapter = adapters[name]
    path = write_adapter(adapter, both.peer, tmp_path / "adapter", form)
    actual = load_adapter(path, both.ours, replace(IMAGE, output_dim=IMAGE_DIM))
    assert actual.own_projections and (actual.image_projection.tokens, actual.image_projection.image_dim) == (4, IMAGE_DIM)
    assert not any(p.is_meta or p.requires_grad for p in actual.parameters()) and not actual.training
    save_adapter(actual, both.ours, tmp_path / "back.safetensors", {"a": 1}, dtype=None)
    convert(path, tmp_path / "converted.safetensors")
    for file in ("back", "converted"):
        back = load_file(tmp_path / f"{file}.safetensors")
        assert back.keys() == adapter.flat.keys()
        assert all(t.dtype == torch.float32 and torch.equal(t, adapter.flat[k]) for k, t in back.items())
        assert verify(path, tmp_path / f"{file}.safetensors") == []


@pytest.mark.parity("diffusers _load_ip_adapter_weights", DOUBLE)
@pytest.mark.parametrize("name", ["sd15", "deep"])
def test_a_saved_adapter_is_diffusers(adapters: Adapters, tmp_path: Path, name: str) -> None:
    """diffusers takes the file that we write, and predicts what we predict."""
    both, adapter = adapters[name]
    actual = load_adapter(
        write_adapter(adapter, both.peer, tmp_path / "a", "new trainer"), both.ours, dtype=torch.float64
    )
    save_adapter(actual, both.ours, tmp_path / "back.safetensors", {}, dtype=torch.float32)
    file = Official(load_file(tmp_path / "back.safetensors"), {})
    peer = copy.deepcopy(both.peer)
    peer._load_ip_adapter_weights([file.nested], low_cpu_mem_usage=False)
    width = both.ours.config.context_dim
    x, t, text, picture = randn(2, 4, 8, 8, seed=1), torch.tensor([7, 981]), randn(2, 5, width), randn(2, IMAGE_DIM)
    want = peer(x, t, text, added_cond_kwargs={"image_embeds": [picture[:, None]]}).sample
    got = both.ours(x, t, actual(Context(text), picture))
    assert max_error(got, want) < DOUBLE
    assert max_error(got, both.ours(x, t, Context(text))) > 0.05


def test_adapters_keep_their_dtype(adapters: Adapters, tmp_path: Path) -> None:
    """Official files are half precision, and the projection of some is not."""
    both, adapter = adapters["sd15"]
    mixed = {k: v.half() if k.startswith("ip_adapter") else v for k, v in adapter.flat.items()}
    save_file(mixed, tmp_path / "a.safetensors")
    actual = load_adapter(tmp_path / "a.safetensors", both.ours, dtype=None)
    save_adapter(actual, both.ours, tmp_path / "b.safetensors", {}, dtype=None)
    assert verify(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == []
    assert {t.dtype for t in load_file(tmp_path / "b.safetensors").values()} == {torch.float16, torch.float32}
    assert {p.dtype for p in load_adapter(tmp_path / "a.safetensors", both.ours).parameters()} == {torch.float32}


def test_tokens_are_in_the_shapes(adapters: Adapters, tmp_path: Path) -> None:
    both, adapter = adapters["sd15"]
    width = both.ours.config.context_dim
    more = {"image_proj.proj.weight": randn(7 * width, 5).float(), "image_proj.proj.bias": randn(7 * width).float()}
    save_file(adapter.flat | more, tmp_path / "a.safetensors")
    projection = load_adapter(tmp_path / "a.safetensors", both.ours).image_projection
    assert (projection.tokens, projection.image_dim, projection.context_dim) == (7, 5, width)


# what is refused


@pytest.fixture(scope="module")
def tiny() -> UNet:
    """A UNet that reads SD 1.5's width of context."""
    return UNet(UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=768, groups=4))


def fitting(unet: UNet, image_dim: int = 1024) -> Tensors:
    """An adapter that this UNet takes."""
    adapter = IPAdapter(unet, ImageProjection(image_dim, unet.config.context_dim, 1))
    table = adapter_names(adapter.state_dict(), unet)
    return {new: adapter.state_dict()[ours].clone() for ours, (new,) in table.items()}


LORA = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
FOREIGN = {
    "FaceID": (nest("image_proj.proj.0.weight", "image_proj.norm.weight"), r"adapter: image_proj\.proj\.2\.weight is missing"),
    "FaceID LoRA": (nest("image_proj.proj.weight", "ip_adapter.0.to_q_lora.down.weight"), r"adapter: image_proj\.norm\.weight is missing"),
    "FaceID Plus": (nest("image_proj.perceiver_resampler.proj_in.weight"), r"adapter: image_proj\.proj\.0\.weight is missing"),
    "LoRA": (nest(LORA), "is a LoRA; only the base"),
    "ControlNet": (nest("control_model.input_hint_block.0.weight"), "is a ControlNet"),
    "diffusers' ControlNet": (nest("controlnet_cond_embedding.conv_in.weight"), "is a ControlNet"),
    "SDXL": (nest("conditioner.embedders.0.transformer.x", "model.diffusion_model.x"), "is Stable Diffusion XL"),
    "SD 2": (nest("cond_stage_model.model.ln_final.weight", "model.diffusion_model.x"), "is Stable Diffusion 2.x"),
    "another": (nest("layer.weight"), "not an adapter"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_kinds_are_named(tiny: UNet, tmp_path: Path, case: str) -> None:
    tensors, sentence = FOREIGN[case]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=sentence):
        load_adapter(tmp_path / "a.safetensors", tiny)
    problem = r"is .*; a base model can be Stable Diffusion 1\.x, 2\.x or XL|is not a complete Stable|does not say what its UNet predicts"
    with pytest.raises(ValueError, match=rf"a\.safetensors ({problem})"):
        load_base(tmp_path / "a.safetensors")


def test_a_base_model_is_no_adapter(tiny: UNet, single: Path) -> None:
    with pytest.raises(ValueError, match=r"is Stable Diffusion 1\.x; only the base IP-Adapter, Plus, Full and FaceID are supported"):
        load_adapter(single, tiny)


MISFITS = {
    "encoder": ({"image_dim": 1280}, r"needs ViT-bigG \(1280-d\), but you gave ViT-H \(1024-d\): pass that encoder as"),
    "SDXL": (
        {"width": 2048},
        r"is an adapter for Stable Diffusion XL \(2048-d\), but you gave a base model of Stable Diffusion 1\.5 \(768-d\): use",
    ),
    "SD 2": ({"width": 1024}, r"Stable Diffusion 2\.1 \(1024-d\), but you gave a base model of Stable Diffusion 1\.5 \(768-d\)"),
    "layers": ({"count": 7}, "also holds ip_adapter"),
    "few": ({"count": 3}, "lacks ip_adapter"),
    "widths": ({"count": 4}, r"ip_adapter\.7\.to_k_ip\.weight is \[8, 768\], not \[16, 768\]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_adapters_for_others_are_refused(tiny: UNet, tmp_path: Path, case: str) -> None:
    changes, sentence = MISFITS[case]
    save_file(layers(**({"count": 4} | changes)), tmp_path / "a.safetensors")
    before = copy.deepcopy(tiny.state_dict())
    with pytest.raises(ValueError, match=sentence):
        load_adapter(tmp_path / "a.safetensors", tiny, VIT_H)
    assert all(torch.equal(t, before[k]) for k, t in tiny.state_dict().items())


KEY = "ip_adapter.3.to_k_ip.weight"
BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "renamed": (lambda t: t.update({"ip_adapter.4.to_k_ip.weight": t.pop(KEY)}), f"lacks {KEY}, but holds ip_"),
    "missing": (lambda t: t.pop(KEY), f"lacks {KEY}"),
    "extra": (lambda t: t.update({"ip_adapter.3.to_q.weight": torch.ones(2)}), r"also holds ip_adapter\.3\.to_q"),
    "turned": (lambda t: t.update({KEY: t[KEY].T.contiguous()}), f"{KEY} is "),
    "no axis": (lambda t: t.update({KEY: torch.tensor(1.0)}), rf"{KEY} is \[\], not"),
    "empty": (lambda t: t.update({"image_proj.proj.weight": torch.ones(768, 0)}), "is not a complete adapter"),
    "tokens": (lambda t: t.update({"image_proj.proj.weight": torch.ones(100, 1024)}), "do not divide into tokens"),
    "projection": (lambda t: t.pop("image_proj.proj.weight"), "not an adapter"),
    "norm": (lambda t: t.pop("image_proj.norm.weight"), r"image_proj\.norm\.weight is missing"),
    "nan": (lambda t: t[KEY].view(-1)[5].fill_(float("nan")), f"not finite in torch.float32, in {KEY}"),
    "inf": (lambda t: t[KEY].view(-1)[5].fill_(float("-inf")), f"not finite in torch.float32, in {KEY}"),
    "int": (lambda t: t.update({KEY: t[KEY].to(torch.int32)}), f"holds {KEY} as torch.int32"),
    "bool": (lambda t: t.update({KEY: t[KEY] > 0}), f"holds {KEY} as torch.bool"),
    "float8": (lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), f"holds {KEY} as torch.float8_e4m3fn"),
    "complex": (lambda t: t.update({KEY: t[KEY].to(torch.complex64)}), f"holds {KEY} as torch.complex64"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_refused(tiny: UNet, tmp_path: Path, case: str, suffix: str) -> None:
    edit, sentence = BROKEN[case]
    path, tensors = tmp_path / f"a{suffix}", fitting(tiny)
    edit(tensors)
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    with pytest.raises(ValueError, match=sentence) as refused:
        load_adapter(path, tiny, dtype=None if case != "inf" else torch.float32)
    assert path.name in str(refused.value)


@pytest.mark.parametrize("form", ["trainer", "new trainer"])
def test_broken_training_checkpoints_are_refused(adapters: Adapters, tmp_path: Path, form: str) -> None:
    both, adapter = adapters["sd15"]
    path = write_adapter(adapter, both.peer, tmp_path / "a", form)
    key = next(k for k in load_file(path) if k.endswith("to_v_ip.weight"))
    change(path, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=r"lacks ip_adapter\.\d+\.to_v_ip\.weight"):
        load_adapter(path, both.ours)


def test_values_too_large_for_half_precision_are_refused(tiny: UNet, tmp_path: Path) -> None:
    save_file(fitting(tiny) | {"image_proj.norm.bias": torch.full((768,), 1e6)}, tmp_path / "a.safetensors")
    load_adapter(tmp_path / "a.safetensors", tiny, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16, in image_proj\.norm\.bias"):
        load_adapter(tmp_path / "a.safetensors", tiny, dtype=torch.float16)


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["bin", "old bin", "pickle"])
def test_pickled_code_does_not_run(tiny: UNet, tmp_path: Path, form: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "a.bin"
    content = {"state_dict": fitting(tiny), "hyper_parameters": Code(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({k: v for k, v in content.items() if k != "state_dict"}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "bin")
    for load in (load_base, inspect, lambda path: load_adapter(path, tiny)):
        with pytest.raises(ValueError, match=r"which are never unpickled: use a \.safetensors file"):
            load(path)
    assert names(tmp_path) == ["a.bin"]
    if form != "pickle":
        torch.load(path, weights_only=False)
        assert trap.exists()  # the trap was live


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_odd_pickles_are_refused(tiny: UNet, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.bin", fitting(tiny)
    knot: dict[str, Any] = {}
    knot["a"] = knot
    wide: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(64):
        wide = {str(i): wide for i in range(8)}
    for content in (
        torch.ones(3),
        [tensors],
        {},
        knot,
        wide,
        {"image_proj": {"proj.weight": torch.ones(1)}, "image_proj.proj.weight": torch.ones(1)},
        tensors | {KEY: tensors[KEY].to("meta")},
        tensors | {KEY: tensors[KEY].to_sparse()},
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"a\.bin"):
            load_adapter(path, tiny)


def test_damaged_files_are_refused(tiny: UNet, tmp_path: Path) -> None:
    whole, bin_file = tmp_path / "a.safetensors", tmp_path / "a.bin"
    save_file(fitting(tiny), whole)
    torch.save(fitting(tiny), bin_file)
    for path in (whole, bin_file):
        content = path.read_bytes()
        for n in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:n])
            with pytest.raises(ValueError, match=path.name):
                load_adapter(path, tiny)
    torch.save(fitting(tiny), bin_file)
    content = bytearray(bin_file.read_bytes())
    content[len(content) // 2] ^= 1
    bin_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.bin is not a readable checkpoint \(.*its part a/data/\d+ is damaged"):
        load_adapter(bin_file, tiny)
    with pytest.raises(ValueError, match="is a folder: name the file"):
        load_adapter(tmp_path, tiny)
    with pytest.raises(FileNotFoundError, match=r"none\.bin is not there"):
        load_adapter(tmp_path / "none.bin", tiny)
    assert names(tmp_path) == ["a.bin", "a.safetensors"]
