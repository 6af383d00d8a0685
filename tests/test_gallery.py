"""The gallery: every sheet is drawn, and names only existing flags."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sampling.following import flag
from sampling.images import read_settings
from sampling.loading import load
from sampling.options import PROMPT
from sampling.parser import parser
from sampling.sheets import __main__ as sheets
from sampling.sheets import demo, gallery
from sampling.sheets.layout import CELL, sheet


@pytest.fixture(scope="module")
def artist(tmp_path_factory: pytest.TempPathFactory) -> gallery.Artist:
    return gallery.Artist(load(), tmp_path_factory.mktemp("masks"), seed=3, steps=4)


def flags(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


@pytest.mark.parametrize("name", gallery.SHEETS)
def test_a_sheet_is_drawn(artist: gallery.Artist, name: str) -> None:
    """All columns have titles, all rows have notes, the notes name existing flags, and the drawings in a row differ."""
    title, draw = gallery.SHEETS[name]
    columns, rows, notes = draw(artist)
    given = len(columns[0])
    assert flags(" ".join(notes)) <= set(parser()._option_string_actions)
    for row in rows:
        drawn = [picture.tobytes() for picture in row[given:]]
        assert len(set(drawn)) > len(drawn) / 2 >= 1.5  # of 4 steps, two strengths can leave as many
    page = sheet(columns, rows, notes, title=title)
    assert page.height > len(rows) * CELL and page.width > sum(map(len, columns)) * CELL


def test_the_demo_draws_what_its_headings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lambda and each text is below its heading. Without a text, lambda 1 draws two variations."""
    cells, headings = demo.cells(), [heading for group in demo.COLUMNS[1:] for heading in group]
    assert len(cells) == len(headings)
    told = dict(zip(headings, cells, strict=True))
    assert all(told[f"lambda {scale:g}"] == (demo.SCENES['"on pink"'], 0, scale) for scale in demo.LAMBDAS)
    assert all(told[f"conflict, {scale:g}"] == (demo.CONFLICT, 0, scale) for scale in demo.CONFLICT_LAMBDAS)
    assert all(told[heading] == (text, 0, 1.0) for heading, text in demo.SCENES.items())
    assert cells[:2] == [("", 0, 1.0), ("", 1, 1.0)]
    for name in ("ROWS", "STEPS"):
        monkeypatch.setattr(demo, name, 1)
    assert demo.write(0, tmp_path / "demo.png").endswith("1 image prompts")
    assert Image.open(tmp_path / "demo.png").width > len(cells) * CELL


@pytest.mark.parametrize("name", gallery.SHEETS)
def test_titles_name_flags_of_the_command_line(name: str) -> None:
    named = flags(gallery.SHEETS[name][0])
    assert named and named <= set(parser()._option_string_actions)


def test_every_flag_of_an_image_prompt_has_a_sheet() -> None:
    named = {each for title, _ in gallery.SHEETS.values() for each in flags(title)}
    assert {flag(name) for name in PROMPT} - named == {"--scale"}  # which `make demo` shows
    assert {"--init-image", "--strength", "--mask", "--guidance", "--image-guidance", "--sampler"} <= named


def test_the_command_writes_every_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny(artist: gallery.Artist) -> gallery.Cells:
        return [["a"]], [[Image.new("RGB", (64, 64), (artist.seed, 0, 0))]], ["a note"]

    monkeypatch.setattr(gallery, "SHEETS", {"one": ("one (--image)", tiny), "two": ("two (--mask)", tiny)})
    sheets.main(["gallery", "--seed", "7", "--out", str(tmp_path / "folder")])
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["one.png", "two.png"]
    assert read_settings(tmp_path / "folder" / "two.png") == {"command": "python -m sampling.sheets gallery --seed 7"}
    assert "2 sheets" in capsys.readouterr().out


def test_a_sheet_shows_its_pictures() -> None:
    """Pictures appear at the right size. A title moves them down and widens the sheet if necessary."""
    pictures, colours = [Image.new("RGB", (64, 64), name) for name in ("red", "lime", "blue")], np.eye(3) * 255
    pages = [
        np.asarray(sheet([["a"], ["b", "c"]], [pictures, pictures[::-1]], ["", "note"], title=title))
        for title in ("", "long " * 30)
    ]
    assert all((page == colour).all(axis=-1).sum() == 2 * CELL**2 for page in pages for colour in colours)
    plain, titled = (np.argwhere((page == colours[0]).all(axis=-1))[0] for page in pages)
    assert titled[0] > plain[0] and titled[1] == plain[1] and pages[1].shape[1] > pages[0].shape[1]
