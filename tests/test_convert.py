"""Other people's files to these modules and back, each file written here in its owner's layout."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from peers import SMALL_UNETS, UNetPair, max_error, randn, text_pair, unet_pair, vae_pair, vision_pair
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import checkpoints.files
from checkpoints import configs
from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.base import Base
from checkpoints.cards import save
from checkpoints.clip import load_image_encoder, load_text_encoder
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect
from checkpoints.files import write_json, write_tensors
from checkpoints.fill import copy_weights
from checkpoints.names import adapter_names, named, unet_rows, vae_rows
from checkpoints.reader import File
from checkpoints.single_file import load_single
from checkpoints.stable_diffusion import load_base, load_unet, load_vae, save_diffusers, unet_config
from model.adapter import IPAdapter
from model.context import Context
from model.image_encoder import ImageConfig
from model.image_projection import ImageProjection
from model.text_encoder import END, START, TextConfig, vocabulary
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from weights_convert import main

ROOT = Path(__file__).parent.parent
Tensors = dict[str, Tensor]
Pair = Callable[[str], UNetPair]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNET = UNetConfig(channels=(32, 32, 64, 64), context_dim=16)  # a single file has no config: 8 heads, groups of 32
VAE_CONFIG = VAEConfig(channels=(32, 32, 64))
TEXT = TextConfig(width=16, layers=2, heads=1)
IMAGE = ImageConfig(image_size=32, patch=16, width=16, layers=(2,), heads=2, output_dim=24)
IMAGE_DIM = 10
DOUBLE = 1e-11  # measured: 1e-13
SINGLE = 1e-5  # in float32
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


def equal(module: nn.Module, wanted: nn.Module | Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Every tensor, bit for bit; the module is whole, frozen and in eval mode."""
    state = wanted.state_dict() if isinstance(wanted, nn.Module) else wanted
    assert module.state_dict().keys() == state.keys()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name].to(dtype)), name
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def change(path: Path, edit: Callable[[Tensors], object]) -> Path:
    """Edits the tensors of a .safetensors file."""
    tensors = load_file(path)
    path.unlink()
    edit(tensors)
    save_file(tensors, path)
    return path


def change_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# a base model as a single file and as a diffusers folder


@dataclass(frozen=True)
class Peers:
    """One base model three ways: diffusers' modules, ours, and the tensors of LDM's single file."""

    unet: Any
    vae: Any
    text: Any
    ours: Base
    single: Tensors


def as_ldm(peer: Tensors, table: list[str], convert: Callable[[Tensors], Tensors]) -> Tensors:
    """A peer's tensors under LDM's names. The table gives the names only: which tensor is whose is diffusers' word."""
    converted = convert({name: torch.tensor(i) for i, name in enumerate(table)})
    assert converted.keys() == peer.keys() and len(table) == len(peer)
    return {table[int(i)]: peer[name] for name, i in converted.items()}


@pytest.fixture(scope="module")
def base() -> Peers:
    pair, (vae, our_vae), (text, our_text) = unet_pair(UNET, linear=False), vae_pair(VAE_CONFIG), text_pair(TEXT)
    for module in (pair.peer, pair.ours, vae, our_vae, text, our_text):
        module.float()
    ldm = (
        {
            name: ("model.diffusion_model." + ldm)
            for name, (ldm,) in named(pair.ours.state_dict(), unet_rows(UNET), 2).items()
        },
        {
            name: "first_stage_model." + ldm
            for name, (ldm,) in named(our_vae.state_dict(), vae_rows(VAE_CONFIG), 2).items()
        },
    )
    blocks = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    tensors = as_ldm(
        pair.peer.state_dict(),
        list(ldm[0].values()),
        lambda file: convert_ldm_unet_checkpoint(file, {"layers_per_block": 2}),
    )
    for name, tensor in as_ldm(
        vae.state_dict(), list(ldm[1].values()), lambda file: convert_ldm_vae_checkpoint(file, blocks)
    ).items():
        matrix = ".mid.attn_1." in name and tensor.ndim == 2
        tensors[name] = tensor[:, :, None, None] if matrix else tensor  # LDM has 1 x 1 convolutions
    for name, tensor in text.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return Peers(pair.peer, vae, text, Base(pair.ours, our_vae, our_text), tensors)


def leftovers(base: Peers) -> Tensors:
    """What official files hold beside the weights: schedule buffers, positions, a slow copy."""
    slow = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): 2 * tensor
        for name, tensor in base.single.items()
        if name.startswith("model.diffusion_model.")
    }
    return slow | {
        "betas": torch.linspace(0, 1, 1000),
        "logvar": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }


@contextmanager
def lightning() -> Iterator[Any]:
    """A class of the name that old checkpoints hold, which must not be looked for when they are read."""

    class ModelCheckpoint:
        def __setstate__(self, state: object) -> None:
            raise AssertionError("this code must not run")

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = LIGHTNING, "ModelCheckpoint"
    parts = LIGHTNING.split(".")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for module in modules:
        sys.modules[module] = types.ModuleType(module)
    sys.modules[LIGHTNING].ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    try:
        yield ModelCheckpoint
    finally:
        for module in modules:
            del sys.modules[module]


def write_single(base: Peers, path: Path, dtype: torch.dtype = torch.float32, extra: bool = True) -> Path:
    tensors = base.single | (leftovers(base) if extra else {})
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        return path
    with lightning() as callback:
        state = callback()
        state.best = 0.5
        tree = {
            "epoch": 3,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": tensors,
            "callbacks": {callback: {"monitor": "loss", "best_model_score": torch.tensor(0.5), "it": state}},
            "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}],
        }
        torch.save(tree, path)
    return path


@pytest.fixture(scope="module")
def single(base: Peers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole single file. Shared: a test that changes it makes its own."""
    return write_single(base, tmp_path_factory.mktemp("single") / "sd.safetensors")


def write_tokenizer(folder: Path, pad: object) -> None:
    words = {word: token for word, token in vocabulary().items() if token < START}
    words |= {"<|startoftext|>": START, "<|endoftext|>": END}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, "model_max_length": 77}))


@pytest.fixture(scope="module")
def folder(base: Peers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base model as a diffusers folder. Shared."""
    path = tmp_path_factory.mktemp("diffusers") / "sd"
    base.unet.save_pretrained(path / "unet")
    base.vae.save_pretrained(path / "vae")
    base.text.save_pretrained(path / "text_encoder")
    write_tokenizer(path / "tokenizer", "<|endoftext|>")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    return path


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "sd")
    return tmp_path / "sd"


def check_base(loaded: Base, wanted: Base, dtype: torch.dtype = torch.float32) -> None:
    for part in ("unet", "vae", "text"):
        equal(getattr(loaded, part), getattr(wanted, part), dtype)


@pytest.mark.parity("diffusers convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint", 0)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file(base: Peers, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    """Old checkpoints nest everything in `state_dict` beside a class of Lightning's, which is not needed to read them."""
    path = write_single(base, tmp_path / f"sd{suffix}", dtype)
    found = load_single(path, dtype=None)
    check_base(found, base.ours, dtype)
    assert found.unet.config == UNET and found.vae.config == VAE_CONFIG and found.text.config == TEXT
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def test_the_config_of_a_unet_without_its_weights(base: Peers, single: Path, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own" / "unet.safetensors"
    save(base.ours.unet, own, {})
    assert [unet_config(path) for path in (single, folder, own.parent)] == [UNET] * 3
    save_file({"conditioner.embedders.0": torch.ones(1)}, tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match="is Stable Diffusion XL; as a single file"):
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
    found = load_base(folder)
    check_base(found, base.ours)
    assert found.unet.config == UNET and found.vae.config == VAE_CONFIG and found.text.config == TEXT


def test_a_folders_tokenizer_and_scheduler_decide(own_folder: Path) -> None:
    shutil.rmtree(own_folder / "tokenizer")
    write_tokenizer(own_folder / "tokenizer", {"content": "!", "lstrip": False})
    change_json(own_folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    found = load_base(own_folder)
    assert found.text.config.pad == 0 and found.unet.config.prediction == "v"
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
    save_diffusers(ours, tmp_path / "back" / "unet")
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
    found = load_text_encoder(tmp_path)
    equal(found, ours)
    assert found.config == ours.config


@pytest.mark.parity("transformers CLIPVisionModelWithProjection, float32", SINGLE)
@pytest.mark.parametrize("positions", [False, True])
def test_image_towers(tmp_path: Path, positions: bool) -> None:
    peer, ours = vision_pair(IMAGE)
    peer.float().save_pretrained(tmp_path)
    if positions:
        extra = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        change(tmp_path / "model.safetensors", lambda tensors: tensors.update(extra))
    found = load_image_encoder(tmp_path)
    equal(found, ours)
    assert found.config == IMAGE
    with torch.no_grad():
        pixels = randn(2, 3, 32, 32, dtype=torch.float32)
        assert max_error(found(pixels), peer(pixels).image_embeds) < SINGLE


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
            found = configs.image_config(entries | {"hidden_size": hidden, "intermediate_size": intermediate})
            assert int(hidden * found.mlp_ratio) == intermediate


# adapters

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
    found = load_adapter(path, both.ours, IMAGE_DIM)
    assert found.own_projections and (found.image_projection.tokens, found.image_projection.image_dim) == (4, IMAGE_DIM)
    assert not any(p.is_meta or p.requires_grad for p in found.parameters()) and not found.training
    save_adapter(found, both.ours, tmp_path / "back.safetensors", {"a": 1}, dtype=None)
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
    found = load_adapter(
        write_adapter(adapter, both.peer, tmp_path / "a", "new trainer"), both.ours, dtype=torch.float64
    )
    save_adapter(found, both.ours, tmp_path / "back.safetensors", {}, dtype=torch.float32)
    file = Official(load_file(tmp_path / "back.safetensors"), {})
    peer = copy.deepcopy(both.peer)
    peer._load_ip_adapter_weights([file.nested], low_cpu_mem_usage=False)
    width = both.ours.config.context_dim
    x, t, text, picture = randn(2, 4, 8, 8, seed=1), torch.tensor([7, 981]), randn(2, 5, width), randn(2, IMAGE_DIM)
    want = peer(x, t, text, added_cond_kwargs={"image_embeds": [picture[:, None]]}).sample
    got = both.ours(x, t, found(Context(text), picture))
    assert max_error(got, want) < DOUBLE
    assert max_error(got, both.ours(x, t, Context(text))) > 0.05


def test_adapters_keep_their_dtype(adapters: Adapters, tmp_path: Path) -> None:
    """Official files are half precision, and the projection of some is not."""
    both, adapter = adapters["sd15"]
    mixed = {k: v.half() if k.startswith("ip_adapter") else v for k, v in adapter.flat.items()}
    save_file(mixed, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors", both.ours, dtype=None)
    save_adapter(found, both.ours, tmp_path / "b.safetensors", {}, dtype=None)
    assert verify(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == []
    assert {t.dtype for t in load_file(tmp_path / "b.safetensors").values()} == {torch.float16, torch.float32}
    assert {p.dtype for p in load_adapter(tmp_path / "a.safetensors", both.ours).parameters()} == {torch.float32}


def test_tokens_are_in_the_shapes(adapters: Adapters, tmp_path: Path) -> None:
    both, adapter = adapters["sd15"]
    width = both.ours.config.context_dim
    more = {"image_proj.proj.weight": randn(7 * width, 5).float(), "image_proj.proj.bias": randn(7 * width).float()}
    save_file(adapter.flat | more, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors", both.ours).image_projection
    assert (found.tokens, found.image_dim, found.context_dim) == (7, 5, width)


# loaded modules are mapped from their file


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_module_outlives_a_file_that_is_replaced(base: Peers, tmp_path: Path, suffix: str) -> None:
    """As all commands here write: a new file takes the name."""
    path = write_single(base, tmp_path / f"sd{suffix}")
    found = load_single(path, dtype=None)
    (tmp_path / "new").write_bytes(bytes(path.stat().st_size))
    (tmp_path / "new").replace(path)
    check_base(found, base.ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_copied_weights_outlive_a_file_that_is_written_over(base: Peers, tmp_path: Path, suffix: str) -> None:
    path = write_single(base, tmp_path / f"sd{suffix}")
    found = load_single(path, dtype=None)
    for part in found.parts.values():
        copy_weights(part)
    path.write_bytes(bytes(path.stat().st_size))
    check_base(found, base.ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_change_to_a_module_is_not_written_to_its_file(base: Peers, tmp_path: Path, suffix: str) -> None:
    path = write_single(base, tmp_path / f"sd{suffix}")
    before = path.read_bytes()
    found = load_single(path, dtype=None)
    for part in found.parts.values():
        for weight in part.parameters():
            weight.fill_(0.5)
    assert path.read_bytes() == before
    check_base(load_single(path, dtype=None), base.ours)


def test_tensors_of_a_pickle_that_share_memory_are_separated(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    torch.save({"a": one, "b": one, "c": one[2:4], "d": torch.ones(2)}, tmp_path / "a.bin")
    file = File(tmp_path / "a.bin")
    loaded = {name: file[name] for name in file}
    for name, tensor in loaded.items():
        tensor.add_(1 + ord(name))
    assert loaded["a"].tolist() == [98, 99, 100, 101, 102, 103] and loaded["b"].tolist() == [99, 100, 101, 102, 103, 104]
    assert loaded["c"].tolist() == [102, 103] and loaded["d"].tolist() == [102, 102]


MEASURE = """
import sys, threading
from pathlib import Path
import torch
from checkpoints.single_file import load_single
from model.context import Context

def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

load_single(Path(sys.argv[2]), None)
before = peak = anonymous()
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
base = load_single(Path(sys.argv[1]), None)
done.set()
thread.join()
loaded = max(peak, anonymous())
with torch.no_grad():
    base.unet(torch.randn(1, 4, 8, 8), 5, Context(torch.randn(1, 3, 16)))
print(loaded - before, max(loaded, anonymous()) - before, sum(p.nbytes for p in base.unet.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_peak_memory_is_that_of_the_file(base: Peers, single: Path, tmp_path: Path, suffix: str) -> None:
    """RssAnon, which the kernel can't reclaim, of 300 MB: little after the load, and at most 1.05 x the file after a step."""
    config = UNetConfig(channels=(320, 640), depth=(1, 0), heads=(8, 8), res_blocks=1, context_dim=16)
    with torch.device("meta"):
        unet = UNet(config)
    state = unet.state_dict()
    wide = {
        f"model.diffusion_model.{ldm}": torch.zeros(state[name].shape)
        for name, (ldm,) in named(state, unet_rows(config), 2).items()
    }
    tensors = wide | {k: v for k, v in base.single.items() if not k.startswith("model.diffusion_model.")}
    path = tmp_path / f"wide{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    del wide, tensors
    size = path.stat().st_size
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(single)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    path.unlink()
    loaded, stepped, weights = map(int, measured.stdout.split())
    print(f"RssAnon {loaded / size:.3f} and {stepped / size:.3f} x the file of {size / 1e6:.0f} MB")
    assert size > 250e6 and weights > 0.9 * size
    assert loaded < 0.25 * size and stepped < 1.05 * size


# inspect, convert, verify


def says(path: Path, *wanted: str) -> None:
    lines = "\n".join(inspect(path))
    for want in wanted:
        assert want in lines, f"{want!r} is not in\n{lines}"


def test_inspect_a_base_model(base: Peers, single: Path, folder: Path, own_folder: Path, tmp_path: Path) -> None:
    parameters = f"{sum(p.numel() for p in base.ours.unet.parameters()):,} parameters"
    says(
        single, "Stable Diffusion 1.x, a single file", f"UNet: {parameters}", "float32", "an EMA copy of the UNet: 686"
    )
    assert not any("odd" in line for line in inspect(single))
    says(folder, "a base model in a diffusers folder", f"unet: UNet for 16-d, {parameters}", "vae: ", "text_encoder: ")
    convert(single, tmp_path / "own", torch.float16)
    says(tmp_path / "own", "this project's own format", parameters, "float16")
    shutil.rmtree(own_folder / "vae")
    says(own_folder, "odd: it has no vae")
    nine = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    save_file(base.single | nine, tmp_path / "nine.safetensors")
    says(tmp_path / "nine.safetensors", "for inpainting: the UNet reads 9 channels")
    lacks = {k: v for k, v in base.single.items() if "conv_in" not in k}
    save_file(lacks, tmp_path / "lacks.safetensors")
    says(tmp_path / "lacks.safetensors", "odd: ", "it lacks decoder.conv_in.bias")


def test_inspect_parts(base: Peers, folder: Path, tmp_path: Path) -> None:
    says(folder / "unet", "UNet for 16-d", "float32", "heads (8, 8, 8, 8)", "prediction epsilon")
    says(folder / "vae", "vae, ", "scale 0.18215")
    says(folder / "text_encoder", "text encoder, ", "width 16")
    vision_pair(replace(IMAGE, output_dim=1024))[0].half().save_pretrained(tmp_path / "encoder")
    says(tmp_path / "encoder", "CLIP image encoder, ViT-H (1024-d)", "float16", "output_dim 1024")


def layers(count: int, width: int = 768, tokens: int = 1, image_dim: int = 1024) -> Tensors:
    """An adapter of small layers, as official files have it."""
    projection = {
        "image_proj.proj.weight": torch.zeros(tokens * width, image_dim),
        "image_proj.proj.bias": torch.zeros(tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    return projection | {
        f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight": torch.zeros(8, width) for i in range(count) for x in "kv"
    }


ODD: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "layer": (lambda t: [t.pop(f"ip_adapter.31.to_{x}_ip.weight") for x in "kv"], "has 16 cross-attention layers"),
    "half a layer": (lambda t: t.pop("ip_adapter.5.to_v_ip.weight"), "it lacks ip_adapter.5.to_v_ip.weight"),
    "norm": (lambda t: t.pop("image_proj.norm.bias"), "it lacks image_proj.norm.bias"),
    "more": (lambda t: t.update({"ip_adapter.1.bias": torch.ones(1)}), "it also holds ip_adapter.1.bias"),
    "nan": (lambda t: t["image_proj.proj.bias"].fill_(float("nan")), "not finite in image_proj.proj.bias"),
    "int": (lambda t: t.update({"image_proj.proj.bias": torch.ones(768, dtype=torch.int8)}), "not float32"),
    "numbers": (
        lambda t: t.update({f"ip_adapter.2.to_{x}_ip.weight": t.pop(f"ip_adapter.1.to_{x}_ip.weight") for x in "kv"}),
        "not numbered 1, 3, 5",
    ),
}


def test_inspect_an_adapter(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({k: v.half() for k, v in layers(16, tokens=2).items()}, path)
    says(
        path, "IP-Adapter for Stable Diffusion 1.5 (768-d), reads ViT-H (1024-d), 2 tokens", "16 cross-attention layers"
    )
    says(path, f"{2 * 768 * 1025 + 2 * 768 + 32 * 8 * 768:,} parameters in 36 tensors, float16")
    assert not any("odd" in line for line in inspect(path))


@pytest.mark.parametrize("case", ODD)
def test_inspect_says_what_is_odd(tmp_path: Path, case: str) -> None:
    edit, sentence = ODD[case]
    path = tmp_path / "a.safetensors"
    save_file(layers(16), path)
    change(path, edit)
    assert any(line.startswith("odd: ") and sentence in line for line in inspect(path))


def test_convert_and_verify_across_layouts(base: Peers, single: Path, folder: Path, tmp_path: Path) -> None:
    ckpt = write_single(base, tmp_path / "sd.ckpt")
    convert(ckpt, tmp_path / "own")
    paths = [single, ckpt, folder, tmp_path / "own"]
    assert [verify(a, b) for a, b in itertools.pairwise(paths)] == [[], [], []]
    assert json.loads((tmp_path / "own" / "unet.json").read_text())["converted_from"] == "sd.ckpt"
    check_base(load_base(tmp_path / "own"), base.ours)
    convert(folder, tmp_path / "again")
    assert (tmp_path / "again" / "scheduler" / "scheduler_config.json").exists()
    convert(tmp_path / "own" / "unet.safetensors", tmp_path / "unet", diffusers=True)
    assert verify(tmp_path / "unet", folder / "unet") == []
    for part in ("vae", "text_encoder"):
        convert(folder / part, tmp_path / f"{part}.safetensors")
        assert verify(tmp_path / f"{part}.safetensors", tmp_path / "own" / f"{part}.safetensors") == []


def test_verify_names_what_differs(single: Path, tmp_path: Path) -> None:
    name = "first_stage_model.decoder.conv_in.bias"
    other = tmp_path / "other.safetensors"
    for edit, sentence in (
        (lambda t: t[name].view(-1)[3].add_(0.5), r"^vae\.decoder\.conv_in\.bias: .* largest difference 0\.5$"),
        (lambda t: t.update({name: t[name].half()}), r"^vae\.decoder\.conv_in\.bias: .*float32 against .*float16"),
    ):
        shutil.copy(single, other)
        change(other, edit)
        (line,) = verify(single, other)
        assert pytest.raises(AssertionError, match=sentence).matches(AssertionError(line))


def test_verify_sees_the_sign_of_zero_and_other_shapes(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{x}.safetensors" for x in "abc")
    save_file(layers(1), a)
    save_file(layers(1) | {"image_proj.norm.bias": -torch.zeros(768)}, b)
    save_file(layers(2, tokens=2), c)
    assert verify(a, a) == [] and verify(a, b)[0].startswith("image_proj.norm.bias: ")
    lines = verify(a, c)
    assert any("only in" in line and "ip_adapter.3.to_k_ip.weight" in line for line in lines)
    assert any(line.startswith("image_proj.proj.weight: [768, 1024] against [1536, 1024]") for line in lines)


def test_the_command_line(
    adapters: Adapters, single: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, adapter = adapters["sd15"]
    path, target = write_adapter(adapter, both.peer, tmp_path / "a", "bin"), tmp_path / "b.safetensors"
    main(["inspect", str(path), str(single)])
    out = capsys.readouterr().out
    assert "IP-Adapter for 12-d, reads 10-d, 4 tokens" in out and "Stable Diffusion 1.x" in out
    main(["convert", str(path), str(target), "--dtype", "bfloat16"])
    assert "bfloat16" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"image_proj\.norm\.bias"):
        main(["verify", str(path), str(target)])
    main(["convert", str(path), str(target)])
    main(["verify", str(path), str(target)])
    assert "equal, bit for bit" in capsys.readouterr().out
    main(["convert", "--diffusers", str(folder / "unet"), str(tmp_path / "unet")])
    assert "UNet for 16-d" in capsys.readouterr().out
    assert not any(name.endswith(".part") for name in names(tmp_path))


MISTAKES: dict[str, list[str]] = {
    "nothing there": ["inspect", "no-such.bin"],
    "no weights": ["inspect", "text.txt"],
    "empty": ["inspect", "empty.bin"],
    "a folder": ["inspect", "folder"],
    "cut": ["convert", "cut.safetensors", "out.safetensors"],
    "adapter to a folder": ["convert", "adapter.safetensors", "out"],
    "part to a folder": ["convert", "vae", "out"],
    "ema of an adapter": ["convert", "--ema", "adapter.safetensors", "out.safetensors"],
    "diffusers of an adapter": ["convert", "--diffusers", "adapter.safetensors", "out"],
    "nan": ["convert", "nan.safetensors", "out.safetensors"],
    "too large": ["convert", "--dtype", "float16", "large.safetensors", "out.safetensors"],
    "in a file": ["convert", "adapter.safetensors", "text.txt/out.safetensors"],
    "over a folder": ["convert", "adapter.safetensors", "folder"],
    "a base over a file": ["convert", "vae", "text.txt"],
    "diffusers over a file": ["convert", "--diffusers", "unet", "text.txt"],
    "a name too long": ["convert", "adapter.safetensors", "x" * 300 + ".safetensors"],
    "nowhere": ["convert", "adapter.safetensors", "/proc/none/out.safetensors"],
    "unlike": ["verify", "adapter.safetensors", "no-such.bin"],
}


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_errors_are_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """`main` ends with "error: ..." and status 1, never with a traceback, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    save_file(layers(1), "adapter.safetensors")
    save_file(layers(1) | {"image_proj.norm.bias": torch.full((768,), float("nan"))}, "nan.safetensors")
    save_file(layers(1) | {"image_proj.norm.bias": torch.full((768,), 1e6)}, "large.safetensors")
    Path("cut.safetensors").write_bytes(Path("adapter.safetensors").read_bytes()[:-9])
    Path("text.txt").write_text("no weights at all")
    Path("empty.bin").touch()
    Path("folder").mkdir()
    shutil.copytree(folder / "vae", "vae")
    shutil.copytree(folder / "unet", "unet")
    before = names(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
    assert names(tmp_path) == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, None)

    def full(_: object, part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoints.files, "save_file", full)
    with pytest.raises(OSError, match="full"):
        write_tensors(path, {"a": torch.zeros(2)}, None)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert names(tmp_path) == ["a.safetensors"] and torch.equal(load_file(path)["a"], torch.ones(2))


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    one = torch.ones(3)
    write_tensors(tmp_path / "a.safetensors", {"a": one, "b": one, "c": one[:2]}, None)
    assert {k: v.tolist() for k, v in load_file(tmp_path / "a.safetensors").items()} == {
        "a": [1, 1, 1], "b": [1, 1, 1], "c": [1, 1]
    }  # fmt: skip


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


def nest(*keys: str) -> Tensors:
    return {key: torch.ones(2, 2) for key in keys}


LORA = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
FOREIGN = {
    "FaceID": (nest("image_proj.proj.0.weight", "image_proj.norm.weight"), "is an IP-Adapter FaceID; only"),
    "FaceID LoRA": (nest("image_proj.proj.weight", "ip_adapter.0.to_q_lora.down.weight"), "is an IP-Adapter FaceID"),
    "FaceID Plus": (nest("image_proj.perceiver_resampler.proj_in.weight"), "is an IP-Adapter FaceID; only the base"),
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
    with pytest.raises(ValueError, match=r"a\.safetensors is .*; as a single file only Stable Diffusion 1\.x is supported"):
        load_base(tmp_path / "a.safetensors")


def test_a_base_model_is_no_adapter(tiny: UNet, single: Path) -> None:
    with pytest.raises(ValueError, match=r"is Stable Diffusion 1\.x; only the base IP-Adapter, Plus and Full are supported"):
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
        load_adapter(tmp_path / "a.safetensors", tiny, 1024)
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
