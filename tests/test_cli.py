"""The command line, end to end, on a folder of tiny random weights."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import sampling.pipeline
from checkpoints import cards
from checkpoints.adapters import save_adapter
from checkpoints.files import write_json
from checkpoints.stable_diffusion import save_diffusers
from model.adapter import IPAdapter
from model.image_encoder import ImageConfig, ImageEncoder
from model.image_projection import ImageProjection
from model.text_encoder import TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from sampling import __main__ as cli
from sampling.images import read_settings, save_image
from sampling.lambdas import Lambda
from sampling.pipeline import load
from train.clip import MINI_TEXT
from train.setting import Source, prepare

UNET = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=8, groups=4, sample_size=4)
VAE_CONFIG = VAEConfig(channels=(8, 8, 8), res_blocks=1, groups=4, scale=1.0)
TEXT = replace(MINI_TEXT, width=8, layers=1, heads=2, output_dim=8)
IMAGE = ImageConfig(image_size=16, patch=8, width=8, layers=(1,), heads=2, output_dim=12)
PARTS = ("unet", "vae", "text_encoder", "image_encoder", "ip_adapter")


def loud(module: nn.Module) -> nn.Module:
    """Weights large enough for a prompt to show in 8-bit pixels."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.mul_(2.0)
    return module


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny weights. Shared: a test that changes it makes its own copy."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    unet = UNet(UNET)
    adapter = IPAdapter(unet, ImageProjection(IMAGE.output_dim, UNET.context_dim, 4))
    modules = (unet, VAE(VAE_CONFIG), TextEncoder(TEXT), ImageEncoder(IMAGE))
    for part, module in zip(PARTS, modules, strict=False):
        cards.save(loud(module), folder / f"{part}.safetensors", {"command": "a test"})
    loud(adapter)
    save_adapter(adapter, unet, folder / "ip_adapter.safetensors", {"command": "a test"})
    return folder


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is not square: red on the left, then a gradient."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :12, 0] = 255
    pixels[:, 12:] = np.linspace(0, 255, 36)[None, :, None]
    path = tmp_path_factory.mktemp("images") / "wide.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "blue.png"
    Image.new("RGB", (20, 20), "blue").save(path)
    return path


def draw(weights: Path, out: Path, *options: object) -> np.ndarray:
    """The pixels that the command draws."""
    steps = [] if "--steps" in options else ["--steps", "3"]
    cli.run(["--checkpoint", str(weights), "--out", str(out), *steps, *map(str, options)])
    return pixels_of(out) if out.exists() else np.empty(0)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    assert read_settings(tmp_path / "two.png")["arguments"]["image"] == [str(image), str(second)]


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
    monkeypatch.setattr(cli, "BATCH", 2)
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
    one = [
        draw(weights, tmp_path / "d.png", "--guidance", 1, "--negative-prompt", text) for text in ("", "a purple owl")
    ]
    assert difference(*one) == 0  # at w = 1 the unconditional pass has no weight


def test_fits_differ_for_a_picture_that_is_not_square(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    wide = [draw(weights, tmp_path / "a.png", "--image", image, "--fit", fit) for fit in ("crop", "squash", "pad")]
    assert all(difference(a, b) > 1 for i, a in enumerate(wide) for b in wide[:i])
    square = [draw(weights, tmp_path / "a.png", "--image", second, "--fit", fit) for fit in ("crop", "squash", "pad")]
    assert all(difference(square[0], other) <= 1 for other in square[1:])


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


# --again


def again(path: Path, out: Path) -> np.ndarray:
    cli.run(["--again", str(path), "--out", str(out)])
    return pixels_of(out)


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


def refuses(picture: Path, message: str) -> None:
    before = names(picture.parent)
    with pytest.raises(ValueError, match=message):
        again(picture, picture.parent / "b.png")
    assert names(picture.parent) == before


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


DEMO, OLD = {"command": "python -m sampling.demo --seed 0"}, {"arguments": {"prompt": "a fox"}, "sha256": {}}


@pytest.mark.parametrize("settings", [None, DEMO, OLD], ids=["none", "demo", "old"])
def test_again_refuses_what_it_did_not_draw(tmp_path: Path, settings: dict[str, object] | None) -> None:
    path, image = tmp_path / "foreign.png", Image.new("RGB", (8, 8))
    if settings is None:
        image.save(path)
    else:
        save_image(image, path, settings)
    refuses(path, r"foreign\.png")


# what goes wrong


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
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("the weights were read"))
    if content:
        (tmp_path / "bad.png").write_bytes(content)
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"bad\.png"):
        draw(tmp_path / "none", tmp_path / "a.png", "--image", tmp_path / "bad.png")
    assert names(tmp_path) == before


def test_adapter_of_another_encoder_is_refused(weights: Path, tmp_path: Path, image: Path) -> None:
    cards.save(ImageEncoder(replace(IMAGE, output_dim=20)), tmp_path / "image_encoder.safetensors", {})
    with pytest.raises(ValueError, match=r"wants 12-d, you gave 20-d: pass that encoder"):
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
    "folder": ["--out", ".."],
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


def test_help_names_every_option() -> None:
    found = cli.parser().format_help()
    for option in (
        "--image",
        "--prompt",
        "--scale",
        "--guidance",
        "--steps",
        "--eta",
        "--seed",
        "--num",
        "--again",
        "--checkpoint",
    ):
        assert option in found


def test_compile_freezes_the_unet(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler is replaced here by a double: what it makes of the UNet is in tests/test_guidance.py."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda unet, options: seen.append((type(unet), options)) or unet)
    draw(weights, tmp_path / "a.png", "--compile")
    assert seen == [(UNet, {"freezing": True})]


# a picture to change


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, Path]:
    """A picture of 24 x 16 pixels, and its mask: black on the left, white on the right."""
    folder = tmp_path / "photo"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.zeros((16, 24), np.uint8)
    mask[:, 12:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "photo.png", folder / "mask.png"


def test_samplers_differ(weights: Path, tmp_path: Path) -> None:
    ddim, dpm = (draw(weights, tmp_path / "a.png", "--sampler", name, "--steps", 5) for name in ("ddim", "dpm++"))
    assert difference(ddim, dpm) > 1
    assert difference(ddim, draw(weights, tmp_path / "b.png", "--steps", 5)) == 0


def test_strength_is_how_much_changes(weights: Path, tmp_path: Path, photo: tuple[Path, Path]) -> None:
    """The less, the nearer to the picture through the autoencoder."""
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


def test_an_adapter_is_not_trained_on_a_network_that_inpaints(nine: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a model for inpainting: train on the ordinary one"):
        prepare(Source(base=nine), tmp_path)


def test_what_is_no_adapter_is_told_before_the_base_is_read(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling.pipeline, "load_base", lambda *_: pytest.fail("the base was read"))
    with pytest.raises(FileNotFoundError, match=r"none\.bin is not there"):
        load(weights, tmp_path / "none.bin")
    with pytest.raises(ValueError, match="is not an adapter; only the base IP-Adapter"):
        load(weights, weights / "vae.safetensors")


def test_a_network_that_inpaints(nine: Path, tmp_path: Path, photo: tuple[Path, Path], image: Path) -> None:
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
        ("--sampler dpm++ --eta 1", "eta is DDIM's"),
        ("--init-image ODD", "multiples of 4, not 26 x 18"),
        ("--init-image PHOTO --width 32", "32 x 16 is asked for, but the picture to change is 24 x 16"),
        ("--init-image PHOTO --strength 0.2", "strength 0.2 of 3 steps is less than one step"),
    ],
)
def test_changes_that_do_not_fit_are_refused(
    weights: Path, tmp_path: Path, photo: tuple[Path, Path], image: Path, options: str, message: str
) -> None:
    Image.new("RGB", (26, 18)).save(photo[0].parent / "odd.png")
    named = {"PHOTO": photo[0], "MASK": photo[1], "WIDE": image, "ODD": photo[0].parent / "odd.png"}
    with pytest.raises(ValueError, match=message):
        draw(weights, tmp_path / "a.png", *[named.get(part, part) for part in options.split()])
    assert names(tmp_path) == ["photo"]


# how an image prompt acts


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A mask: white on the left, black on the right."""
    path = tmp_path / "masks" / "left.png"
    path.parent.mkdir()
    Image.fromarray(np.repeat([[255, 0]], 2, axis=0).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return path


def test_where_and_when_an_image_prompt_acts(weights: Path, tmp_path: Path, image: Path, left: Path) -> None:
    """Each option changes the picture; all of nothing is no picture, and all of everything the plain one."""
    out, one = tmp_path / "a.png", ("--image", image, "--steps", 4)
    plain, none = draw(weights, out, *one), draw(weights, out, "--steps", 4)
    options: list[tuple[object, ...]] = [
        ("--image-layers", "style"),
        ("--image-layers", "layout"),
        ("--image-end", 0.5),
        ("--image-start", 0.5),
        ("--image-mask", left),
        ("--image-guidance", 2),
    ]
    drawn = [plain, none, *(draw(weights, out, *one, *option) for option in options)]
    assert all(difference(a, b) > 1 for i, a in enumerate(drawn) for b in drawn[:i])
    layers = len(UNet(UNET).cross_attentions())
    for all_alike in (("--image-layers", json.dumps([1] * layers)), ("--image-end", 1), ("--image-guidance", 7.5)):
        assert difference(draw(weights, out, *one, *all_alike), plain) == 0
    assert difference(draw(weights, out, *one, "--image-layers", '{"up": 0}'), none) == 0
    Image.new("L", (16, 16)).save(left)
    assert difference(draw(weights, out, *one, "--image-mask", left), none) == 0


def test_the_range_is_of_the_steps_that_run(
    weights: Path, tmp_path: Path, image: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a picture to change too: strength 0.5 of 4 steps runs 2."""
    asked, at = [], Lambda.at

    def record(lam: Lambda, step: int, steps: int) -> float:
        asked.append((step, steps))
        return at(lam, step, steps)

    monkeypatch.setattr(Lambda, "at", record)
    options = ("--steps", 4, "--sampler", "dpm++", "--init-image", second, "--strength", 0.5, "--image", image)
    draw(weights, tmp_path / "a.png", *options, "--image-end", 0.5)
    assert asked == [(0, 2), (1, 2)]


def test_again_knows_where_and_when(weights: Path, tmp_path: Path, image: Path, left: Path) -> None:
    blocks = '{"up": {"block_1": [1, 0.5]}, "down": 1}'
    how = (
        "--image-layers",
        blocks,
        "--image-start",
        0.25,
        "--image-end",
        0.75,
        "--image-mask",
        left,
        "--image-guidance",
        3,
    )
    first = draw(weights, tmp_path / "a.png", "--image", image, "--prompt", "a fox", "--steps", 4, *how)
    assert difference(first, again(tmp_path / "a.png", tmp_path / "b.png")) == 0
    assert read_settings(tmp_path / "a.png") == read_settings(tmp_path / "b.png")
    Image.new("L", (16, 16)).save(left)
    refuses(tmp_path / "a.png", r"left\.png: the file has changed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image-mask LEFT", "--image-mask is for an image prompt: name it with --image"),
        ("--image-guidance 2", "--image-guidance is for an image prompt: name it with --image"),
        ("--image IMAGE --image-end 0", "0 <= start < end <= 1, not 0.0 to 0.0"),
        ("--image IMAGE --image-end 0.5 --image-end 0.6", "--image-end is given twice"),
        ("--image IMAGE --image-layers styles", "style, layout, finest, or weights"),
        ("--image IMAGE --image-layers [1]", "cross-attention layers"),
        ("--image IMAGE --image-mask none.png", r"none\.png: there is no such file"),
        ("--image IMAGE --negative-image none.png", r"none\.png: there is no such file"),
        ("--negative-image IMAGE", "--negative-image is for an image prompt: name it with --image"),
        ("--image IMAGE --image-weight 1 --image-weight 2", "2 --image-weight for 1 --image"),
        (
            "--image IMAGE --image IMAGE --image IMAGE --negative-image IMAGE --negative-image IMAGE",
            "2 negative images for 3",
        ),
        ("--save-embedding a.safetensors", "--save-embedding writes one adapter's image prompt"),
    ],
)
def test_image_prompts_that_do_not_fit_are_refused(
    weights: Path, tmp_path: Path, image: Path, left: Path, options: str, message: str
) -> None:
    named = {"IMAGE": image, "LEFT": left}
    with pytest.raises(ValueError, match=message):
        draw(weights, tmp_path / "a.png", *[named.get(part, part) for part in options.split()])
    assert names(tmp_path) == ["masks"]


@pytest.mark.parametrize("layout", ["own", "diffusers"])
def test_layers_that_do_not_fit_are_refused_before_the_weights_are_read(
    weights: Path, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("the weights were read"))
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    if layout == "diffusers":
        save_diffusers(UNet(UNET), folder / "unet")
    for layers, message in (
        ("[1]", "cross-attention layers"),
        ('{"down": {"block_7": 1}}', "no cross-attention in down block_7"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(folder, tmp_path / "a.png", "--image", image, "--image-layers", layers)


def test_negative_images_and_weights(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    """Each shows; what is neutral does not: weight 1 in a prompt of one picture, a negative that guidance 1 leaves out."""
    out, one = tmp_path / "a.png", ("--steps", 2, "--image", image)
    plain, both = draw(weights, out, *one), (*one, "--image", second)
    against = draw(weights, out, *one, "--negative-image", second)
    weighed = [
        draw(weights, out, *both, "--image-weight", 0.3, "--image-weight", 1.5, "--image-rule", rule)
        for rule in ("output", "embedding", "tokens")
    ]
    drawn = [plain, against, *weighed]
    assert all(difference(a, b) > 1 for i, a in enumerate(drawn) for b in drawn[:i])
    assert difference(draw(weights, out, *one, "--image-weight", 1), plain) == 0
    single = [draw(weights, out, *one, "--guidance", 1, *no) for no in ((), ("--negative-image", second))]
    assert difference(*single) == 0


def test_a_saved_embedding_is_its_picture(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    """Read back, alone and beside a picture, without the image encoder too; --again checks it."""
    kept, out = tmp_path / "kept.safetensors", tmp_path / "a.png"
    options = ("--steps", 2, "--prompt", "a fox", "--negative-image", second)
    first = draw(weights, out, *options, "--image", image, "--save-embedding", kept)
    assert "save_embedding" not in read_settings(out)["arguments"]
    assert difference(draw(weights, out, *options, "--image", kept), first) == 0
    two = [draw(weights, out, *options, "--image", one, "--image", second) for one in (image, kept)]
    assert difference(*two) <= 1
    assert difference(again(out, tmp_path / "b.png"), two[1]) == 0
    bare = tmp_path / "bare"
    shutil.copytree(weights, bare)
    (bare / "image_encoder.safetensors").unlink()
    alone = [draw(folder, out, "--steps", 2, "--image", kept) for folder in (weights, bare)]
    assert difference(*alone) == 0
    save_file({"embedding": torch.zeros(1, 1, IMAGE.output_dim)}, kept)
    refuses(out, r"kept\.safetensors: the file has changed")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embedding": torch.zeros(1, 1, 13)}, r"is \(1, 1, 13\), but this adapter reads `1 k 12`"),
        ({"embedding": torch.full((1, 2, 12), torch.nan)}, "not all of its numbers are finite"),
        ({"other": torch.zeros(1, 1, 12)}, "holds no image embedding"),
        ({"embedding": torch.zeros(1, 0, 12)}, "holds no image embedding"),
        ({}, "not a safetensors file"),
    ],
)
def test_a_bad_embedding_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor], message: str
) -> None:
    """From its adapter's header, so before the base model is read."""
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("the weights were read"))
    path = tmp_path / "bad.safetensors"
    if tensors:
        save_file(tensors, path)
    else:
        path.write_bytes(b"no")
    with pytest.raises(ValueError, match=message):
        draw(weights, tmp_path / "a.png", "--image", path)
    assert names(tmp_path) == ["bad.safetensors"]
