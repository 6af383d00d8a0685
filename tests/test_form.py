"""A form with one field for each setting: it becomes a Request, draws what the library draws, and comes back from a PNG."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import difference, draw, names, pixels_of

from eval.attention_look import cells, look
from model.attention import concatenated, decoupled
from sampling.command_line import arguments, command_line
from sampling.fields import map_paths
from sampling.form import EXAMPLES, Desk, collect_notes
from sampling.images import read_settings, save_image
from sampling.options import parse
from sampling.record import digests, record, sha256
from sampling.request import HintFile, ImagePrompt, LoraFile, Model, Request
from sampling.resize import resize_file
from sampling.sheets.strip import sample, strip


@pytest.fixture
def desk(weights: Path, tmp_path: Path) -> Desk:
    (tmp_path / "edits").mkdir()
    desk = Desk(Model(weights), tmp_path / "edits")
    desk.load("cpu")
    return desk


def form(**changes: Any) -> dict[str, Any]:
    values = {"prompt": "a fox", "negative_prompt": "", "guidance": 3, "steps": 3, "seed": 5, "sampler": "ddim", "num": 1}
    return values | {"image": None, "image_guidance": 0, "scale": 0.6, "layers": "all", "edit": None, "strength": 0.8} | changes


def test_what_was_drawn_comes_back(weights: Path, desk: Desk, image: Path, photo: tuple[Path, Path], tmp_path: Path) -> None:
    """Each picture of a set has its own seed. The layers and the strength of a repainted picture come back."""
    (tmp_path / "out").mkdir()
    files, request = desk.draw(tmp_path / "out", form(image=str(image), num=2, layers="style"), watch)
    assert request.image_prompts[0].layers == "style" and [read_settings(file)["request"]["seed"] for file in files] == [5, 6]
    back = desk.form(str(files[1]))
    assert (back["layers"], back["seed"]) == ("style", 6)
    draw(weights, tmp_path / "a.png", "--init-image", photo[0], "--mask", photo[1])
    assert desk.form(str(tmp_path / "a.png"))["strength"] == 1.0


def test_a_wide_picture_is_cropped_to_a_square(tmp_path: Path) -> None:
    """Of three stripes, the white one in the middle is left."""
    stripes = np.zeros((30, 90, 3), np.uint8)
    stripes[:, 30:60] = 255
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    (tmp_path / "out").mkdir()
    square = resize_file(tmp_path / "wide.png", (8, 8), tmp_path / "out")
    assert square is not None and difference(pixels_of(square), np.full((8, 8, 3), 255)) <= 30


def by_content(request: Request) -> Request:
    """The request with the hash of each file as its name: the form copies pictures."""
    return map_paths(request, lambda path: Path(sha256(path)))


def watch(_: object) -> None:
    pass


def painted(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """A picture with white paint on its right half, as an editor gives it."""
    Image.new("RGB", size, "red").save(folder / "photo.png")
    layer = Image.new("RGBA", size)
    layer.paste("white", (size[0] // 2, 0, *size))
    layer.save(folder / "layer.png")
    return {"background": str(folder / "photo.png"), "layers": [str(folder / "layer.png")], "composite": None}


def test_a_form_draws_what_its_request_draws_and_comes_back(desk: Desk, image: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    given = form(image=str(image), num=2, edit=painted(tmp_path, (90, 60)))
    files, request = desk.draw(tmp_path / "out", given, watch)
    assert names(tmp_path / "out") == ["drawn-5.png", "drawn-6.png"]
    assert difference(pixels_of(files[0]), np.asarray(desk.pipeline.draw(request)).astype(int)) <= 1
    back = desk.form(str(files[0]))
    assert {name: back[name] for name in ("prompt", "seed", "scale", "strength")} == {
        name: given[name] for name in ("prompt", "seed", "scale", "strength")
    }
    assert by_content(desk.request(form(**back))) == by_content(request)


def test_the_picture_may_have_a_guidance_of_its_own(desk: Desk, image: Path, tmp_path: Path) -> None:
    """It comes back from the PNG. At 0, or without a picture, there is none."""
    given = form(image=str(image), guidance=8, image_guidance=4)
    files, request = desk.draw(tmp_path, given, watch)
    assert request == Request("a fox", ImagePrompt(image, 0.6), guidance=8, image_guidance=4, steps=3, seed=5)  # type: ignore[arg-type]
    assert difference(pixels_of(files[0]), np.asarray(desk.pipeline.draw(replace(request, image_guidance=None))).astype(int)) > 1
    assert desk.form(str(files[0]))["image_guidance"] == 4
    (tmp_path / "plain").mkdir()
    plain, request = desk.draw(tmp_path / "plain", given | {"image_guidance": 0}, watch)
    assert request.image_guidance is None and desk.form(str(plain[0]))["image_guidance"] == 0
    assert desk.request(form(image_guidance=4)) == desk.request(form())


def test_a_picture_that_asks_for_more_than_the_form_has_says_so(desk: Desk, image: Path, tmp_path: Path) -> None:
    """The command line draws with eta, a range of steps and a picture elsewhere; the form takes the rest, and a copy of the picture."""
    there = tmp_path / "elsewhere"
    there.mkdir()
    shutil.copy(image, there / "mine.png")
    request = Request("a fox", ImagePrompt(there / "mine.png", 0.7, (0.5,) * 7, end=0.5), eta=0.5, steps=3)  # type: ignore[arg-type]
    save_image(Image.new("RGB", (8, 8)), there / "drawn.png", record(request, desk.model, digests(request, desk.model)))
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        back = desk.form(str(there / "drawn.png"))
    assert [str(one.message) for one in told_of] == [
        "this page has no field for all of its image prompts, eta: draw it again with --again"
    ]
    assert back["scale"] == 0.7 and back["layers"] == "all" and Path(back["image"]).parent == desk.folder
    other = Desk(Model(desk.model.checkpoint, dtype="bfloat16"), desk.folder)
    with pytest.warns(UserWarning, match="other weights than those of this page"):
        other.form(str(there / "drawn.png"))


def test_a_form_with_a_hint_asks_its_control(desk: Desk, image: Path) -> None:
    assert desk.request(form(hint=str(image))).hints == (HintFile(image),)
    notes: list[str] = []
    with collect_notes(notes):
        desk.draw(desk.folder, form(hint=str(image)), watch)
    assert notes == ["1 hints for 0 controls: give one per control"]


def test_a_model_that_is_not_there_is_told_to_all_who_wait(tmp_path: Path) -> None:
    desk = Desk(Model(tmp_path / "none"), tmp_path)
    for wait in (lambda: desk.config, lambda: desk.load("cpu"), lambda: desk.pipeline):
        with pytest.raises((ValueError, OSError), match="none"):
            wait()
    assert not desk.mini and Desk(Model(), tmp_path).mini


def test_a_command_names_files_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request("a fox", ImagePrompt(tmp_path / "a b.png"))  # type: ignore[arg-type]
    assert command_line(request, Model()) == "python -m sampling --prompt 'a fox' --image 'a b.png'"


def test_a_shipped_example_keeps_its_name(desk: Desk, tmp_path: Path) -> None:
    """So that a drawing of it can be drawn again when the copy is gone."""
    shutil.copy(EXAMPLES[3], tmp_path / "upload.png")
    assert desk.request(form(image=str(tmp_path / "upload.png"))).image_prompts[0].images == (EXAMPLES[3],)


def test_what_is_wrong_is_told_in_the_words_of_the_library(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    wrong = [form(image=str(tmp_path / "bad.png")), form(seed=None), form(steps=0), form(prompt=None), form(guidance=1e9)]
    wrong.append(form(image=str(EXAMPLES[0]), image_guidance=1e9))
    for given in wrong:
        notes: list[str] = []
        with collect_notes(notes):
            desk.draw(tmp_path, given, watch)
        assert len(notes) == 1 and str(tmp_path) not in notes[0], notes
    assert names(tmp_path) == ["bad.png", "edits"]


def test_warnings_are_told_once() -> None:
    notes: list[str] = []
    with collect_notes(notes):
        warnings.warn("these words are left out: zebra", stacklevel=1)
        warnings.warn("these words are left out: zebra", stacklevel=1)
    assert notes == ["these words are left out: zebra"]


def test_a_picture_is_resized_and_paint_becomes_a_mask(tmp_path: Path) -> None:
    edit = painted(tmp_path, (90, 60))
    (tmp_path / "out").mkdir()
    kept = [resize_file(edit["background"], (8, 12), tmp_path / "out") for _ in range(3)]
    mask = resize_file(edit["layers"][0], (8, 12), tmp_path / "out", mask=True)
    assert len(set(kept)) == 1 and len(names(tmp_path / "out")) == 2 and mask is not None
    with Image.open(mask) as paint:
        assert paint.size == (12, 8) and paint.getpixel((11, 4)) == (255, 255, 255, 255) and paint.getpixel((0, 4))[3] == 0
    Image.new("RGBA", (9, 9)).save(tmp_path / "nothing.png")
    assert resize_file(tmp_path / "nothing.png", (8, 8), tmp_path / "out", mask=True) is None


FULL = Request(
    "-a 'fox' = red",
    (ImagePrompt((Path("a b.png"), Path("c.png")), 0.4, (1.0, 0.0), mask=Path("m.png"), weights=(1.0, 0.5)),),
    guidance=4,
    seed=-3,
    init_image=Path("p.png"),
    mask=Path("q.png"),
    paste=False,
    crop=True,
    hints=(HintFile(Path("edges.png"), 0.5, guess=True),),
    original_size=(90, 70),
    crop_corner=(0, 3),
)  # fmt: skip
OTHERS = Model(
    Path("x"),
    (Path("y.bin"),),
    dtype="float16",
    controls=(Path("control"),),
    loras=(LoraFile(Path("l"), 0.5), LoraFile(Path("m"))),
    face_lora_scale=0.5,
    face_structure_scale=2.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "model"),
    [(Request(), Model()), (FULL, OTHERS)],
)
def test_the_command_line_is_the_inverse_of_its_parser(request_: Request, model: Model) -> None:
    command = parse(arguments(request_, model))
    assert (command.request, command.model) == (request_, model)
    assert command_line(Request("a fox", target_size=(8, 9)), Model()) == "python -m sampling --prompt 'a fox' --target-size 8 9"


def test_a_strip_draws_each_lambda(desk: Desk, image: Path) -> None:
    """With every setting of the request that the page has."""
    apart = {"guidance": 3, "image_guidance": 6}
    request = Request("a fox", ImagePrompt(image), "an owl", **apart, steps=3, seed=5, sampler="dpm++")  # type: ignore[arg-type]
    for fuse in (decoupled, concatenated):
        rows = [np.asarray(picture).astype(int) for picture in strip(desk.pipeline, request, fuse, lambdas=(0.0, 0.5))]
        for scale, row in zip((0.0, 0.5), rows, strict=True):
            alone = sample(desk.pipeline, request, fuse, None, scale, 1)
            assert difference(row, ((alone[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)) <= 1
            one = desk.pipeline.draw(replace(request, image_prompts=(ImagePrompt(image, scale),)))  # type: ignore[arg-type]
            assert fuse is concatenated or difference(row, np.asarray(one).astype(int)) <= 1
    with pytest.raises(ValueError, match="choose a picture first"):
        strip(desk.pipeline, Request(), decoupled)


@pytest.mark.parametrize("fuse", [decoupled, concatenated])
def test_looking_changes_no_drawing_and_its_maps_add_up(desk: Desk, image: Path, fuse: Any) -> None:
    request = Request("a fox", ImagePrompt(image, 0.5), guidance=3, steps=3)  # type: ignore[arg-type]
    seen = look(desk.pipeline, request, fuse)
    assert len(seen.maps) == 3 and len(seen.maps[0]) == len(desk.pipeline.unet.cross_attentions())
    maps, mass, prompted = seen.of(2, 1, 0)
    assert prompted and maps.shape[0] == 77 + 4
    total = maps.sum(dim=0)
    assert torch.allclose(total, torch.full_like(total, 1.0 if fuse is concatenated else 2.0), atol=0.02)  # half precision
    if fuse is concatenated:
        assert mass is not None and torch.allclose(maps[77:].sum(dim=0), mass, atol=0.02)
    else:
        assert mass is None
    actual, sentence = cells(desk.pipeline.text, seen, 2, 1, 1)
    assert len(actual) >= 6 and ("one softmax" in sentence) == (fuse is concatenated)
    for wrong in ((4, 1, 0), (1, 9, 0), (1, 1, 9)):
        with pytest.raises(ValueError, match="there is no"):
            seen.of(*wrong)
