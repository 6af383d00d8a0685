"""`--again`: a picture is drawn again from what its PNG says, by the same files, wherever they are now."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from tiny import PARTS, again, difference, draw, names, pixels_of, refuses

from checkpoints.files import write_json
from checkpoints.names import unet_rows
from sampling import __main__ as cli
from sampling.images import KEY, read_settings, save_image
from sampling.loading import load
from sampling.parser import MACHINE, parser
from sampling.record import ROOT, recall


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_again_draws_the_same_picture(weights: Path, tmp_path: Path, image: Path, eta: float) -> None:
    prompts = ("--image", image, "--fit", "pad", "--prompt", "a fox", "--negative-prompt", "an owl")
    options = (*prompts, "--scale", 0.6, "--guidance", 3, "--width", 20)
    first = draw(weights, tmp_path / "a.png", *options, "--seed", 3, "--eta", eta, "--steps", 4)
    assert difference(first, again(tmp_path / "a.png", tmp_path / "b.png")) == 0
    assert read_settings(tmp_path / "a.png") == read_settings(tmp_path / "b.png")
    assert difference(first, again(tmp_path / "b.png", tmp_path / "c.png")) == 0


def test_again_of_one_of_several(weights: Path, tmp_path: Path) -> None:
    draw(weights, tmp_path / "many.png", "--num", 3, "--seed", 5)
    assert difference(pixels_of(tmp_path / "many-2.png"), again(tmp_path / "many-2.png", tmp_path / "b.png")) <= 1
    assert names(tmp_path) == ["b.png", "many-0.png", "many-1.png", "many-2.png"]


@pytest.fixture
def drawn(weights: Path, tmp_path: Path, image: Path) -> tuple[Path, Path, Path]:
    """A copy of the weights, a copy of the image, and the picture drawn from them."""
    shutil.copytree(weights, tmp_path / "weights")
    shutil.copy(image, tmp_path / "image.png")
    draw(tmp_path / "weights", tmp_path / "a.png", "--image", tmp_path / "image.png")
    return tmp_path / "weights", tmp_path / "image.png", tmp_path / "a.png"


def test_the_settings_of_a_lora_by_peft_are_recorded(weights: Path, tmp_path: Path) -> None:
    """They are found beside the weights, also where both lie beside the picture. Those beside other files do not matter."""
    folder, picture = tmp_path / "lora", tmp_path / "a.png"
    folder.mkdir()
    unet = load(weights, ()).unet
    module = next(name for name, layer in unet.named_modules() if name.endswith("to_q"))
    official = next(theirs for ours, theirs, *_ in unet_rows(unet.config) if ours == module)
    names = [f"base_model.model.{official}.lora_{part}.weight" for part in "AB"]
    width = unet.get_submodule(module).in_features
    save_file({names[0]: torch.ones(1, width), names[1]: torch.ones(width, 1)}, folder / "peft.safetensors")
    write_json(folder / "adapter_config.json", {"lora_alpha": 1, "r": 1})
    first = draw(weights, picture, "--lora", folder / "peft.safetensors")
    assert f"{folder}/adapter_config.json" in "".join(read_settings(picture)["sha256"])
    for name in ("peft.safetensors", "adapter_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    write_json(folder / "adapter_config.json", {"lora_alpha": 2, "r": 1})
    assert difference(first, again(picture, tmp_path / "b.png")) == 0
    (tmp_path / "adapter_config.json").unlink()
    refuses(picture, "adapter_config.json: the file has changed")
    shutil.copytree(weights, tmp_path / "plain")
    draw(tmp_path / "plain", tmp_path / "c.png")
    write_json(tmp_path / "plain" / "adapter_config.json", {})
    again(tmp_path / "c.png", tmp_path / "d.png")


@pytest.mark.parametrize("part", PARTS)
def test_again_refuses_other_weights(drawn: tuple[Path, Path, Path], part: str) -> None:
    folder, _, picture = drawn
    path = folder / f"{part}.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    refuses(picture, f"{part}.safetensors: the file has changed")


@pytest.mark.parametrize("part", ["vae", "unet", "image_encoder"])
def test_again_refuses_another_config(drawn: tuple[Path, Path, Path], part: str) -> None:
    """A card decides the picture as much as the weights: the VAE's scale, what the UNet predicts."""
    folder, _, picture = drawn
    card = json.loads((folder / f"{part}.json").read_text())
    card["config"] |= {
        "vae": {"scale": 2.0},
        "unet": {"prediction": "v"},
        "image_encoder": {"activation": "quick_gelu"},
    }[part]
    write_json(folder / f"{part}.json", card)
    refuses(picture, part)


@pytest.mark.parametrize("part", PARTS)
def test_again_refuses_missing_weights(drawn: tuple[Path, Path, Path], part: str) -> None:
    folder, _, picture = drawn
    (folder / f"{part}.safetensors").unlink()
    refuses(picture, f"{part}.safetensors, which is not there")


def test_again_refuses_another_image(drawn: tuple[Path, Path, Path]) -> None:
    _, image, picture = drawn
    Image.new("RGB", (9, 9), "green").save(image)
    refuses(picture, r"image\.png: the file has changed")
    image.unlink()
    refuses(picture, r"image\.png, which is not there")


DEMO, OLD = {"command": "python -m sampling.sheets demo --seed 0"}, {"arguments": {"prompt": "a fox"}, "sha256": {}}


@pytest.mark.parametrize("settings", [None, DEMO, OLD], ids=["none", "demo", "old"])
def test_again_refuses_what_it_did_not_draw(tmp_path: Path, settings: dict[str, object] | None) -> None:
    path, image = tmp_path / "foreign.png", Image.new("RGB", (8, 8))
    if settings is None:
        image.save(path)
    else:
        save_image(image, path, settings)
    refuses(path, r"foreign\.png")


def test_an_adapter_without_a_picture_is_recorded(weights: Path, tmp_path: Path) -> None:
    """A FaceID adapter holds a LoRA, which acts without a picture too."""
    for part in ("ip_adapter", "image_encoder"):
        for end in (".safetensors", ".json"):
            shutil.copy(weights / f"{part}{end}", tmp_path / f"{part}{end}")
    adapter, encoder = (tmp_path / f"{part}.safetensors" for part in ("ip_adapter", "image_encoder"))
    for given in (("--ip-adapter", adapter), ("--image-encoder", encoder), ("--ip-adapter", adapter, "--image-encoder", encoder)):
        drawn = draw(weights, tmp_path / "a.png", "--prompt", "a fox", *given)
        assert difference(again(tmp_path / "a.png", tmp_path / "b.png"), drawn) == 0
        for path in given[1::2]:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[:-1])
            Path(tmp_path / "b.png").unlink(missing_ok=True)
            refuses(tmp_path / "a.png", rf"{Path(path).name}: the file has changed since")
            Path(path).write_bytes(whole)


# Names of files.


def test_a_record_holds_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped files are stored by name, so a picture is drawn again from any folder, by any copy of the project."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "sampling" / "examples" / "owl.png"
    cli.run(["--image", str(shipped), "--image", str(tmp_path / "photo.png"), "--steps", "1"])
    text = json.dumps(read_settings(tmp_path / "out.png"))
    assert str(ROOT) not in text and str(tmp_path) not in text
    assert '"ip-adapter:sampling/examples/owl.png"' in text and '"~/photo.png"' in text
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert difference(again(tmp_path / "out.png", tmp_path / "b.png"), pixels_of(tmp_path / "out.png")) == 0


@pytest.fixture
def moved(weights: Path, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A folder in which a picture was drawn by relative names, and its pixels. The test now runs in another folder."""
    folder, elsewhere = tmp_path / "drawn", tmp_path / "elsewhere"
    shutil.copytree(weights, folder / "models" / "tiny")
    for name, turn in (("image.png", 0), ("mask.png", 180), ("init.png", 90)):  # none equals another
        Image.open(image).rotate(turn).save(folder / name)
    shutil.move(folder / "models" / "tiny" / "ip_adapter.safetensors", folder / "a.safetensors")
    shutil.move(folder / "models" / "tiny" / "ip_adapter.json", folder / "a.json")
    elsewhere.mkdir()
    monkeypatch.chdir(folder)
    named = "--image image.png --image-mask mask.png --init-image init.png --ip-adapter a.safetensors"
    pixels = draw(Path("models/tiny"), Path("out.png"), *named.split())
    monkeypatch.chdir(elsewhere)
    return folder, pixels


def test_files_are_found_beside_the_picture(moved: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    assert difference(again(moved[0] / "out.png", tmp_path / "b.png"), moved[1]) == 0


def test_files_are_found_in_this_folder(moved: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    for path in moved[0].iterdir():
        if path.name != "out.png":
            shutil.move(path, Path.cwd() / path.name)
    assert difference(again(moved[0] / "out.png", tmp_path / "b.png"), moved[1]) == 0


def test_files_under_another_name_are_found_by_their_hash(moved: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    (moved[0] / "image.png").rename(moved[0] / "renamed.png")
    (moved[0] / "a.safetensors").rename(moved[0] / "z.safetensors")
    (moved[0] / "a.json").rename(moved[0] / "z.json")
    (moved[0] / "models" / "tiny").rename(moved[0] / "weights of mine")
    assert difference(again(moved[0] / "out.png", tmp_path / "b.png"), moved[1]) == 0


@pytest.mark.parametrize("end", [".json", ".yaml", ".yml"])
def test_a_file_is_found_with_its_settings_or_not_at_all(
    weights: Path, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A base model's .yaml says what its UNet predicts, so the weights alone are another model."""
    (tmp_path / "drawn").mkdir()
    shutil.copy(weights / "ip_adapter.safetensors", tmp_path / "drawn" / "a.safetensors")
    (tmp_path / "drawn" / f"a{end}").write_text("{}")
    monkeypatch.chdir(tmp_path / "drawn")
    draw(weights, Path("out.png"), "--image", image, "--ip-adapter", "a.safetensors")
    monkeypatch.chdir(tmp_path)
    Path("drawn", f"a{end}").rename(f"b{end}")
    refuses(tmp_path / "drawn" / "out.png", rf"was drawn with a\{end}, which is not there")
    Path(f"b{end}").rename(f"a{end}")
    Path("drawn", "a.safetensors").rename("a.safetensors")
    again(tmp_path / "drawn" / "out.png", tmp_path / "b.png")


def test_another_file_of_the_same_name_is_not_taken(moved: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    Image.new("RGB", (48, 16)).save(moved[0] / "image.png")
    refuses(moved[0] / "out.png", r"another image\.png: the file has changed since")
    (moved[0] / "image.png").unlink()
    refuses(moved[0] / "out.png", r"image\.png, which is not there: put it beside the picture")
    Image.new("RGB", (48, 16)).save("image.png")
    refuses(moved[0] / "out.png", r"another image\.png: the file has changed since")


# The first format: the arguments of the command line.

FIRST = {
    "image": [], "image_weight": [], "image_rule": None, "negative_image": [], "scale": 1.0, "image_layers": None,
    "image_start": 0.0, "image_end": 1.0, "image_mask": None, "fit": "crop", "prompt": "", "negative_prompt": "",
    "guidance": 7.5, "image_guidance": None, "steps": 3, "sampler": "ddim", "eta": 0.0, "init_image": None,
    "strength": None, "mask": None, "no_paste": False, "seed": 0, "num": 1, "width": None, "height": None,
    "dtype": "float32", "device": "cpu", "compile": False, "checkpoint": None, "ip_adapter": None, "image_encoder": None,
}  # fmt: skip


@pytest.mark.parametrize("case", ["text", "one adapter", "two adapters", "edit", "older"])
def test_the_first_format_is_read(
    weights: Path, tmp_path: Path, image: Path, second: Path, photo: tuple[Path, Path], case: str
) -> None:
    """As commits before this one wrote it: absolute paths, and a list for each option where there are several adapters."""
    adapter, a, b = (str(path) for path in (weights / "ip_adapter.safetensors", image, second))
    arguments, options = {
        "text": ({"prompt": "a fox", "guidance": 3.0, "width": 24}, "--prompt fox --guidance 3 --width 24"),
        "one adapter": (
            {"image": [a, b], "image_weight": [1.0, 0.5], "image_rule": "tokens", "scale": 0.5, "negative_image": [b]},
            f"--image {a} --image {b} --image-weight 1 --image-weight 0.5 --image-rule tokens --scale 0.5 --negative-image {b}",
        ),
        "two adapters": (
            {"ip_adapter": [adapter] * 2, "image": [[a], [b]], "scale": [0.5, 1.0], "image_layers": ["style", None]}
            | {name: [FIRST[name]] * 2 for name in ("image_weight", "image_rule", "negative_image", "image_mask")}
            | {"image_start": [0.0, 0.0], "image_end": [1.0, 0.5]},
            f"--ip-adapter {adapter} --image {a} --scale 0.5 --image-layers style --ip-adapter {adapter} --image {b} "
            "--image-end 0.5",
        ),
        "edit": (
            {"init_image": str(photo[0]), "mask": str(photo[1]), "strength": 0.7, "no_paste": True, "sampler": "dpm++"},
            f"--init-image {photo[0]} --mask {photo[1]} --strength 0.7 --no-paste --sampler dpm++",
        ),
        "older": ({"prompt": "fox"}, "--prompt fox"),
    }[case]
    wanted = draw(weights, tmp_path / "new.png", *options.split())
    record, first = read_settings(tmp_path / "new.png"), FIRST | {"checkpoint": str(weights)} | arguments
    if case == "older":  # from before most options were there
        first = {name: first[name] for name in ("image", "scale", "prompt", "steps", "seed", "checkpoint")}
    if case == "text":
        first["prompt"] = "fox"
    save_image(Image.new("RGB", (16, 16)), tmp_path / "old.png", {"arguments": first, "sha256": record["sha256"]})
    assert difference(again(tmp_path / "old.png", tmp_path / "b.png"), wanted) == 0
    assert read_settings(tmp_path / "b.png")["request"] == record["request"]


# What a stranger may have written.

HOSTILE: list[Any] = [
    None, True, -1, 2**64, 10**400, 1e308, "abc", "\x1b[31m", "\ud800", "a\0b", "x" * 5000, "/dev/zero", "/dev/stdin", "..",
    "~nobody/x", "ip-adapter:../../etc/passwd", [], [[]], [None], ["a"] * 3, {}, {"a": 1}, {"up": {"block_0": [{}]}},
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a JSON tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value in one place."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = changed(tree[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("form", ["request", "arguments"])
def test_hostile_records_are_refused_in_a_sentence(drawn: tuple[Path, Path, Path], form: str) -> None:
    """Any value in any place: the record is read as it was meant, or refused; nothing else is raised, and nothing hangs."""
    folder, image, picture = drawn
    record = read_settings(picture)
    if form == "arguments":
        arguments = FIRST | {
            "checkpoint": str(folder),
            "image": [str(image)],
            "strength": 0.5,
            "init_image": str(image),
        }
        record = {"arguments": arguments, "sha256": record["sha256"]}
    recalled = 0
    for place in places(record):
        for value in HOSTILE:
            settings = changed(record, place, value)
            try:
                if not isinstance(settings, dict):
                    raise ValueError
                save_image(Image.new("RGB", (1, 1)), picture, settings)
                recall(picture)
                recalled += 1
            except (ValueError, OSError) as error:
                assert "\n" not in str(error)
    assert recalled > 20


TEXTS = [
    "",
    "null",
    "[" * 200_000,
    '{"a":' * 200_000,
    '{"arguments": null}',
    '{"request": NaN, "sha256": {}}',
    "9" * 5000,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:24])
def test_hostile_texts_are_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, text)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"a\.png"):
        recall(tmp_path / "a.png")


def test_hostile_headers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """A header that claims 2^31 pixels, files that are none, and a text that inflates to more than memory."""
    save_image(Image.new("RGB", (1, 1)), tmp_path / "small.png", {})
    small = (tmp_path / "small.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + small[24:29]
    text = b"zTXt" + KEY.encode() + b"\0\0" + zlib.compress(b"[" * 10**8)
    large, inflating = (
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (header, text)
    )
    for data in (
        small[:8] + large + small[33:],
        small[:33] + inflating + small[33:],
        small[:40],
        b"",
        b"\x89PNG\r\n\x1a\n",
    ):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.png: not a picture that this program drew"):
            recall(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="not a picture that this program drew"):
            recall(path)


def test_a_message_holds_no_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"request": {"version": 1, "sampler": "\x1b[31m\x07"}, "model": {}, "sha256": {}}
    save_image(Image.new("RGB", (1, 1)), tmp_path / "a.png", settings)
    for name in ("a.png", "\x1b[31m.png"):
        monkeypatch.setattr(sys, "argv", ["sampling", "--again", str(tmp_path / name)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert str(stopped.value).startswith("error: ") and str(stopped.value).isprintable()


def test_the_machine_may_be_chosen_beside_again(weights: Path, tmp_path: Path) -> None:
    first = draw(weights, tmp_path / "a.png")
    cli.run(["--again", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), "--device", "cpu"])
    assert difference(first, pixels_of(tmp_path / "b.png")) == 0


def test_again_refuses_weights_that_the_record_does_not_name(drawn: tuple[Path, Path, Path]) -> None:
    """Here, the adapter."""
    picture = drawn[2]
    settings = read_settings(picture)
    settings["sha256"] = {name: digest for name, digest in settings["sha256"].items() if "ip_adapter" not in name}
    save_image(Image.open(picture).convert("RGB"), picture, settings)
    refuses(picture, "does not say which")


def test_other_options_are_refused_beside_again(tmp_path: Path) -> None:
    values = {"--fit": "pad", "--sampler": "ddim", "--schedule": "karras", "--image-rule": "tokens", "--dtype": "float16"}
    values["--prediction"] = "v"
    for action in parser()._actions:
        flag = action.option_strings[-1]
        if action.dest not in {"again", "out", "save_embedding", "device", "help", *MACHINE}:
            value = [values.get(flag, "1")] * (1 if action.nargs is None else action.nargs)
            with pytest.raises(ValueError, match=f"--again takes every setting from its picture: leave out {flag}"):
                cli.run(["--again", str(tmp_path / "a.png"), flag, *value])


def test_an_embedding_is_saved_of_a_picture_with_an_image_prompt_only(
    weights: Path, tmp_path: Path, image: Path
) -> None:
    draw(weights, tmp_path / "text.png", "--prompt", "a fox")
    draw(weights, tmp_path / "image.png", "--image", image)
    kept = ("--out", str(tmp_path / "b.png"), "--save-embedding", str(tmp_path / "kept.safetensors"))
    with pytest.raises(ValueError, match="--save-embedding writes one adapter's image prompt"):
        cli.run(["--again", str(tmp_path / "text.png"), *kept])
    cli.run(["--again", str(tmp_path / "image.png"), *kept])
    assert names(tmp_path) == ["b.png", "image.png", "kept.safetensors", "text.png"]
