"""Tar shards: what webdataset's own rules find in them, broken members, the index and its renewal, and captions chosen by position."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from own_pictures import picture
from teams import together

from train import shards
from train.album import Album
from train.captioned import captioned_files, ignored_entries, split, summary


def png(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def write(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, n: int = 24, each: int = 10) -> Path:
    """A folder of shards with n pictures, each with its number as its caption."""
    for first in range(0, n, each):
        names = ((f"{i:04}", i) for i in range(first, min(first + each, n)))
        members = [part for name, i in names for part in ((f"{name}.png", png(i)), (f"{name}.txt", b"picture %d" % i))]
        write(folder / f"{first // each:05}.tar", *members)
    return folder


def read(data: Path, skip_broken: bool = False) -> Album:
    return captioned_files(data, data.parent / "cache", skip_broken)


def test_members_are_grouped_and_read_at_random(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    album = read(folder)
    assert len(album) == 24 and album[17].text == "picture 17"
    for i in (23, 0, 10, 9):
        assert np.array_equal(np.asarray(album[i].open()), np.asarray(picture(i))) and album[i].texts == (f"picture {i}",)
    chosen = album.select(torch.tensor([20, 3]))
    assert [file.text for file in chosen] == ["picture 20", "picture 3"] and chosen.keys.tolist() == [album[20].key, album[3].key]


def test_names_follow_webdataset(tmp_path: Path) -> None:
    """The key of a member is its name up to the first dot of its last part (webdataset.tariterators.base_plus_ext)."""
    first = ("v1.0/a.b.png", png(0)), ("v1.0/a.JPG", png(1, "JPEG")), ("v1.0/a.txt", b"A")
    write(tmp_path / "data" / "0.tar", *first, ("b/a.webp", png(2, "WEBP")), ("b/a.txt", b"B"), ("._c.png", b""), ("d.txt", b"no picture"))
    assert [(file.member and file.member.name, file.text) for file in read(tmp_path / "data")] == [("v1.0/a.JPG", "A"), ("b/a.webp", "B")]


CAPTIONS: dict[str, tuple[list[tuple[str, bytes]], tuple[str, ...]]] = {
    "text": ([("txt", b"\xef\xbb\xbfa fox\n")], ("a fox",)),
    "empty": ([("txt", b"")], ("",)),
    "empty beside another": ([("txt", b"\n"), ("json", b'{"captions": ["", "a fox"]}')], ("a fox",)),
    "json": ([("json", b'{"caption": "a fox", "width": 3}')], ("a fox",)),
    "several": ([("json", b'{"captions": ["a fox", "an animal", "a fox"]}')], ("a fox", "an animal")),
    "both": ([("json", '{"caption": "Füchse"}'.encode()), ("txt", b"a fox")], ("a fox", "Füchse")),
    "the same": ([("json", b'{"caption": "a fox"}'), ("txt", b"a fox")], ("a fox",)),
    "null": ([("json", b'{"caption": null}'), ("txt", b"a fox")], ("a fox",)),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions(tmp_path: Path, case: str) -> None:
    written, texts = CAPTIONS[case]
    write(tmp_path / "data" / "0.tar", ("a.png", png(0)), *((f"a.{kind}", content) for kind, content in written))
    assert [file.texts for file in read(tmp_path / "data")] == [texts]


BROKEN: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "cut": ([("b.png", png(0)[:60]), ("b.txt", b"b")], r"b\.png: the picture is damaged or truncated"),
    "empty": ([("b.png", b""), ("b.txt", b"b")], r"b\.png: Pillow cannot read"),
    "no caption": ([("b.png", png(0))], r'b\.png: it has no caption: add a \.txt member, or a \.json member \{"caption": \.\.\.\}'),
    "no text in json": ([("b.png", png(0)), ("b.json", b'{"caption": null}')], r"b\.png: it has no caption"),
    "numbers": ([("b.png", png(0)), ("b.json", b'{"captions": ["a", 3]}')], r"b\.png: it has no caption"),
    "latin-1": ([("b.png", png(0)), ("b.txt", b"F\xfcchse")], r"b\.png: its caption is not UTF-8"),
    "not json": ([("b.png", png(0)), ("b.json", b"{")], r"b\.png: its \.json member is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_members_are_named_or_left_out(tmp_path: Path, case: str) -> None:
    """In both cases the shard is read only once."""
    members, sentence = BROKEN[case]
    data = tmp_path / "data"
    write(data / "0.tar", ("a.png", png(1)), ("a.txt", b"a"), *members, ("c.png", png(2)), ("c.txt", b"c"))
    with pytest.raises(ValueError, match=rf"train with --skip-broken \(1 problems\)\n  \S*0\.tar: {sentence}"):
        read(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "scan", lambda _: pytest.fail("it was read again"))
        album = read(data, skip_broken=True)
    assert [file.text for file in album] == ["a", "c"] and album.num_broken == 1
    assert "1 left out because they are broken" in summary(data, *split(album))


def test_a_shard_that_is_cut_off_is_a_problem(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 4)
    shard = data / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: 512 * 4 + 700])
    with pytest.raises(ValueError, match=r"00000\.tar: the file is cut off after 000\d\."):
        read(data)
    assert 0 < len(read(data, skip_broken=True)) < 4


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b\x08" + bytes(2000), b"PK\x03\x04" * 300])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    data = write_shards(tmp_path / "data", 4)
    (data / "1.tar").write_bytes(content)
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"1\.tar is not an uncompressed tar file \(.*\): write shards as webdataset does, or rem"):
            read(data, skip)


def test_what_is_beside_shards_is_skipped(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 4)
    (data / "00000_stats.json").touch()
    picture(0).save(data / "a.png")
    album = read(data)
    assert len(album) == 4 and "2 files are skipped (.json, .png)" in summary(data, *split(album)) and len(ignored_entries(data)) == 2
    with pytest.raises(ValueError, match="no pictures found"):
        read(write(tmp_path / "empty" / "0.tar", ("a.txt", b"a")).parent)


def test_only_changed_shards_are_indexed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen, real = write_shards(tmp_path / "data"), list[str](), shards.scan
    monkeypatch.setattr(shards, "scan", lambda shard: (seen.append(shard.name), real(shard))[1])
    first = read(data).made_from()
    assert seen == ["00000.tar", "00001.tar", "00002.tar"] and read(data).made_from() == first and len(seen) == 3
    os.utime(data / "00001.tar", ns=(1, 1))
    assert read(data).made_from() == first and seen[3:] == ["00001.tar"]
    write(data / "00002.tar", ("x.png", png(77)), ("x.txt", b"x"))
    os.utime(data / "00002.tar", ns=(2, 2))  # the clock of a file system may not have moved on
    assert read(data).made_from()["pictures"] != first["pictures"] and seen[4:] == ["00002.tar"] and len(read(data)) == 21
    for file in (tmp_path / "cache").rglob("00000-*"):
        file.write_bytes(b"half")
    assert len(read(data)) == 21 and seen[5:] == ["00000.tar"]


def test_hashes_name_what_differs(tmp_path: Path) -> None:
    inputs = []
    for name, seed, text in (("a", 0, b"x"), ("b", 0, b"y"), ("c", 1, b"x"), ("d", 0, b"x")):
        inputs.append(read(write(tmp_path / name / "0.tar", ("a.png", png(seed)), ("a.txt", text)).parent).made_from())
    assert inputs[0] == inputs[3] and inputs[0]["pictures"] == inputs[1]["pictures"] and inputs[0]["captions"] != inputs[1]["captions"]
    assert inputs[0]["captions"] == inputs[2]["captions"] and inputs[0]["pictures"] != inputs[2]["pictures"]


def test_processes_share_the_indexing(tmp_path: Path) -> None:
    data, real = write_shards(tmp_path / "data", 8, each=2), shards.scan

    def work(rank: int) -> None:
        seen: list[str] = []
        shards.scan = lambda shard: (seen.append(shard.name), real(shard))[1]
        assert len(read(data)) == 8
        (tmp_path / f"{rank}.json").write_text(json.dumps(sorted(seen)))

    together(2, work)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results == [["00000.tar", "00002.tar"], ["00001.tar", "00003.tar"]]
