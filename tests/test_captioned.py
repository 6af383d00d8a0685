"""A user's pictures and captions: formats, error messages, and the held-out split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_pictures import picture, write_pictures
from PIL import Image

from train.album import Album, CaptionedPicture, ListAlbum
from train.captioned import captioned_files, ignored_entries, split, summary


def captioned(data: Path, skip_broken: bool = False) -> Album:
    return captioned_files(data, data / "no cache", skip_broken)


def pair(folder: Path, name: str, seed: int, text: str = "a fox") -> Path:
    path = folder / name
    picture(seed).save(path)
    path.with_suffix(".txt").write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "saved_as"),
    [
        *((name, None) for name in ("a.png", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "a.gif", "a.tif", "a.tiff", "a.avif")),
        ("a.jfif", "JPEG"),
        ("a.PNG", "PNG"),
    ],
)
def test_every_format_is_read(tmp_path: Path, name: str, saved_as: str | None) -> None:
    picture(0).save(tmp_path / name, saved_as)
    (tmp_path / "a.txt").write_text("a fox")
    assert [(file.path.name, file.text) for file in captioned(tmp_path)] == [(name, "a fox")]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b"a fox\n", "a fox"),
        (b"\xef\xbb\xbfa fox", "a fox"),  # a byte order mark
        ("ein Füchschen".encode(), "ein Füchschen"),
        (b"a fox\r\n", "a fox"),
        (b"", ""),
    ],
)
def test_captions_as_editors_write_them(tmp_path: Path, written: bytes, read: str) -> None:
    pair(tmp_path, "a.png", 0).with_suffix(".txt").write_bytes(written)
    assert captioned(tmp_path)[0].text == read
    data = tmp_path / "data.json"
    data.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"image_file": "a.png", "text": read}]).encode())
    assert captioned(data)[0].text == read


def broken_png(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (broken_png, r"3\.png: the picture is damaged or truncated"),
    "empty": (lambda path: path.write_bytes(b""), r"3\.png: the file is empty"),
    "text": (lambda path: path.write_text("hello"), r"3\.png: Pillow cannot read this file as a picture"),
    "a broken link": (lambda path: (path.unlink(), path.symlink_to("gone.png")), r"3\.png: there is no such file"),
    "no caption": (lambda path: path.with_suffix(".txt").unlink(), r"3\.png: it has no caption file; write 3\.txt"),
    "latin-1": (lambda path: path.with_suffix(".txt").write_bytes(b"F\xfcchse"), r"3\.txt: the caption is not UTF-8"),
    "utf-16": (lambda path: path.with_suffix(".txt").write_bytes("fox".encode("utf-16")), r"3\.txt: the caption is not"),
    "a folder": (lambda path: (path.with_suffix(".txt").unlink(), path.with_suffix(".txt").mkdir()), r"3\.txt: Is a dir"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_problem_in_a_folder_is_named(tmp_path: Path, fault: str) -> None:
    for i in range(5):
        pair(tmp_path, f"{i}.png", i)
    spoil, sentence = FAULTS[fault]
    spoil(tmp_path / "3.png")
    with pytest.raises(ValueError, match=sentence) as refused:
        captioned(tmp_path)
    assert len(str(refused.value).splitlines()) == 2


ENTRIES: dict[str, tuple[Any, str]] = {
    "null": ({"image_file": "0.png", "text": None}, "entry 1: text must be a valid string"),
    "a list": ({"image_file": "0.png", "text": ["a", "b"]}, "entry 1: text must be a valid string"),
    "a number": ({"image_file": "0.png", "text": 3}, "entry 1: text must be a valid string"),
    "no text": ({"image_file": "0.png"}, "entry 1: text must be a valid string"),
    "no file": ({"text": "a"}, "entry 1: image_file must be a valid string"),
    "neither": ({}, "entry 1: image_file and text must be a valid string"),
    "a string": ("0.png", 'entry 1: image_file and text must be a valid string: "0.png"'),
    "absent": ({"image_file": "9.png", "text": "a"}, r"9\.png: there is no such file"),
    "a folder": ({"image_file": ".", "text": "a"}, "there is no such file"),
    "a zero": ({"image_file": "a\0.png", "text": "a"}, "entry 1: image_file must be a valid string"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_each_problem_in_a_list_is_named(tmp_path: Path, entry: str) -> None:
    """In particular, null must not become the text "None"."""
    pair(tmp_path, "0.png", 0)
    wrong, sentence = ENTRIES[entry]
    (tmp_path / "data.json").write_text(json.dumps([{"image_file": "0.png", "text": "a"}, wrong]))
    with pytest.raises(ValueError, match=sentence):
        captioned(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not JSON"),
        (b"[1, 2", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"image_file": "a.png", "text": "a"}', "not a list"),
        (b'[{"image_file": "a.png", "text": "F\xfcchse"}]', "not UTF-8"),
        (b"[]", "no pictures found"),
        (None, "No such file"),
    ],
)
def test_an_invalid_list_is_rejected(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.json: .*{sentence}"):
        captioned(tmp_path / "data.json")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    for i in range(130):
        pair(tmp_path, f"{i:03}.png", i % 3)
        if i % 10:
            (tmp_path / f"{i:03}.png").write_bytes(b"")
    broken_png(tmp_path / "000.png")
    (tmp_path / "010.txt").unlink()
    with pytest.raises(ValueError, match=r"fix or remove these before training, or train with --skip-broken \(119 problems\)") as refused:
        captioned(tmp_path)
    lines = str(refused.value).splitlines()
    assert len(lines) == 102 and lines[-1] == "  and 19 more"
    assert "010.txt" in lines[1] and "000.png: the picture is damaged" in lines[2] and "001.png: the file is empty" in lines[3]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match="no pictures found"):
        captioned(tmp_path)


def test_what_is_skipped_is_counted(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", 0)
    for name in ("notes.md", "b.mp4", "lonely.txt", "._a.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "more").mkdir()
    files = captioned(tmp_path)
    assert len(files) == 1 and len(ignored_entries(tmp_path)) == 6
    assert "6 files are skipped (.md, .mp4, .png, .txt, folders and others)" in summary(tmp_path, files, ListAlbum([]))


def test_broken_pictures_are_left_out_if_asked(tmp_path: Path) -> None:
    for i in range(5):
        pair(tmp_path, f"{i}.png", i)
    broken_png(tmp_path / "1.png")
    (tmp_path / "3.txt").unlink()
    files = captioned(tmp_path, skip_broken=True)
    assert [file.path.name for file in files] == ["0.png", "2.png", "4.png"] and files.num_broken == 2
    assert "2 left out because they are broken" in summary(tmp_path, files, ListAlbum([]))
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no pictures found"):
        captioned(tmp_path, skip_broken=True)


# held out


def listed(*contents: int) -> ListAlbum:
    keys = [content * 7919 % 1009 - 500 for content in contents]
    return ListAlbum([CaptionedPicture(Path(f"{i}.png"), (f"caption {i}",), key) for i, key in enumerate(keys)])


def keys(files: Album) -> set[int]:
    return set(files.keys.tolist())


@pytest.mark.parametrize(("n", "out"), [(1, 0), (19, 0), (20, 4), (50, 4), (99, 4), (100, 5), (1000, 50)])
def test_a_twentieth_is_held_out_and_at_least_four(n: int, out: int) -> None:
    files = listed(*range(n))
    train, held_out = split(files)
    assert len(held_out) == out and len(train) == n - out
    assert not keys(train) & keys(held_out) and keys(train) | keys(held_out) == keys(files)
    assert ("nothing is measured" in summary(Path("a"), train, held_out)) == (out == 0)


def test_a_copy_of_a_held_out_picture_is_not_trained_on() -> None:
    train, held_out = split(listed(*range(20), *range(20), *range(20)))
    assert len(held_out) == len(keys(held_out)) == 4 and len(train) == 48
    assert not keys(train) & keys(held_out)
    assert {file.text for file in held_out} <= {f"caption {i}" for i in range(20)}  # the first of the copies
    assert len(split(listed(*[0] * 50))[1]) == 0  # one picture, 50 times


def test_no_more_than_512_are_held_out() -> None:
    files = ListAlbum([CaptionedPicture(Path("a"), ("",), i) for i in range(20_000)])
    assert len(split(files)[1]) == 512


def test_pictures_are_compared_by_content(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "a", 2)
    first, second = captioned(folder)
    Image.open(second.path).save(first.path)
    assert first.key != second.key
    again = captioned(folder)
    assert again[0].path == first.path and again[0].key == again[1].key == second.key
