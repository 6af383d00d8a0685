"""`--again`: a picture is drawn again from what its PNG says, by the same files, wherever they are now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import PARTS, again, difference, draw, names, pixels_of, refuses

from checkpoints.files import write_json
from sampling.images import read_settings, save_image


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
