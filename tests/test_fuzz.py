"""A thousand damaged files, seeded: each loads as it says, or is refused with a sentence that names it."""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damage_bytes, damage_header, damage_json, damage_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.cards import save
from checkpoints.clip import load_image_encoder
from checkpoints.diffusers_folder import save_unet
from checkpoints.names import Names, adapter_names, image_names, map_names, text_names, unet_rows, vae_rows
from checkpoints.single_file import LDM, load_single
from checkpoints.stable_diffusion import load_unet, load_vae
from model.adapter import IPAdapter
from model.image_encoder import ImageConfig, ImageEncoder
from model.image_projection import ImageProjection, MLPProjection, Projection, Resampler
from model.text_encoder import TextConfig, TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

UNET = UNetConfig(channels=(8,), depth=(1,), heads=(2,), res_blocks=1, context_dim=6, groups=4)
VAE_CONFIG = VAEConfig(channels=(8,), res_blocks=1, groups=4)
IMAGE = ImageConfig(image_size=8, patch=4, width=8, layers=(1,), heads=2, output_dim=6)
SECONDS = 5.0  # of computing, for one load; they take a few hundredths

Tensors = dict[str, Tensor]
Parts = list[tuple[nn.Module, Names, str]]  # what a load gave: modules, how the file names their tensors, and a prefix
Case = Iterator[tuple[int, random.Random]]


def cases(kind: str, count: int) -> Case:
    for i in range(count):
        yield i, random.Random(f"{kind} {i}")


# what must hold of a load


def flat(tree: Mapping[str, Any], prefix: str = "") -> Tensors:
    out: Tensors = {}
    for key, value in tree.items():
        inside = "" if key == "state_dict" else f"{prefix}{key}."
        out |= flat(value, inside) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return {key: value for key, value in out.items() if isinstance(value, Tensor)}


def contents(path: Path) -> Tensors:
    """A file's tensors by the owner's own reader."""
    return load_file(path) if path.suffix == ".safetensors" else flat(torch.load(path, weights_only=True, mmap=False))


def as_the_file_says(parts: Parts, file: Tensors) -> None:
    """Every tensor of the modules is the file's, finite and in memory."""
    for module, names, prefix in parts:
        state = module.state_dict()
        assert state.keys() == names.keys()
        for tensor in (*module.parameters(), *module.buffers()):
            assert not tensor.is_meta and tensor.isfinite().all()
        for name, joined in names.items():
            want = torch.cat([file[prefix + part] for part in joined]) if len(joined) > 1 else file[prefix + joined[0]]
            want = want.T if joined[0].endswith("_projection.weight") else want
            assert torch.equal(state[name], want.reshape(state[name].shape).to(torch.float32)), name


def outcome(weights: Path, load: Callable[[], Parts]) -> bool:
    """Whether it loaded; anything but a load as the file says, or a refusal in words, fails."""
    began = time.process_time()
    try:
        parts = load()
    except (ValueError, FileNotFoundError) as error:
        sentence = str(error)
        paths = [
            path
            for path in (weights, weights.with_suffix(".json"), weights.with_name("config.json"))
            if str(path) in sentence
        ]
        assert paths and len(sentence) > len(str(paths[0])) + 10 and "Traceback" not in sentence, sentence
        parts = []
    assert time.process_time() - began < SECONDS
    if parts:
        as_the_file_says(parts, contents(weights))
    return bool(parts)


def run(kind: str, count: int, path: Path, write: Callable[[random.Random], object], load: Callable[[], Parts]) -> None:
    """Damages and loads `count` times. Names the case that fails."""
    loaded = 0
    for i, rng in cases(kind, count):
        write(rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, on pickles that it finds strange
                loaded += outcome(path, load)
        except BaseException as error:
            raise AssertionError(f"case {i} of {kind}: {type(error).__name__}: {error}") from error
    assert 0 < loaded < 0.6 * count, f"{loaded} of {count} loaded"
    assert not [other for other in path.parent.iterdir() if other.suffix == ".part"]


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET)


@pytest.fixture(scope="module")
def official(unet: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "whole.safetensors"
    save_adapter(IPAdapter(unet, ImageProjection(5, 6, 2)), unet, path, {}, torch.float32)
    return path


def damaged(valid: Path, path: Path) -> Callable[[random.Random], None]:
    """A function that writes the valid safetensors file to `path` with its tensors, bytes or header damaged."""
    content, tensors = valid.read_bytes(), load_file(valid)

    def write(rng: random.Random) -> None:
        kind = rng.randrange(3)
        if kind == 0:
            path.unlink(missing_ok=True)
            save_file(damage_tensors(tensors, rng), path)
        else:
            path.write_bytes((damage_bytes, damage_header)[kind - 1](content, rng))

    return write


def adapter_parts(path: Path, unet: UNet) -> Parts:
    adapter = load_adapter(path, unet)
    return [(adapter, adapter_names(adapter.state_dict(), unet), "")]


def test_adapters_in_safetensors(unet: UNet, official: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write = damaged(official, path)
    run("adapter.safetensors", 250, path, write, lambda: adapter_parts(path, unet))


@pytest.mark.parametrize("form", [MLPProjection, partial(Resampler, tokens=2, width=4, depth=1, heads=1)])
def test_fine_grained_adapters(unet: UNet, tmp_path: Path, form: Callable[..., Projection]) -> None:
    torch.manual_seed(0)
    valid, path = tmp_path / "valid.safetensors", tmp_path / "adapter.safetensors"
    save_adapter(IPAdapter(unet, form(5, 6)), unet, valid, {}, torch.float32)
    run("adapter.safetensors", 120, path, damaged(valid, path), lambda: adapter_parts(path, unet))


def damage_tree(tensors: Tensors, rng: random.Random) -> Any:
    """What a pickle can hold and safetensors can't."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        tree.setdefault(part, {})[rest] = tensor
    kind = rng.choice(("none", "nest", "list", "leaf", "key", "drop", "meta", "sparse", "view", "parameter", "both"))
    part = rng.choice(list(tree))
    name = rng.choice(list(tree[part]))
    if kind == "nest":
        return {rng.choice(("state_dict", "model", "x")): tree, "epoch": 1}
    if kind == "list":
        return list(tree.values())
    if kind == "leaf":
        tree[part][name] = rng.choice((None, 1, "x", [tree[part][name]], {}))
    elif kind == "key":
        tree[part][rng.choice((1, None, ("a",), 2.5))] = tree[part].pop(name)
    elif kind == "drop":
        del tree[part]
    elif kind == "meta":
        tree[part][name] = tree[part][name].to("meta")
    elif kind == "sparse":
        tree[part][name] = tree[part][name].to_sparse()
    elif kind == "view":
        tree[part][name] = tree[part][name].flatten()[:1].expand(tree[part][name].shape)
    elif kind == "parameter":
        tree[part][name] = nn.Parameter(tree[part][name])
    elif kind == "both":
        tree[f"{part}.{name}"] = tree[part][name] + 1
    return tree


def test_adapters_in_pickles(unet: UNet, official: Path, tmp_path: Path) -> None:
    path, tensors = tmp_path / "adapter.bin", load_file(official)
    whole = {}
    for zipped in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        whole[zipped] = path.read_bytes()

    def write(rng: random.Random) -> None:
        kind, zipped = rng.randrange(3), rng.random() < 0.7
        if kind == 0:
            torch.save(damage_tensors(tensors, rng), path, _use_new_zipfile_serialization=zipped)
        elif kind == 1:
            torch.save(damage_tree(tensors, rng), path)
        else:
            path.write_bytes(damage_bytes(whole[zipped], rng))

    run("adapter.bin", 250, path, write, lambda: adapter_parts(path, unet))


def own(module: nn.Module) -> Parts:
    return [(module, {name: (name,) for name in module.state_dict()}, "")]


def test_our_own_files(tmp_path: Path) -> None:
    """An autoencoder beside its card."""
    path = tmp_path / "vae.safetensors"
    torch.manual_seed(0)
    save(VAE(VAE_CONFIG), path, {}, torch.float32)
    write = damaged(path, path)
    run("vae.safetensors", 200, path, write, lambda: own(load_vae(path)))


def ldm_parts(path: Path) -> Parts:
    base = load_single(path)
    tables = (
        map_names(base.unet.state_dict(), unet_rows(base.unet.config), 2),
        map_names(base.vae.state_dict(), vae_rows(base.vae.config), 2),
        text_names(base.text.state_dict(), base.text.config),
    )
    return list(zip((base.unet, base.vae, base.text), tables, LDM.values(), strict=True))


def test_single_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=(32,), depth=(1,), heads=(8,), res_blocks=1, context_dim=4))
    vae, text = VAE(VAEConfig(channels=(32,), res_blocks=1)), TextEncoder(TextConfig(width=4, layers=1, heads=1))
    tensors: Tensors = {}
    for module, table, prefix in (
        (unet, map_names(unet.state_dict(), unet_rows(unet.config), 2), LDM["unet"]),
        (vae, map_names(vae.state_dict(), vae_rows(vae.config), 2), LDM["vae"]),
        (text, text_names(text.state_dict(), text.config), LDM["text"]),
    ):
        for name, tensor in module.state_dict().items():
            for part, piece in zip(table[name], tensor.half().chunk(len(table[name])), strict=True):
                tensors[prefix + part] = piece.contiguous()
    path, ckpt = tmp_path / "sd.safetensors", tmp_path / "sd.ckpt"
    save_file(tensors, path)
    torch.save({"state_dict": tensors}, ckpt)
    content, old = path.read_bytes(), ckpt.read_bytes()
    words = LDM["text"] + "text_model.embeddings.token_embedding.weight"
    few = {name: tensor for name, tensor in tensors.items() if name != words}

    def write(rng: random.Random) -> None:
        kind = rng.randrange(3)
        if kind == 0:
            path.unlink(missing_ok=True)
            save_file(damage_tensors(few, rng) | {words: tensors[words]}, path)
        else:
            path.write_bytes((damage_bytes, damage_header)[kind - 1](content, rng))

    run("sd.safetensors", 70, path, write, lambda: ldm_parts(path))
    run("sd.ckpt", 30, ckpt, lambda rng: ckpt.write_bytes(damage_bytes(old, rng)), lambda: ldm_parts(ckpt))


def folders(tmp_path: Path) -> dict[str, tuple[Path, Path, Callable[[], Parts]]]:
    """Weights whose config is to be damaged: (the config, the weights, how to load)."""
    torch.manual_seed(0)
    unet, vae, image = tmp_path / "unet", tmp_path / "vae", tmp_path / "image"
    save_unet(UNet(UNET), unet)
    for folder, module, table in (
        (vae, VAE(VAE_CONFIG), lambda state: map_names(state, vae_rows(VAE_CONFIG), 1)),
        (image, ImageEncoder(IMAGE), lambda state: image_names(state, IMAGE)),
    ):
        state, tensors = module.state_dict(), {}
        for name, joined in table(state).items():
            value = state[name].T if joined[0].endswith("_projection.weight") else state[name]
            tensors |= dict(zip(joined, (piece.contiguous() for piece in value.chunk(len(joined))), strict=True))
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
    (vae / "config.json").write_text(
        json.dumps(
            {
                "_class_name": "AutoencoderKL", "block_out_channels": [8], "layers_per_block": 1, "latent_channels": 4,
                "norm_num_groups": 4, "scaling_factor": 0.2, "act_fn": "silu", "in_channels": 3, "out_channels": 3,
            }
        )
    )  # fmt: skip
    (image / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["CLIPVisionModelWithProjection"], "hidden_size": 8, "intermediate_size": 32, "image_size": 8,
                "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4, "projection_dim": 6, "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
            }
        )
    )  # fmt: skip
    card = tmp_path / "card.safetensors"
    save(ImageEncoder(IMAGE), card, {}, torch.float32)

    def unet_parts() -> Parts:
        module = load_unet(unet)
        return [(module, map_names(module.state_dict(), unet_rows(module.config), 1), "")]

    def vae_parts() -> Parts:
        module = load_vae(vae)
        return [(module, map_names(module.state_dict(), vae_rows(module.config), 1), "")]

    def image_parts() -> Parts:
        module = load_image_encoder(image)
        return [(module, image_names(module.state_dict(), module.config), "")]

    return {
        "unet": (unet / "config.json", unet / "diffusion_pytorch_model.safetensors", unet_parts),
        "vae": (vae / "config.json", vae / "model.safetensors", vae_parts),
        "image": (image / "config.json", image / "model.safetensors", image_parts),
        "card": (card.with_suffix(".json"), card, lambda: own(load_image_encoder(card))),
    }


def test_configs(tmp_path: Path) -> None:
    loaded = 0
    for part, (config, weights, load) in folders(tmp_path).items():
        text = config.read_text()
        for i, rng in cases(f"config of {part}", 50):
            config.write_bytes(damage_json(text, rng))
            try:
                loaded += outcome(weights, load)
            except BaseException as error:
                raise AssertionError(f"case {i} of {part}, {config.read_bytes()!r}: {type(error).__name__}") from error
    assert 0 < loaded < 120, f"{loaded} of 200 loaded"
