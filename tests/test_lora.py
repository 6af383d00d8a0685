"""LoRA: files in every layout, merged, against the updates beside each module of diffusers, and against its own fusing."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_files import change, change_json
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from peers import SMALL_SDXL, SMALL_UNETS, max_error, randn, text_pair, unet_pair, vae_pair
from safetensors.torch import save_file
from small_models import Ask, Model, build, theirs
from tiny import again, difference, draw, refuses
from torch import Tensor, nn

from checkpoints.base import Base
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect
from checkpoints.lora import merge, open_lora, peft_config, read_updates
from checkpoints.names import attention_order, map_names, unet_rows
from checkpoints.reader import File
from model.context import Context
from model.text_encoder import TextConfig
from model.vae import VAEConfig
from sampling.images import to_images
from sampling.loading import load, with_loras
from sampling.options import parse
from sampling.request import LoraFile

Tensors = dict[str, Tensor]
EXACT = 1e-11  # measured: 1e-14
LEVEL = 1
TEXT = TextConfig(width=16, layers=2, heads=2)
SCALE, ALPHA = 0.7, 5.0


@functools.cache
def small(name: str) -> tuple[Any, Any, Base]:
    """diffusers' UNet, transformers' text encoder, and our base model with the same weights."""
    config, linear = SMALL_UNETS[name]
    pair, (text, our_text) = unet_pair(config, linear), text_pair(TEXT)
    return pair.peer, text, Base(pair.ours, vae_pair(VAEConfig(channels=(8,), res_blocks=1, groups=4))[1], our_text)


def matrices(module: nn.Module) -> dict[str, nn.Module]:
    """Every layer that LoRA can update."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def low_rank(layer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """(A, B) of rank 3, or 1 for every fifth."""
    rank, weight = 3 if seed % 5 else 1, layer.weight
    down = randn(rank, *weight.shape[1:], seed=seed) * weight[0].numel() ** -0.5
    up = randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), seed=1000 + seed)
    return down, up


def beside(module: nn.Module, updates: Mapping[str, tuple[Tensor, Tensor, float]]) -> Any:
    """A copy that computes y = W x + c B (A x), with A applied like the layer's own weight."""
    peer = copy.deepcopy(module)
    for name, (down, up, factor) in updates.items():

        def add(layer: Any, x: Any, y: Tensor, down: Tensor = down, up: Tensor = up, factor: float = factor) -> Tensor:
            if down.ndim == 2:
                return y + factor * (x[0] @ down.T) @ up.T
            low = nn.functional.conv2d(x[0], down, None, layer.stride, layer.padding)
            return y + factor * nn.functional.conv2d(low, up)

        peer.get_submodule(name).register_forward_hook(add)
    return peer


def flat(name: str) -> str:
    return name.replace(".", "_")


def old_name(module: str) -> str:
    """As diffusers wrote it until 2023: `attn1.processor.to_q_lora`, `self_attn.to_q_lora`."""
    outer, _, leaf = module.removesuffix(".0").rpartition(".")
    if outer.endswith("self_attn"):
        return f"{outer}.to_{leaf.removesuffix('_proj')}_lora"
    return f"{outer}.processor.{leaf}_lora" if outer.endswith(("attn1", "attn2")) else f"{module}.lora"


LAYOUTS: dict[str, tuple[Callable[[str, str], str], str, str]] = {  # (network, module) -> name; A; B
    "kohya": (lambda n, m: ("lora_unet_" if n == "unet" else "lora_te_text_model_") + flat(m), "lora_down", "lora_up"),
    "kohya, SDXL": (lambda n, m: ("lora_unet_" if n == "unet" else "lora_te1_text_model_") + flat(m), "lora_down", "lora_up"),
    "PEFT": (lambda n, m: f"{n}.{m}" if n == "unet" else f"{n}.text_model.{m}", "lora_A", "lora_B"),
    "PEFT today": (lambda n, m: f"{n}.{m}", "lora_A", "lora_B"),
    "diffusers": (lambda n, m: f"{n}.{m}.lora" if n == "unet" else f"{n}.text_model.{m}.lora_linear_layer", "down", "up"),
    "old diffusers": (lambda n, m: f"{n}.{old_name(m)}" if n == "unet" else f"{n}.text_model.{old_name(m)}", "down", "up"),
}  # fmt: skip


def write(path: Path, layout: str, peers: Mapping[str, nn.Module], alphas: bool) -> dict[str, Any]:
    """Write an update of every layer, the matrices in float64, and return them by network and module."""
    name_of, a, b = LAYOUTS[layout]
    tensors, updates = Tensors(), dict[str, Any]()
    for network, peer in peers.items():
        updates[network] = {}
        for i, (module, layer) in enumerate(matrices(peer).items()):
            down, up = low_rank(layer, i)
            name = name_of(network, module)
            tensors |= {f"{name}.{a}.weight": down, f"{name}.{b}.weight": up}
            tensors |= {f"{name}.alpha": torch.tensor(ALPHA)} if alphas else {}
            updates[network][module] = down, up, SCALE * (ALPHA / len(down) if alphas else 1.0)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return updates


def outputs(unet: Any, ours: bool) -> Tensor:
    config = (unet.config.in_channels, unet.config.context_dim if ours else unet.config.cross_attention_dim)
    x, c, t = randn(2, config[0], 10, 6, seed=1), randn(2, 7, config[1], seed=2), torch.tensor([999, 21])
    return unet(x, t, Context(c)) if ours else unet(x, t, c).sample


@pytest.mark.parity("diffusers UNet, and transformers CLIPTextModel, with B (A x) added to each layer's output", EXACT)
@pytest.mark.parametrize("alphas", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_lora_is_the_sum_in_every_layer(tmp_path: Path, layout: str, alphas: bool) -> None:
    unet, text, base = small("sd15" if alphas else "one_block")
    updates = write(tmp_path / "a.safetensors", layout, {"unet": unet, "text_encoder": text}, alphas)
    merged = with_loras(base, [(tmp_path / "a.safetensors", SCALE)], (), 1.0)
    want = outputs(beside(unet, updates["unet"]), ours=False)
    assert max_error(outputs(merged.unet, ours=True), want) < EXACT
    assert max_error(want, outputs(unet, ours=False)) > 0.1
    tokens = base.text.tokenize(["a photo of a fox"])
    states = beside(text, updates["text_encoder"])(tokens).last_hidden_state
    assert max_error(merged.text(tokens), states) < EXACT
    assert max_error(states, base.text(tokens)) > 0.1


@pytest.mark.parity("diffusers UNet with its own reading of kohya's names for SDXL", 1e-6)
def test_kohyas_names_of_sdxl_are_read_as_in_diffusers(tmp_path: Path) -> None:
    """kohya's scripts name SDXL's modules as LDM does. diffusers says which of its own modules each one is."""
    peer, _, base = small("sdxl")
    rows = map_names(base.unet.state_dict(), unet_rows(SMALL_SDXL), 2)
    ldm = [name.removesuffix(".weight") for (name,) in rows.values() if ".transformer_blocks." in name or "emb_layers" in name]
    keys = {f"lora_unet_{flat(name)}": i for i, name in enumerate(ldm) if "norm" not in name and not name.endswith("bias")}
    marked = {f"{key}.{part}.weight": torch.tensor(float(i)) for key, i in keys.items() for part in ("lora_down", "lora_up")}
    renamed, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(dict(marked), peer.config))
    updates, tensors, names = {}, Tensors(), {i: key for key, i in keys.items()}
    for name, i in renamed.items():
        if ".down." in name or "lora_down" in name:
            module = name.removeprefix("unet.").replace(".processor", "").split("_lora")[0].split(".lora")[0]
            module += ".0" if module.endswith("to_out") else ""
            down, up = low_rank(peer.get_submodule(module), int(i))
            updates[module], key = (down, up, 0.5), names[int(i)]
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(len(down))}
    assert len(updates) == len(keys) > 100
    save_file(tensors, tmp_path / "a.safetensors")
    merged = with_loras(base, [(tmp_path / "a.safetensors", 0.5)], (), 1.0)

    x, c, added = randn(1, 4, 8, 12), randn(1, 7, 24, seed=2), {"text_embeds": randn(1, 10), "time_ids": randn(1, 6).abs() * 100}
    want = beside(peer, updates)(x, 400, c, added_cond_kwargs=added).sample
    ids = peer.add_time_proj(added["time_ids"].flatten()).reshape(1, -1)
    got = merged.unet(x, torch.tensor([400]), Context(c, added=torch.cat([added["text_embeds"], ids], -1).double()))
    assert max_error(got, want) < 1e-6  # diffusers embeds the time ids in float32
    assert max_error(want, peer(x, 400, c, added_cond_kwargs=added).sample) > 0.1


def test_attention_order_is_that_of_the_processors() -> None:
    """So that the LoRA inside an adapter, and W'_k and W'_v, find their layers."""
    for name in SMALL_UNETS:
        peer, _, base = small(name)
        names = list(base.unet.state_dict())
        table = {theirs: ours for ours, (theirs,) in map_names(names, unet_rows(base.unet.config), 1).items()}
        wanted = [table[p.removesuffix("processor") + "to_q.weight"] for p in peer.attn_processors]
        assert [f"{name}.to_q.weight" for name in attention_order(base.unet)] == wanted


# Merging.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    unet, text, _ = small("one_block")
    write(tmp_path / "a.safetensors", "kohya", {"unet": unet, "text_encoder": text}, True)
    return tmp_path / "a.safetensors"


def state(base: Base) -> Tensors:
    return {f"{part}.{name}": t.clone() for part, module in base.parts.items() for name, t in module.state_dict().items()}


def test_the_base_model_stays_as_it_is(file: Path) -> None:
    """Merging makes a copy. What it does not change is shared, and scale 0 changes nothing."""
    *_, base = small("one_block")
    before = state(base)
    merged = with_loras(base, [(file, 0.8)], (), 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(base).items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in state(merged).items())
    assert merged.vae.encoder.conv_in.weight is base.vae.encoder.conv_in.weight
    shared = [name for name, p in base.unet.named_parameters() if merged.unet.get_parameter(name) is p]
    assert shared and all(name.endswith("bias") or "norm" in name for name in shared)
    off = with_loras(base, [(file, 0.0)], (), 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(off).items())


def test_several_are_added_and_rounded_once(tmp_path: Path, file: Path) -> None:
    """In bfloat16: W + sum in float32, then one rounding, in any order of the files."""
    *_, base = small("one_block")
    low = copy.deepcopy(base)
    for part in low.parts.values():
        part.bfloat16()
    a, b = with_loras(low, [(file, 0.3), (file, 0.5)], (), 1.0), with_loras(low, [(file, 0.8)], (), 1.0)
    updates = read_updates(open_lora(file))
    update = updates["lora_unet_conv_in"]
    weight = low.unet.conv_in.weight
    delta = 5 / len(update.down) * (update.up.flatten(1) @ update.down.flatten(1)).reshape(weight.shape)
    wanted = (weight.double() + 0.8 * delta).bfloat16()
    for merged in (a, b):
        got = merged.unet.conv_in.weight
        assert got.dtype == torch.bfloat16 and (got == wanted).float().mean() > 0.99
    twice = merge(base, [(file, updates, 0.3), (file, updates, 0.5)])
    once = merge(base, [(file, updates, 0.8)])
    assert max_error(twice.unet.conv_in.weight, once.unet.conv_in.weight) < 1e-14


def test_diffusers_header_sets_alpha(tmp_path: Path) -> None:
    *_, base = small("one_block")
    weight, settings = base.unet.conv_in.weight, {"unet.lora_alpha": 6, "unet.r": 2, "unet.use_rslora": False}
    tensors = {"unet.conv_in.lora_A.weight": randn(2, *weight.shape[1:]), "unet.conv_in.lora_B.weight": randn(len(weight), 2, 1, 1)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    assert read_updates(open_lora(path))["unet.conv_in"].alpha == 6
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings | {"unet.use_rslora": True})})
    with pytest.raises(ValueError, match=r"a\.safetensors has settings that are not supported: use_rslora = True"):
        read_updates(open_lora(path))
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings | {"unet.alpha_pattern": {"conv_in": 1}})})
    with pytest.raises(ValueError, match="settings that are not supported: alpha_pattern"):
        read_updates(open_lora(path))


def saved_by_peft(folder: Path, peer: nn.Module, form: str, **settings: Any) -> tuple[Path, Any]:
    """A network with PEFT's own LoRA, and the file that its `save_pretrained` writes."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(peer), peft.LoraConfig(r=2, lora_alpha=5, **settings))
    for i, (name, tensor) in enumerate(wrapped.named_parameters()):
        if "lora_" in name:
            tensor.data = randn(*tensor.shape, seed=i) * 0.1
    wrapped.save_pretrained(folder, safe_serialization=form == "safetensors")
    return folder / f"adapter_model.{form}", wrapped.eval()


@pytest.mark.parity("peft save_pretrained, around diffusers UNet and transformers CLIPTextModel", EXACT)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_network_saved_by_peft(tmp_path: Path, form: str) -> None:
    """Its alpha is in adapter_config.json; the rank is that of each matrix."""
    unet, text, base = small("one_block")
    first = saved_by_peft(tmp_path / "unet", unet, form, target_modules=["to_q", "to_out.0", "conv1"], rank_pattern={"to_q": 3})
    second = saved_by_peft(tmp_path / "text", text, form, target_modules=["q_proj", "fc1"])
    merged = with_loras(base, [(first[0], SCALE), (second[0], SCALE)], (), 1.0)
    for _, wrapped in (first, second):
        for module in wrapped.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(SCALE)
    want = outputs(first[1], ours=False)
    assert max_error(outputs(merged.unet, ours=True), want) < EXACT
    assert max_error(want, outputs(unet, ours=False)) > 0.01
    tokens = base.text.tokenize(["a photo of a fox"])
    states = second[1](tokens).last_hidden_state
    assert max_error(merged.text(tokens), states) < EXACT
    assert max_error(states, base.text(tokens)) > 0.01
    assert inspect(first[0])[0].startswith("a LoRA of ") and "0 of the text encoder, rank 2, 3, " in inspect(first[0])[0]
    assert peft_config(File(first[0])) == first[0].with_name("adapter_config.json")


def test_peft_needs_its_config(tmp_path: Path) -> None:
    path, _ = saved_by_peft(tmp_path, small("one_block")[0], "safetensors", target_modules=["to_q"])
    change_json(tmp_path / "adapter_config.json", use_rslora=True)
    with pytest.raises(ValueError, match=r"adapter_config\.json has settings that are not supported: use_rslora = True"):
        read_updates(open_lora(path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["use_rslora"], config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert {update.alpha for update in read_updates(open_lora(path)).values()} == {8}  # PEFT's own default
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has PEFT's names, .*: put its adapter_config\.json beside it"):
        read_updates(open_lora(path))


# What is refused.

A, B = "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"
OTHER = "lora_unet_mid_block_attentions_0_proj_in"
WRONG: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "LoHa": (lambda t: t.update({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}), r"_conv_in\.hada_w1_a, which is not LoRA"),
    "DoRA": (lambda t: t.update({"lora_unet_conv_in.dora_scale": torch.ones(2, 1)}), r"conv_in\.dora_scale, which is not LoRA"),
    "a norm": (lambda t: t.update({"lora_unet_conv_in.diff": torch.ones(2)}), r"lora_unet_conv_in\.diff, which is not LoRA"),
    "one matrix": (lambda t: t.pop(B), "conv_in needs both its matrices, but has alpha, down"),
    "ranks": (lambda t: t.update({B: torch.ones(8, 9, 1, 1)}), r"has matrices of shapes \[1, 4, 3, 3\] and \[8, 9, 1, 1\]"),
    "not finite": (lambda t: t[A].fill_(float("inf")), "not all numbers of lora_unet_conv_in are finite"),
    "integers": (lambda t: t.update({A: torch.ones(1, 4, 3, 3, dtype=torch.int64)}), "not all numbers of lora_unet_conv_in"),
    "another base": (lambda t: t.update({"lora_te2_x.lora_down.weight": torch.ones(2, 2), "lora_te2_x.lora_up.weight": torch.ones(2, 2)}),
                     "is a LoRA for another base model: this one has no lora_te2_x"),
    "another width": (lambda t: t.update({f"{OTHER}.lora_down.weight": torch.ones(1, 17), f"{OTHER}.lora_up.weight": torch.ones(16, 1)}),
                      f"another base model: {OTHER} is for a weight of 16 x 17, not 16 x 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_by_name(file: Path, case: str) -> None:
    edit, sentence = WRONG[case]
    *_, base = small("one_block")
    with pytest.raises(ValueError, match=sentence) as refused:
        with_loras(base, [(change(file, edit), 1.0)], (), 1.0)
    assert "a.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    save_file({"image_proj.norm.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="is not a LoRA; it holds image_proj"):
        open_lora(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="is not there: name the file of a LoRA with --lora"):
        open_lora(tmp_path / "c.safetensors")


# The command line.


def own_lora(path: Path, seed: int) -> Path:
    """A LoRA for the tiny weights: the first convolution and the values of the text."""
    tensors = {}
    value = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"
    for i, (name, shape) in enumerate({"unet.conv_in": (8, 4, 3, 3), value: (8, 8)}.items()):
        tensors[f"{name}.lora_A.weight"] = randn(2, *shape[1:], seed=seed + i).float()
        tensors[f"{name}.lora_B.weight"] = randn(shape[0], 2, *[1] * (len(shape) - 2), seed=seed + 9 + i).float()
    save_file(tensors, path)
    return path


def test_loras_are_drawn_and_drawn_again(weights: Path, tmp_path: Path) -> None:
    a, b = own_lora(tmp_path / "a.safetensors", 1), own_lora(tmp_path / "b.safetensors", 50)
    plain = draw(weights, tmp_path / "plain.png", "--prompt", "a fox")
    both = draw(weights, tmp_path / "both.png", "--prompt", "a fox", "--lora", a, "--lora-scale", 0.5, "--lora", b)
    assert difference(plain, both) > 5
    turned = draw(weights, tmp_path / "turned.png", "--prompt", "a fox", "--lora", b, "--lora", a, "--lora-scale", 0.5)
    assert difference(turned, both) <= 1
    off = draw(weights, tmp_path / "off.png", "--prompt", "a fox", "--lora", a, "--lora-scale", 0)
    assert difference(off, plain) == 0
    assert difference(again(tmp_path / "both.png", tmp_path / "same.png"), both) == 0
    own_lora(tmp_path / "b.safetensors", 51)
    refuses(tmp_path / "both.png", r"b\.safetensors: the file has changed")


def test_the_command_line_refuses_what_could_be_misread() -> None:
    for options, sentence in (
        (["--lora-scale", "2"], "--lora-scale is for a LoRA: name its file with --lora"),
        (["--lora-scale", "2", "--lora", "a", "--lora", "b"], "with several --lora, give each its own --lora-scale"),
        (["--lora", "a", "--lora-scale", "2", "--lora-scale", "1"], "--lora-scale is given twice for one LoRA"),
        (["--lora", "a", "--lora-scale", "1e9"], "scale must be a number between"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse(options)
    files = parse(["--lora", "a", "--lora", "b", "--lora-scale", "0.5", "--lora", "c"]).model.loras
    assert files == (LoraFile(Path("a")), LoraFile(Path("b"), 0.5), LoraFile(Path("c")))
    assert parse(["--lora-scale", "2", "--lora", "a"]).model.loras == (LoraFile(Path("a"), 2.0),)


def test_inspect_describes_a_lora(file: Path) -> None:
    lines = inspect(file)
    assert lines[0].startswith("a LoRA of ") and "12 of the text encoder, rank 1, 3, " in lines[0] and "--lora FILE" in lines[1]
    with pytest.raises(ValueError, match="is a LoRA, which is not converted: merge it when drawing"):
        convert(file, file.with_name("b.safetensors"))
    assert verify(file, file) == []


# Whole pictures, with diffusers' own loading and fusing, which needs PEFT.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build(tmp_path_factory.mktemp("lora"), "sd15")


@pytest.mark.parity("diffusers load_lora_weights and fuse_lora, in levels of 255", LEVEL)
@pytest.mark.parametrize("layout", ["kohya", "PEFT"])
def test_the_picture_is_diffusers(model: Model, tmp_path: Path, layout: str) -> None:
    pytest.importorskip("peft")
    pipe = model.peers[0]
    unet = {name: m for name, m in matrices(pipe.unet).items() if "attn" in name or "resnets" in name}
    names = nn.Module()
    names.named_modules = lambda: iter(unet.items())  # type: ignore[assignment, method-assign]
    write(tmp_path / "a.safetensors", layout, {"unet": names}, layout == "kohya")
    ask = Ask("A photo of a fox", "blurry", num=2)
    plain = theirs(model, ask, [])
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(lora_scale=0.8)
    try:
        want = theirs(model, ask, [])
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    ours = load(model.base, loras=[(tmp_path / "a.safetensors", 0.8)])
    drawn = ours.sample([ask.prompt] * 2, [11, 12], None, [ask.negative] * 2, steps=5, size=ask.size)  # type: ignore[arg-type]
    got = np.stack([np.asarray(image).astype(int) for image in to_images(drawn)])
    assert difference(got, want) <= LEVEL and difference(plain, want) > 20
