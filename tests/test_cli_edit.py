"""Image to image and inpainting from the command line, with tiny random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import UNET, again, difference, draw, loud, names, pixels_of, refuses

from checkpoints import cards
from model.unet import UNet
from sampling import loading
from sampling.images import read_settings
from sampling.loading import load
from train.setting import TrainingSource, prepare


def test_samplers_differ(weights: Path, tmp_path: Path) -> None:
    ddim, dpm = (draw(weights, tmp_path / "a.png", "--sampler", name, "--steps", 5) for name in ("ddim", "dpm++"))
    assert difference(ddim, dpm) > 1
    assert difference(ddim, draw(weights, tmp_path / "b.png", "--steps", 5)) == 0


def test_strength_controls_the_change(weights: Path, tmp_path: Path, photo: tuple[Path, Path]) -> None:
    """With a lower strength, the result is nearer to the picture's reconstruction by the VAE."""
    options, out = ("--steps", 10, "--init-image", photo[0]), tmp_path / "a.png"
    little, much, most = (draw(weights, out, *options, "--strength", strength) for strength in (0.1, 0.8, 1))
    assert little.shape == (16, 24, 3)
    assert difference(draw(weights, out, *options), much) == 0
    assert np.abs(little - most).mean() > np.abs(much - most).mean() > 1


def test_black_is_left_alone(weights: Path, tmp_path: Path, photo: tuple[Path, Path]) -> None:
    options, old = ("--init-image", photo[0], "--mask", photo[1]), pixels_of(photo[0])
    drawn = draw(weights, tmp_path / "a.png", *options)
    assert difference(drawn[:, :12], old[:, :12]) == 0 and difference(drawn[:, 12:], old[:, 12:]) > 10
    assert difference(drawn, draw(weights, tmp_path / "b.png", *options, "--strength", 1)) == 0
    raw = draw(weights, tmp_path / "c.png", *options, "--no-paste")
    assert difference(drawn[:, 12:], raw[:, 12:]) == 0 and difference(raw[:, :12], old[:, :12]) > 1


@pytest.mark.parametrize("num", [1, 3])
def test_again_changes_the_same_picture(weights: Path, tmp_path: Path, photo: tuple[Path, Path], num: int) -> None:
    options = ("--init-image", photo[0], "--mask", photo[1], "--strength", 0.7, "--sampler", "dpm++", "--no-paste")
    draw(weights, tmp_path / "a.png", *options, "--steps", 5, "--num", num, "--seed", 3)
    path = tmp_path / ("a.png" if num == 1 else "a-1.png")
    assert {*map(str, photo)} < set(read_settings(path)["sha256"])
    assert difference(pixels_of(path), again(path, tmp_path / "b.png")) <= num - 1
    for changed in photo:
        whole = changed.read_bytes()
        Image.new("RGB", (24, 16)).save(changed)
        refuses(path, rf"{changed.name}: the file has changed")
        changed.write_bytes(whole)
    photo[1].unlink()
    refuses(path, r"mask\.png, which is not there")


@pytest.fixture(scope="session")
def nine(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights with the UNet of an inpainting model."""
    folder = tmp_path_factory.mktemp("nine") / "weights"
    shutil.copytree(weights, folder)
    torch.manual_seed(1)
    unet = loud(UNet(replace(UNET, in_channels=9)))
    cards.save(unet, folder / "unet.safetensors", {"command": "a test"})
    return folder


def test_adapters_cannot_be_trained_on_an_inpainting_model(nine: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is an inpainting model: train on the text-to-image model"):
        prepare(TrainingSource(base=nine), tmp_path)


def test_files_that_are_not_adapters_are_rejected_before_the_base_is_loaded(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("the base was read"))
    with pytest.raises(FileNotFoundError, match=r"none\.bin is not there"):
        load(weights, tmp_path / "none.bin")
    with pytest.raises(ValueError, match="is not an adapter; only the base IP-Adapter"):
        load(weights, weights / "vae.safetensors")


def test_an_inpainting_model(nine: Path, tmp_path: Path, photo: tuple[Path, Path], image: Path) -> None:
    options = ("--init-image", photo[0], "--mask", photo[1], "--no-paste")
    drawn = draw(nine, tmp_path / "a.png", *options, "--image", image)
    assert difference(drawn, draw(nine, tmp_path / "b.png", *options)) > 1  # the image prompt shows
    before = names(tmp_path)
    for few in ((), ("--init-image", photo[0])):
        with pytest.raises(ValueError, match=r"for inpainting: it needs both .*--init-image, --mask"):
            draw(nine, tmp_path / "c.png", *few)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mask MASK", "--mask is for a picture to change: name it with --init-image"),
        ("--strength 0.5", "--strength is for a picture to change: name it with --init-image"),
        ("--init-image PHOTO --no-paste", "--no-paste is for a picture with a --mask"),
        ("--init-image PHOTO --strength 0", "strength must be above 0 and at most 1, not 0"),
        ("--init-image PHOTO --mask MASK --strength 1.5", "strength must be above 0 and at most 1, not 1.5"),
        ("--init-image PHOTO --mask WIDE", "the mask is 48 x 16 and the picture 24 x 16"),
        ("--init-image none.png", r"none\.png: there is no such file"),
        ("--init-image PHOTO --mask none.png", r"none\.png: there is no such file"),
        ("--sampler dpm++ --eta 1", "eta works only with DDIM"),
        ("--init-image ODD", "multiples of 4, not 26 x 18"),
        ("--init-image PHOTO --width 32", "the size is 32 x 16, but the picture to change is 24 x 16"),
        ("--init-image PHOTO --strength 0.2", "strength 0.2 of 3 steps is less than one step"),
    ],
)
def test_invalid_edits_are_rejected(
    weights: Path, tmp_path: Path, photo: tuple[Path, Path], image: Path, options: str, message: str
) -> None:
    Image.new("RGB", (26, 18)).save(photo[0].parent / "odd.png")
    named = {"PHOTO": photo[0], "MASK": photo[1], "WIDE": image, "ODD": photo[0].parent / "odd.png"}
    with pytest.raises(ValueError, match=message):
        draw(weights, tmp_path / "a.png", *[named.get(part, part) for part in options.split()])
    assert names(tmp_path) == ["photo"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L with a clear level", "P"])
def test_transparent_parts_of_a_mask_are_not_repainted(
    weights: Path, tmp_path: Path, photo: tuple[Path, Path], image: Path, mode: str
) -> None:
    """White strokes on a transparent mask equal white strokes on a black one, for --mask and --image-mask."""
    strokes = Image.open(photo[1])  # black on the left, white on the right
    white = Image.new("L", strokes.size, 255)
    clear = photo[0].parent / "clear.png"
    if mode == "L with a clear level":
        strokes.point(lambda level: level or 9).save(clear, transparency=9)
    elif mode == "P":
        indexed = Image.frombytes("P", strokes.size, strokes.point(lambda level: int(level == 0)).tobytes())
        indexed.putpalette([255] * 6)
        indexed.save(clear, transparency=1)
    else:
        Image.merge("LA", (white, strokes)).convert(mode).save(clear)
    for options in (("--init-image", photo[0], "--mask"), ("--image", image, "--width", 24, "--image-mask")):
        want, got = (draw(weights, tmp_path / "a.png", *options, mask) for mask in (photo[1], clear))
        assert difference(want, got) == 0
    drawn = draw(weights, tmp_path / "a.png", "--init-image", photo[0], "--mask", clear)
    assert difference(drawn[:, :12], pixels_of(photo[0])[:, :12]) == 0


def test_a_picture_of_an_odd_size_is_cropped_when_asked(
    weights: Path, tmp_path: Path, photo: tuple[Path, Path]
) -> None:
    """The error message suggests --crop. It crops the picture and the mask to the same centre."""
    pixels = np.random.default_rng(1).integers(0, 256, (19, 27, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd.png")
    mask = np.zeros((19, 27), np.uint8)
    mask[:, :15] = 255
    Image.fromarray(mask).save(tmp_path / "odd_mask.png")
    options = ("--init-image", tmp_path / "odd.png", "--mask", tmp_path / "odd_mask.png")
    with pytest.raises(ValueError, match="multiples of 4, not 27 x 19: add --crop to crop the picture to its centre, 24 x 16"):
        draw(weights, tmp_path / "a.png", *options)
    drawn = draw(weights, tmp_path / "a.png", *options, "--crop")
    assert drawn.shape == (16, 24, 3) and difference(drawn[:, 14:], pixels[1:17, 15:25].astype(int)) == 0
    assert difference(again(tmp_path / "a.png", tmp_path / "b.png"), drawn) == 0
    small = draw(weights, tmp_path / "c.png", *options, "--crop", "--width", 12, "--height", 8)
    assert difference(small[:, 8:], pixels[5:13, 15:19].astype(int)) == 0
    with pytest.raises(ValueError, match="a picture of 27 x 19 can't be cropped to 28 x 16"):
        draw(weights, tmp_path / "d.png", *options, "--crop", "--width", 28)
    with pytest.raises(ValueError, match="--crop is for a picture to change"):
        draw(weights, tmp_path / "d.png", "--crop")
