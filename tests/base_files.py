"""One base model in the layouts of its owners, and adapters of small layers: the files that several tests read."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from peers import text_pair, unet_pair, vae_pair
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.base import Base
from checkpoints.names import map_names, unet_rows, vae_rows
from model.image_encoder import ImageConfig
from model.text_encoder import END, START, TextConfig, vocabulary
from model.unet import UNetConfig
from model.vae import VAEConfig

Tensors = dict[str, Tensor]
UNET = UNetConfig(channels=(32, 32, 64, 64), context_dim=16)  # a single file has no config: 8 heads, groups of 32
VAE_CONFIG = VAEConfig(channels=(32, 32, 64))
TEXT = TextConfig(width=16, layers=2, heads=1)
IMAGE = ImageConfig(image_size=32, patch=16, width=16, layers=(2,), heads=2, output_dim=24)
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


@pytest.fixture(scope="session")
def base() -> Peers:
    """Shared: a test that changes it makes its own."""
    pair, (vae, our_vae), (text, our_text) = unet_pair(UNET, linear=False), vae_pair(VAE_CONFIG), text_pair(TEXT)
    for module in (pair.peer, pair.ours, vae, our_vae, text, our_text):
        module.float()
    ldm = (
        {
            name: ("model.diffusion_model." + ldm)
            for name, (ldm,) in map_names(pair.ours.state_dict(), unet_rows(UNET), 2).items()
        },
        {
            name: "first_stage_model." + ldm
            for name, (ldm,) in map_names(our_vae.state_dict(), vae_rows(VAE_CONFIG), 2).items()
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


@pytest.fixture(scope="session")
def single(base: Peers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole single file. Shared: a test that changes it makes its own."""
    return write_single(base, tmp_path_factory.mktemp("single") / "sd.safetensors")


def write_tokenizer(folder: Path, pad: object) -> None:
    words = {word: token for word, token in vocabulary().items() if token < START}
    words |= {"<|startoftext|>": START, "<|endoftext|>": END}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, "model_max_length": 77}))


@pytest.fixture(scope="session")
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


def nest(*keys: str) -> Tensors:
    return {key: torch.ones(2, 2) for key in keys}
