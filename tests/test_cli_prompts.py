"""The command line: where, when and how an image prompt acts, on a folder of tiny random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import IMAGE, UNET, again, difference, draw, names, refuses

from checkpoints.diffusers_folder import save_unet
from model.unet import UNet
from sampling import command
from sampling.command_line import arguments
from sampling.images import read_settings
from sampling.lambdas import Lambda
from sampling.options import parse
from sampling.request import ImagePrompt, Model, Request


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
    Image.new("L", (16, 16), 255).save(left)
    assert difference(draw(weights, out, *one, "--image-mask", left), plain) == 0


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
        ("--image IMAGE --image-end 0", "0 <= start < end <= 1, not 0.0 and 0.0"),
        ("--image IMAGE --image-end 0.1 --steps 4", "between --image-start 0 and --image-end 0.1 there is no whole step of 4: widen"),
        ("--image IMAGE --image-start 0.9 --steps 4", "--image-start 0.9 and --image-end 1 there is no whole step of 4"),
        ("--image IMAGE --image-start 0.4 --image-end 0.6 --steps 3", "there is no whole step of 3"),
        ("--image IMAGE --image-end 0.4 --init-image IMAGE --strength 0.5 --steps 4", "there is no whole step of 2"),
        ("--image IMAGE --image-rule tokens", "--image-rule says what the weights of pictures multiply"),
        ("--image IMAGE --guidance 1 --negative-image IMAGE", "--negative-image is for the unconditional pass"),
        ("--image IMAGE --guidance 1 --image-guidance 1 --negative-prompt x", "--negative-prompt is for the unconditional pass"),
        ("--fit pad", "--fit is for an image prompt: name it with --image"),
        ("--image IMAGE --save-embedding owl.emb", r"owl\.emb: embeddings are written as safetensors.*: use the name owl\.safetensors"),
        ("--image IMAGE --save-embedding owl.png", r"use the name owl\.safetensors"),
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


@pytest.mark.parametrize("level", [0, 1, 20])
def test_a_mask_that_is_dark_everywhere_is_refused(
    weights: Path, tmp_path: Path, image: Path, photo: tuple[Path, Path], level: int
) -> None:
    """Such as a segmentation with the values 0 and 1, or a black picture."""
    where = np.asarray(Image.open(photo[1])) // 255 * level
    Image.fromarray(where.astype(np.uint8)).save(photo[1])
    with pytest.raises(ValueError, match=r"mask\.png is dark everywhere: it needs white \(255\) where the image prompt acts"):
        draw(weights, tmp_path / "a.png", "--image", image, "--image-mask", photo[1])
    with pytest.raises(ValueError, match=r"the mask repaints nothing, because it is below 128 everywhere: it needs white \(255\) where"):
        draw(weights, tmp_path / "a.png", "--init-image", photo[0], "--mask", photo[1])
    assert names(tmp_path) == ["photo"]


def test_a_mask_needs_white_where_the_picture_is_drawn(weights: Path, tmp_path: Path, photo: tuple[Path, Path]) -> None:
    """White only beside what --crop keeps; and grey that is below the level at which latents are repainted."""
    edge = np.zeros((16, 24), np.uint8)
    edge[:, :4] = 255
    for pixels, options in ((edge, ("--crop", "--width", 16)), (np.full((16, 24), 127, np.uint8), ())):
        Image.fromarray(pixels).save(photo[1])
        with pytest.raises(ValueError, match="the mask repaints nothing"):
            draw(weights, tmp_path / "a.png", "--init-image", photo[0], "--mask", photo[1], *options)
    Image.new("L", (24, 16), 128).save(photo[1])
    draw(weights, tmp_path / "a.png", "--init-image", photo[0], "--mask", photo[1])


def test_a_negative_counts_where_the_guidance_of_the_picture_is_not_1(
    weights: Path, tmp_path: Path, image: Path, second: Path
) -> None:
    options = ("--image", image, "--guidance", 1, "--image-guidance", 3)
    plain = draw(weights, tmp_path / "a.png", *options)
    for negative in (("--negative-prompt", "a purple owl"), ("--negative-image", second)):
        assert difference(draw(weights, tmp_path / "b.png", *options, *negative), plain) > 1


def test_a_command_leaves_out_what_nothing_reads(image: Path) -> None:
    """A request may have negatives at guidance 1, in Python and in older pictures."""
    request = Request("a fox", ImagePrompt(image, negatives=image), "an owl", 1.0)  # type: ignore[arg-type]
    for other in (request, replace(request, image_guidance=1.0)):
        want = replace(other, negative_prompt="", image_prompts=(ImagePrompt(image),))  # type: ignore[arg-type]
        assert parse(arguments(other, Model())).request == want
    other = replace(request, image_guidance=2.0)
    assert parse(arguments(other, Model())).request == other


@pytest.mark.parametrize("layout", ["own", "diffusers"])
def test_layers_that_do_not_fit_are_refused_before_the_weights_are_read(
    weights: Path, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the weights were read"))
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    if layout == "diffusers":
        save_unet(UNet(UNET), folder / "unet")
    for layers, message in (
        ("[1]", "cross-attention layers"),
        ('{"down": {"block_7": 1}}', "no cross-attention in down block_7"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(folder, tmp_path / "a.png", "--image", image, "--image-layers", layers)


def test_negative_images_and_weights(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    """Each shows; what is neutral does not: weight 1 in a prompt of one picture."""
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


def test_weights_and_a_range_of_steps(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    weigh = ("--image", image, "--image", second, "--image-weight", 0.3, "--image-weight", 1.5, "--steps", 4)
    assert difference(*(draw(weights, tmp_path / "a.png", *weigh, "--image-end", end) for end in (0.5, 1))) > 1


def test_a_saved_embedding_is_its_picture(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    """Read back, alone and beside a picture, without the image encoder too; --again checks it."""
    kept, out = tmp_path / "kept.safetensors", tmp_path / "a.png"
    options = ("--steps", 2, "--prompt", "a fox", "--negative-image", second)
    first = draw(weights, out, *options, "--image", image, "--save-embedding", kept)
    assert "kept" not in json.dumps(read_settings(out))
    assert difference(draw(weights, out, *options, "--image", kept), first) == 0
    two = [draw(weights, out, *options, "--image", one, "--image", second) for one in (image, kept)]
    assert difference(*two) <= 1
    assert difference(again(out, tmp_path / "b.png"), two[1]) == 0
    bare = tmp_path / "bare"
    shutil.copytree(weights, bare)
    (bare / "image_encoder.safetensors").unlink()
    alone = [draw(folder, out, "--steps", 2, "--image", kept) for folder in (weights, bare)]
    assert difference(*alone) == 0
    save_file({"embedding": load_file(kept)["embedding"][:, :, 0]}, tmp_path / "older.safetensors")  # `1 k e`
    assert difference(draw(weights, out, "--steps", 2, "--image", tmp_path / "older.safetensors"), alone[0]) == 0
    draw(weights, out, "--steps", 2, "--image", kept)
    save_file({"embedding": torch.zeros(1, 1, IMAGE.output_dim)}, kept)
    refuses(out, r"kept\.safetensors: the file has changed")


def test_the_pictures_of_an_embedding_are_weighed_one_by_one(weights: Path, tmp_path: Path, image: Path, second: Path) -> None:
    """As if they were named again, beside another picture too."""
    kept, out, both = tmp_path / "kept.safetensors", tmp_path / "a.png", ("--image", image, "--image", second)
    draw(weights, out, *both, "--save-embedding", kept)
    for rule in ("output", "embedding", "tokens"):
        weigh: tuple[object, ...] = ("--image-weight", 0.3, "--image-weight", 1.5, "--image-rule", rule)
        want, got = (draw(weights, out, *given, *weigh) for given in (both, ("--image", kept)))
        assert difference(want, got) <= 1
        assert difference(again(out, tmp_path / "b.png"), got) == 0
        weigh += ("--image-weight", 0.7)
        want, got = (draw(weights, out, *given, "--image", image, *weigh) for given in (both, ("--image", kept)))
        assert difference(want, got) <= 1
    with pytest.raises(ValueError, match="1 --image-weight for 2 pictures: give each its own, also those in an embedding"):
        draw(weights, out, "--image", kept, "--image-weight", 0.5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embedding": torch.zeros(1, 1, 13)}, r"has shape \(1, 1, 13\), but this adapter reads image embeddings, a vector of width 12"),
        ({"embedding": torch.full((1, 2, 12), torch.nan)}, "not all of its numbers are finite"),
        ({"other": torch.zeros(1, 1, 12)}, "holds no image embedding"),
        ({"embedding": torch.zeros(1, 0, 12)}, "holds no image embedding"),
        ({"embedding": torch.zeros(2, 1, 12)}, "holds no image embedding"),
        ({}, "not a safetensors file"),
    ],
)
def test_a_bad_embedding_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor], message: str
) -> None:
    """From its adapter's header, so before the base model is read."""
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the weights were read"))
    path = tmp_path / "bad.safetensors"
    if tensors:
        save_file(tensors, path)
    else:
        path.write_bytes(b"no")
    with pytest.raises(ValueError, match=message):
        draw(weights, tmp_path / "a.png", "--image", path)
    assert names(tmp_path) == ["bad.safetensors"]
