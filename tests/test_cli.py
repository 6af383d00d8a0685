"""The command line, end to end, on a folder of tiny random weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IMAGE, PARTS, UNET, VAE_CONFIG, again, difference, draw, loud, names, pixels_of
from torch import nn

from checkpoints import cards
from model.image_encoder import ImageEncoder
from model.unet import UNet
from model.vae import VAE
from sampling import __main__ as cli
from sampling import batch, command, machine
from sampling.images import read_settings
from sampling.inputs import read_inputs
from sampling.loading import compile_unet, load
from sampling.parser import parser
from sampling.pipeline import Pipeline
from sampling.request import Request


def test_text_only(weights: Path, tmp_path: Path) -> None:
    a = draw(weights, tmp_path / "a.png", "--prompt", "a fox")
    b = draw(weights, tmp_path / "b.png", "--prompt", "an owl on a pink background")
    assert a.shape == (16, 16, 3)
    assert difference(a, b) > 1
    assert names(tmp_path) == ["a.png", "b.png"]


def test_image_only_and_both(weights: Path, tmp_path: Path, image: Path) -> None:
    nothing = draw(weights, tmp_path / "nothing.png")
    alone = draw(weights, tmp_path / "alone.png", "--image", image)
    both = draw(weights, tmp_path / "both.png", "--image", image, "--prompt", "a fox")
    text = draw(weights, tmp_path / "text.png", "--prompt", "a fox")
    pictures = [nothing, alone, both, text]
    assert all(difference(a, b) > 1 for i, a in enumerate(pictures) for b in pictures[:i])


def test_scale_zero_is_the_text_alone(weights: Path, tmp_path: Path, image: Path) -> None:
    off = draw(weights, tmp_path / "a.png", "--image", image, "--prompt", "a fox", "--scale", 0)
    assert difference(off, draw(weights, tmp_path / "b.png", "--prompt", "a fox")) == 0
    half = draw(weights, tmp_path / "c.png", "--image", image, "--prompt", "a fox", "--scale", 0.5)
    assert difference(off, half) > 1


def test_several_images_are_one_prompt(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    one, other = (draw(weights, tmp_path / f"{path.stem}.png", "--image", path) for path in (image, second))
    two = draw(weights, tmp_path / "two.png", "--image", image, "--image", second)
    twice = draw(weights, tmp_path / "twice.png", "--image", image, "--image", image)
    assert difference(two, one) > 1 and difference(two, other) > 1
    assert difference(twice, one) <= 1  # the same keys twice leave a softmax's mean as it is
    (prompt,) = read_settings(tmp_path / "two.png")["request"]["image_prompts"]
    assert prompt["images"] == [str(image), str(second)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_three_pictures_are_three_single_ones(weights: Path, tmp_path: Path, image: Path, eta: float) -> None:
    options = ("--image", image, "--prompt", "a fox", "--eta", eta)
    draw(weights, tmp_path / "many.png", *options, "--seed", 5, "--num", 3)
    assert names(tmp_path) == ["many-0.png", "many-1.png", "many-2.png"]
    many = [pixels_of(tmp_path / f"many-{i}.png") for i in range(3)]
    for i in range(3):
        assert difference(many[i], draw(weights, tmp_path / "one.png", *options, "--seed", 5 + i)) <= 1
    assert difference(many[0], many[1]) > 1


def test_more_pictures_than_a_batch(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(weights, tmp_path / "a.png", "--num", 3)
    monkeypatch.setattr(batch, "BATCH", 2)
    draw(weights, tmp_path / "b.png", "--num", 3)
    assert all(
        difference(pixels_of(tmp_path / f"a-{i}.png"), pixels_of(tmp_path / f"b-{i}.png")) <= 1 for i in range(3)
    )


@pytest.mark.parametrize(("width", "height"), [(24, 16), (12, 32), (20, 28), (4, 4)])
def test_sizes(weights: Path, tmp_path: Path, image: Path, width: int, height: int) -> None:
    drawn = draw(weights, tmp_path / "a.png", "--image", image, "--width", width, "--height", height)
    assert drawn.shape == (height, width, 3)


@pytest.mark.parametrize("size", [("--width", 18), ("--height", 15), ("--width", -8), ("--width", 0), ("--height", 0)])
def test_wrong_sizes_are_refused(weights: Path, tmp_path: Path, size: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match=f"multiples of 4, not .*{size[1]}"):
        draw(weights, tmp_path / "a.png", *size)
    assert names(tmp_path) == []


@pytest.mark.parametrize("option", [("--steps", 0), ("--steps", 1001), ("--num", 0), ("--eta", 2)])
def test_wrong_numbers_are_refused(weights: Path, tmp_path: Path, option: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match=option[0].removeprefix("--")):
        draw(weights, tmp_path / "a.png", *option)
    assert names(tmp_path) == []


def test_negative_prompt(weights: Path, tmp_path: Path) -> None:
    plain, negative = (
        draw(weights, tmp_path / "a.png"),
        draw(weights, tmp_path / "b.png", "--negative-prompt", "a purple owl"),
    )
    assert difference(plain, negative) > 1
    with pytest.raises(ValueError, match="--negative-prompt is for the unconditional pass, which --guidance 1 leaves out"):
        draw(weights, tmp_path / "c.png", "--guidance", 1, "--negative-prompt", "a purple owl")
    draw(weights, tmp_path / "c.png", "--guidance", 1, "--negative-prompt", "")


def test_fits_differ_for_a_picture_that_is_not_square(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    wide = [draw(weights, tmp_path / "a.png", "--image", image, "--fit", fit) for fit in ("crop", "squash", "pad")]
    assert all(difference(a, b) > 1 for i, a in enumerate(wide) for b in wide[:i])
    square = [draw(weights, tmp_path / "a.png", "--image", second, "--fit", fit) for fit in ("crop", "squash", "pad")]
    assert all(difference(square[0], other) <= 1 for other in square[1:])


def test_a_fit_holds_for_negative_images_and_saved_embeddings(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    out, kept, fits = tmp_path / "a.png", tmp_path / "kept.safetensors", ("crop", "squash", "pad")
    against = [draw(weights, out, "--image", second, "--negative-image", image, "--fit", fit) for fit in fits]
    assert all(difference(a, b) > 1 for i, a in enumerate(against) for b in against[:i])
    for fit in fits:
        want = draw(weights, out, "--image", image, "--fit", fit, "--save-embedding", kept)
        assert difference(draw(weights, out, "--image", kept), want) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(weights: Path, tmp_path: Path, image: Path, dtype: str) -> None:
    options = ("--image", image, "--prompt", "a fox", "--guidance", 2)
    full, half = (
        draw(weights, tmp_path / "a.png", *options),
        draw(weights, tmp_path / "b.png", *options, "--dtype", dtype),
    )
    assert np.abs(full - half).mean() < 8


def test_other_files_than_the_folders_own(weights: Path, tmp_path: Path, image: Path) -> None:
    moved, bare = tmp_path / "moved", tmp_path / "bare"
    shutil.copytree(weights, bare)
    moved.mkdir()
    for part in ("ip_adapter", "image_encoder"):
        for suffix in (".safetensors", ".json"):
            shutil.move(bare / f"{part}{suffix}", moved / f"{part}{suffix}")
    options = ("--ip-adapter", moved / "ip_adapter.safetensors", "--image-encoder", moved / "image_encoder.safetensors")
    own = draw(weights, tmp_path / "a.png", "--image", image)
    assert difference(own, draw(bare, tmp_path / "b.png", "--image", image, *options)) == 0
    recorded = read_settings(tmp_path / "b.png")["sha256"]
    assert {str(path) for path in (*options[1::2], image, bare / "unet.safetensors")} < set(recorded)


def test_missing_folder_names_the_command(tmp_path: Path, image: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make weights"):
        draw(tmp_path / "none", tmp_path / "a.png", "--image", image)
    with pytest.raises(FileNotFoundError, match="make weights"):
        draw(tmp_path / "none", tmp_path / "a.png")
    assert names(tmp_path) == []


@pytest.mark.parametrize("part", PARTS)
def test_missing_part_names_the_command(weights: Path, tmp_path: Path, image: Path, part: str) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    (tmp_path / "weights" / f"{part}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"({part}\.safetensors|--{part.replace('_', '-')}).*make weights"):
        draw(tmp_path / "weights", tmp_path / "a.png", "--image", image)
    assert names(tmp_path) == ["weights"]


def test_cut_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    path = tmp_path / "weights" / "unet.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"unet\.safetensors"):
        draw(tmp_path / "weights", tmp_path / "a.png")
    assert names(tmp_path) == ["weights"]


@pytest.mark.parametrize("content", [None, b"text"])
def test_bad_image_is_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the weights were read"))
    if content:
        (tmp_path / "bad.png").write_bytes(content)
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"bad\.png"):
        draw(tmp_path / "none", tmp_path / "a.png", "--image", tmp_path / "bad.png")
    assert names(tmp_path) == before


def test_adapter_of_another_encoder_is_refused(weights: Path, tmp_path: Path, image: Path) -> None:
    cards.save(ImageEncoder(replace(IMAGE, output_dim=20)), tmp_path / "image_encoder.safetensors", {})
    with pytest.raises(ValueError, match=r"needs 12-d, but you gave 20-d: pass that encoder"):
        draw(weights, tmp_path / "a.png", "--image", image, "--image-encoder", tmp_path / "image_encoder.safetensors")
    assert not (tmp_path / "a.png").exists()


def test_a_failed_save_leaves_nothing(weights: Path, tmp_path: Path) -> None:
    """`--out` names a folder."""
    (tmp_path / "folder").mkdir()
    with pytest.raises((ValueError, OSError), match="folder"):
        draw(weights, tmp_path / "folder")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == []


def test_unknown_words_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="zeppelin"):
        known = draw(weights, tmp_path / "a.png", "--prompt", "a zeppelin fox")
    assert difference(known, draw(weights, tmp_path / "b.png", "--prompt", "a fox")) == 0


MISTAKES = {
    "image": ["--image", "no-such.png"],
    "weights": ["--checkpoint", "none"],
    "again": ["--again", "no-such.png"],
    "seed": ["--seed", str(2**70)],
    "seed of the last": ["--seed", str(2**64 - 1), "--num", "2"],
    "folder": ["--out", ".."],
    "format": ["--out", "a.jpg"],
    "guidance": ["--guidance", "nan"],
    "large": ["--guidance", "1e30"],
    "lambda": ["--scale", "inf", "--image", "x.png"],
    "lambda of no picture": ["--scale", "nan"],
    "memory": ["--width", "100000000"],
    "vae": ["--vae", "no-such"],
    "device": ["--device", "nonsense"],
}


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_errors_are_one_sentence(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """`main` ends with "error: ..." and status 1, never with a traceback."""
    monkeypatch.chdir(tmp_path)
    folder = [] if "--checkpoint" in arguments else ["--checkpoint", str(weights)]
    monkeypatch.setattr(sys, "argv", ["sampling", *folder, "--steps", "1", *arguments])
    with pytest.raises(SystemExit, match=r"^error: .+"):
        cli.main()
    assert names(tmp_path) == []


def test_help_lists_every_option_in_its_group_with_a_sentence() -> None:
    page = parser().format_help()
    assert re.findall(r"^(\w+):$", page, re.MULTILINE) == ["picture", "text", "size", "structure", "edit", "sampler", "files"]
    for option in parser()._option_string_actions:
        assert re.search(rf"^  ({option}|-h, {option})\b", page, re.MULTILINE) or option == "-h"
    for action in parser()._actions:
        assert re.fullmatch(r"[A-Zw].*\.", action.help or ""), f"{action.dest}: not a sentence"


def test_compile_freezes_the_unet(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler is replaced here by a double: what it makes of the UNet is in tests/test_guidance.py."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda unet, **how: seen.append((type(unet), how)) or unet)
    draw(weights, tmp_path / "a.png", "--compile")
    compile_unet(UNet(UNET).to("meta"))
    assert seen == [(UNet, {"options": {"freezing": True}}), (UNet, {"mode": "max-autotune"})]


@pytest.mark.parametrize("more", [(), ("--keep-memory",), ("--copy",)])
@pytest.mark.parametrize("options", [("--image", "IMAGE"), ("--prompt", "a fox", "--num", "2", "--dtype", "bfloat16")])
def test_fast_changes_nothing_but_rounding(
    weights: Path, tmp_path: Path, image: Path, options: tuple[str, ...], more: tuple[str, ...]
) -> None:
    """Neither the picture nor its record. In bfloat16, it is as far from the picture in float32 as without --fast."""
    given = [str(image) if option == "IMAGE" else option for option in options]
    draw(weights, tmp_path / "plain.png", *given)
    draw(weights, tmp_path / "fast.png", *given, "--fast", *more)
    draw(weights, tmp_path / "exact.png", *given, "--dtype", "float32")
    for a, b, c in zip(*(sorted(tmp_path.glob(f"{name}*.png")) for name in ("plain", "fast", "exact")), strict=True):
        plain, fast, exact = (pixels_of(path) for path in (a, b, c))
        assert abs(fast - exact).mean() <= 2 * abs(plain - exact).mean() + 0.1
        assert "bfloat16" in options or difference(plain, fast) <= 1
        assert read_settings(a) == read_settings(b)
        assert difference(again(a, tmp_path / "c.png"), pixels_of(a)) == 0


def test_what_fast_is_not_for_is_refused_at_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the weights were read"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(command, "check_device", lambda device: device)
    for options in (("--dtype", "float16"), ("--compile",), ("--device", "cuda")):
        with pytest.raises(ValueError, match="--fast is for a CPU, in float32 or bfloat16 and without --compile"):
            draw(weights, tmp_path / "a.png", "--fast", *options)
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(ValueError, match="--keep-memory needs glibc"):
        draw(weights, tmp_path / "a.png", "--keep-memory")


def test_copied_weights_are_not_the_files(weights: Path, tmp_path: Path) -> None:
    """Files that are overwritten in place change a mapped model, and not a copied one."""
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    pipeline = load(folder, copy=True)
    before = {name: weight.clone() for name, weight in pipeline.unet.named_parameters()}
    path = folder / "unet.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(before[name], weight) for name, weight in pipeline.unet.named_parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compile_without_a_compiler_is_refused_at_once(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the weights were read"))
    monkeypatch.setattr(command, "check_device", lambda device: device)
    for names_it, name in (({}, "gcc" if device == "cuda" else "g++"), ({"CXX": "icpx", "CC": "icx"}, "ic")):
        for key, value in names_it.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(
            ValueError, match=f"--compile needs {re.escape(name)}.*, which is not installed: install it, or leave"
        ):
            draw(weights, tmp_path / "a.png", "--compile", "--device", device)


@pytest.mark.parametrize("num", [5, 2])
def test_each_picture_is_written_as_it_is_drawn(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    """Ctrl-C in the third batch leaves the pictures of the first two, and says how many."""
    monkeypatch.setattr(batch, "BATCH", 1)
    drawn: list[int] = []
    sample = Pipeline.sample

    def interrupted(self: Pipeline, *args: Any, **options: Any) -> Any:
        assert len(list(tmp_path.iterdir())) == len(drawn)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(1)
        return sample(self, *args, **options)

    monkeypatch.setattr(Pipeline, "sample", interrupted)
    monkeypatch.setattr(
        sys,
        "argv",
        ["sampling", "--checkpoint", str(weights), "--steps", "1", "--num", str(num), "--out", str(tmp_path / "a.png")],
    )
    if num == 2:
        cli.main()
    else:
        with pytest.raises(SystemExit, match=r"^stopped; 2 of 5 written$"):
            cli.main()
    assert names(tmp_path) == ["a-0.png", "a-1.png"]


def test_large_pictures_are_drawn_one_at_a_time(weights: Path) -> None:
    drawer, small, large = load(weights), Request(), Request(width=4 * 64, height=4 * 64)
    assert [len(each) for each in drawer.batches(read_inputs(small), 40)] == [16, 16, 8]
    assert [len(each) for each in drawer.batches(read_inputs(large), 3)] == [1, 1, 1]


def large(module: nn.Module) -> nn.Module:
    """Weights whose results overflow in float16, and in no wider type."""
    with torch.no_grad():
        [weight for weight in module.parameters() if weight.ndim > 1][-1].mul_(1e4)
    return module


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_result_that_is_not_finite_is_an_error(weights: Path, tmp_path: Path, part: str) -> None:
    """It was drawn black, and the exit code was 0."""
    shutil.copytree(weights, tmp_path / "weights")
    whole = load(weights)
    cards.save(large({"unet": whole.unet, "vae": whole.vae}[part]), tmp_path / "weights" / f"{part}.safetensors", {})
    with pytest.raises(ValueError, match=r"not finite in float16: use --dtype bfloat16 or float32"):
        draw(tmp_path / "weights", tmp_path / "a.png", "--dtype", "float16", "--guidance", 9999)
    assert names(tmp_path) == ["weights"]
    for dtype in ("float32", "bfloat16"):
        assert draw(tmp_path / "weights", tmp_path / "a.png", "--dtype", dtype).shape == (16, 16, 3)


def test_another_autoencoder(weights: Path, tmp_path: Path) -> None:
    """--vae takes the place of the base model's, which may be missing; the picture remembers it."""
    torch.manual_seed(5)
    cards.save(loud(VAE(VAE_CONFIG)), tmp_path / "vae" / "better.safetensors", {})
    own = draw(weights, tmp_path / "a.png")
    other = draw(weights, tmp_path / "b.png", "--vae", tmp_path / "vae" / "better.safetensors")
    assert difference(own, other) > 10
    assert difference(again(tmp_path / "b.png", tmp_path / "c.png"), other) == 0
    shutil.copytree(weights, tmp_path / "bare")
    (tmp_path / "bare" / "vae.safetensors").unlink()
    (tmp_path / "bare" / "vae.json").unlink()
    options = ("--vae", tmp_path / "vae" / "better.safetensors")
    assert difference(draw(tmp_path / "bare", tmp_path / "d.png", *options), other) == 0
    assert difference(again(tmp_path / "d.png", tmp_path / "e.png"), other) == 0


def test_what_a_network_predicts_can_be_said(weights: Path, tmp_path: Path) -> None:
    """--prediction v equals a card that says so."""
    shutil.copytree(weights, tmp_path / "v")
    card = json.loads((tmp_path / "v" / "unet.json").read_text())
    card["config"]["prediction"] = "v"
    (tmp_path / "v" / "unet.json").write_text(json.dumps(card))
    said = draw(weights, tmp_path / "a.png", "--prediction", "v")
    assert difference(said, draw(tmp_path / "v", tmp_path / "b.png")) == 0
    assert difference(said, draw(weights, tmp_path / "c.png")) > 10
    assert (
        difference(draw(tmp_path / "v", tmp_path / "b.png", "--prediction", "epsilon"), pixels_of(tmp_path / "c.png"))
        == 0
    )
    assert difference(again(tmp_path / "a.png", tmp_path / "d.png"), said) == 0


@pytest.mark.parametrize("option", ["--image", "--negative-image", "--image-mask", "--init-image", "--mask"])
@pytest.mark.parametrize("num", [1, 2])
def test_a_picture_that_is_read_is_not_overwritten(
    weights: Path, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, option: str, num: int
) -> None:
    """However its name is written."""
    (tmp_path / "link").symlink_to(tmp_path)
    mine = tmp_path / ("mine.png" if num == 1 else "mine-1.png")
    shutil.copy(image, mine)
    monkeypatch.chdir(tmp_path)
    needs = {"--init-image": [], "--mask": ["--init-image", image]}.get(option, [] if option == "--image" else ["--image", image])
    for out in (tmp_path / "mine.png", Path("mine.png"), tmp_path / "link" / "mine.png"):
        with pytest.raises(ValueError, match=rf"{mine.name} is also read or written for this drawing.*: give --out another name"):
            draw(weights, out, *needs, option, mine, "--num", num)
    assert mine.read_bytes() == image.read_bytes() and names(tmp_path) == sorted(["link", mine.name])


def test_no_file_of_a_drawing_is_written_over_another(weights: Path, tmp_path: Path, image: Path) -> None:
    """Neither weights, nor an embedding that is read, nor the picture that is drawn again, nor one output by the other."""
    folder, kept, out = tmp_path / "weights", tmp_path / "kept.safetensors", tmp_path / "a.png"
    shutil.copytree(weights, folder)
    draw(folder, out, "--image", image, "--save-embedding", kept)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for picture, embedding in ((kept, kept), (image, folder / "unet.safetensors"), (image, folder / "ip_adapter.safetensors")):
        with pytest.raises(ValueError, match=rf"{embedding.name} is also read .*: give --save-embedding another name"):
            draw(folder, tmp_path / "b.png", "--image", picture, "--save-embedding", embedding)
    with pytest.raises(ValueError, match=r"a\.png is also read"):
        again(out, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"link\.safetensors is also read or written"):
        draw(folder, tmp_path / "b.png", "--image", image, "--save-embedding", tmp_path / "link.safetensors")
    draw(folder, out, "--image", image, "--save-embedding", kept)  # what is only written may be there already
