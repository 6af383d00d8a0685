"""The command: inspect, convert and verify, from one layout to another."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from base_files import IMAGE, Peers, Tensors, change, check_base, layers, names, write_single
from peers import vision_pair
from safetensors.torch import load_file, save_file
from test_adapter_files import Adapters, adapters, write_adapter

import checkpoints.files
from checkpoints.convert import convert, verify
from checkpoints.describe import inspect
from checkpoints.files import write_json, write_tensors
from checkpoints.stable_diffusion import load_base, load_unet, unet_config
from weights_convert import main

__all__ = ["adapters"]  # a fixture


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


def test_the_dtype_of_a_diffusers_folder(folder: Path, tmp_path: Path) -> None:
    convert(folder / "vae", tmp_path / "vae", torch.float16, diffusers=True)
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_what_a_unet_predicts_can_be_said(folder: Path, tmp_path: Path) -> None:
    """Of a whole model, and of a UNet alone."""
    convert(folder, tmp_path / "base", prediction="v")
    convert(folder / "unet", tmp_path / "unet.safetensors", prediction="v")
    assert unet_config(tmp_path / "base").prediction == load_unet(tmp_path / "unet.safetensors").config.prediction == "v"


def test_an_adapter_does_not_get_the_card_of_another_network(folder: Path, tmp_path: Path) -> None:
    adapter, target = tmp_path / "adapter.safetensors", tmp_path / "out.safetensors"
    save_file(layers(16), adapter)
    convert(folder / "vae", target)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for end in (".safetensors", ".bin"):
        with pytest.raises(ValueError, match=r"beside it, out\.json, which describes a network: name another TARGET, or remove it$"):
            convert(adapter, target.with_suffix(end))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    target.with_suffix(".json").write_text('{"description": "mine"}')  # no card
    convert(adapter, target)
    assert verify(adapter, target) == [] and json.loads(target.with_suffix(".json").read_text()) == {"description": "mine"}
    convert(folder / "vae", target)
    says(target, "vae, ")


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
    "ema of a folder": ["convert", "--ema", "base", "out"],
    "a prediction of a VAE": ["convert", "--prediction", "v", "vae", "out.safetensors"],
    "a prediction in diffusers' config": ["convert", "--diffusers", "--prediction", "v", "unet", "out"],
    "ema of an adapter": ["convert", "--ema", "adapter.safetensors", "out.safetensors"],
    "diffusers of an adapter": ["convert", "--diffusers", "adapter.safetensors", "out"],
    "an adapter of another kind of file": ["convert", "adapter.safetensors", "out.pt"],
    "a part as bin": ["convert", "vae", "out.bin"],
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
    shutil.copytree(folder, "base")
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
