"""The sheet of attention maps: its layout and its command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import build
from tiny import pixels_of

from eval import __main__ as cli
from eval.attention_sheet import COLUMNS, DPI, INCHES, Section, compose
from sampling.images import read_settings


def attention(*options: object) -> None:
    """The command, as the shell gives it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["eval", "attention", *map(str, options)])
        cli.main()


def test_every_cell_of_a_sheet_appears_in_its_row() -> None:
    """Each picture has its own colour. All appear at the same size, from left to right, then in the next row."""
    colours = [(20 * i, 255 - 20 * i, 90) for i in range(COLUMNS + 2)]
    cells = [(Image.new("RGB", (30, 30), colour), f"picture {i}") for i, colour in enumerate(colours)]
    pixels = np.asarray(compose([Section("first", "a note", cells), Section("second", "", cells[:1])])).astype(int)
    assert pixels.shape[1] == round(COLUMNS * INCHES * DPI)
    places = [np.argwhere((pixels == colour).all(axis=-1)) for colour in colours]
    sides = [np.sqrt(len(place) / (2 if i == 0 else 1)) for i, place in enumerate(places)]  # the first is shown twice
    assert np.ptp(sides) < 3 and min(sides) > 0.85 * INCHES * DPI
    rows, columns = ([place[:, axis].min() for place in places[1:]] for axis in (0, 1))
    assert columns[: COLUMNS - 1] == sorted(columns[: COLUMNS - 1]) and columns[COLUMNS] == columns[0]
    assert np.ptp(rows[: COLUMNS - 1]) <= 1 and rows[COLUMNS - 1] > rows[0] + min(sides)


def rows_of(path: Path) -> int:
    with Image.open(path) as drawn:
        return round(drawn.height / DPI / (INCHES + 1.2))


def test_the_command_draws_a_sheet(weights: Path, image: Path, tmp_path: Path) -> None:
    """The sheet has three sections: drawing, words, image tokens. The same command gives the same sheet."""
    out = [tmp_path / f"{name}.png" for name in ("both", "again", "text", "image", "folder/other")]
    given = ("--checkpoint", weights, "--steps", 2)
    for path in out[:2]:
        attention(*given, "--image", image, "--prompt", "a fox", "--out", path)
    attention(*given, "--prompt", "a fox", "--out", out[2])
    attention(*given, "--image", image, "--out", out[3])
    attention(*given, "--image", image, "--prompt", "a fox", "--scale", 0.3, "--seed", 3, "--out", out[4])
    assert [rows_of(path) for path in out] == [3, 3, 2, 2, 3]
    pixels = [pixels_of(path) for path in out]
    assert np.array_equal(pixels[0], pixels[1]) and not np.array_equal(pixels[0], pixels[4])
    assert read_settings(out[0])["arguments"]["prompt"] == "a fox"


def test_the_command_reads_official_files(image: Path, tmp_path: Path) -> None:
    """The base is a diffusers folder with its own picture size, the adapter a .bin, the encoder in transformers' layout."""
    model = build(tmp_path, "sd15")
    files = ("--checkpoint", model.base, "--ip-adapter", model.adapters[0], "--image-encoder", model.encoder)
    attention(*files, "--image", image, "--prompt", "a fox", "--steps", 1, "--out", tmp_path / "out.png")
    assert rows_of(tmp_path / "out.png") == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "there is no prompt: give --prompt, --image, or both"),
        (("--image", "missing.png"), "missing.png: there is no such file"),
        (("--prompt", "a fox", "--steps", 0), "steps must be between 1 and 1000"),
        (("--prompt", "a fox", "--checkpoint", "missing"), "missing"),
    ],
)
def test_bad_input_is_one_sentence(weights: Path, tmp_path: Path, options: tuple[object, ...], sentence: str) -> None:
    out = tmp_path / "out.png"
    with pytest.raises(SystemExit, match=sentence) as error:
        attention("--checkpoint", weights, "--out", out, *options)
    assert str(error.value).startswith("error: ") and not out.exists()
