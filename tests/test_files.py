"""Writing files: whole or not at all, whatever goes wrong; and what is read as JSON, hashed and printed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import cards
from checkpoints.files import (
    check_output,
    files_of,
    is_finite,
    printable,
    read_json,
    replacing,
    replacing_in,
    sha256,
    write_json,
    write_tensors,
)
from checkpoints.folders import weights_in

ROOT = Path(__file__).parent.parent
Write = Callable[[Path], None]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def by_torch(path: Path) -> None:
    with replacing(path) as part:
        torch.save({"a": torch.ones(9)}, part)


WRITERS: dict[str, Write] = {
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(9)}, None),
    "JSON": lambda path: write_json(path, {"a": 1}),
    "torch": by_torch,
    "weights and card": lambda path: cards.save(nn.Linear(2, 2), path, {}),
}


def a_file_as_folder(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "out.safetensors"


def a_folder_as_file(folder: Path) -> Path:
    (folder / "out.safetensors").mkdir()
    return folder / "out.safetensors"


PLACES: dict[str, Callable[[Path], Path]] = {
    "the folder is a file": a_file_as_folder,
    "the file is a folder": a_folder_as_file,
    "a name that is too long": lambda folder: folder / ("x" * 300 + ".safetensors"),
    "a null character": lambda folder: folder / "a\0b.safetensors",
    "a folder that can't be made": lambda _: Path("/proc/none/out.safetensors"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", WRITERS)
def test_impossible_places_are_one_sentence(tmp_path: Path, writer: str, place: str) -> None:
    path = PLACES[place](tmp_path)
    before = names(tmp_path)
    with pytest.raises(OSError) as refused:
        WRITERS[writer](path)
    assert "\n" not in str(refused.value) and "\0" not in str(refused.value) and ".part" not in str(refused.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("writer", ["JSON", "torch"])
def test_a_full_device_is_one_sentence(tmp_path: Path, writer: str) -> None:
    """/dev/full refuses every write as a full disk does; the temporary file is a link to it (safetensors replaces links)."""
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    (tmp_path / ".out.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"out\.safetensors can't be written: "):
        WRITERS[writer](path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["out.safetensors"]


FULL = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
sys.path.insert(0, "tests")
from test_files import WRITERS, cards, replacing_in, write_json, write_tensors

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"a": torch.ones(10**5)}

def torch_save(path):
    from checkpoints.files import replacing
    with replacing(path) as part:
        torch.save(big, part)

def together(path):
    with replacing_in(path.parent) as part:
        write_json(part / "config.json", {"new": 1})
        write_tensors(part / path.name, big, None)

writers = {
    "tensors": lambda path: write_tensors(path, big, None),
    "JSON": lambda path: write_json(path, "x" * 10**6),
    "torch": torch_save,
    "card": lambda path: cards.save(nn.Linear(10, 10), path, {"x": "y" * 10**6}),
    "weights": lambda path: cards.save(nn.Linear(1000, 1000), path, {}),
    "together": together,
}
try:
    writers[sys.argv[1]](Path(sys.argv[2]))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", ["tensors", "JSON", "torch", "card", "weights", "together"])
def test_a_full_disk_leaves_the_old_files(tmp_path: Path, writer: str) -> None:
    """A process whose files may have 100 kB: safetensors, torch and Python each fail in their own way."""
    old = {"out.safetensors": "old weights", "out.json": "old card", "config.json": "old config"}
    for name, content in old.items():
        (tmp_path / name).write_text(content)
    out = tmp_path / "out.safetensors"
    run = subprocess.run([sys.executable, "-c", FULL, writer, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert "can't be written: " in run.stdout and run.stdout.count("\n") == 1 and ".part" not in run.stdout
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == old


def test_a_missing_permission_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as root, who may write anywhere but on a read-only disk; so the answers of the system are put in."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    for writer in WRITERS.values():
        with pytest.raises(OSError, match="no permission to write in"):
            writer(tmp_path / "a.safetensors")
    monkeypatch.undo()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "replace", refuse)
    for writer in WRITERS.values():
        with pytest.raises(OSError, match=r"can't be written: Permission denied$"):
            writer(tmp_path / "a.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"can't be written: Permission denied$"):
        check_output(tmp_path / "new" / "a.safetensors")
    assert names(tmp_path) == []


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    """Those that a process with this umask gives new files. Safetensors alone would hide its files from everybody else."""
    code = """
from pathlib import Path
from test_files import WRITERS
for name, write in WRITERS.items():
    write(Path(f"{name}.safetensors"))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, umask=0o027, check=True)
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {0o100640} and len(names(tmp_path)) > len(WRITERS)


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("stays")
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(KeyError), replacing_in(tmp_path) as part:
        write_json(part / "a.json", {})
        raise KeyError
    assert (tmp_path / "a.json").read_text() == "old"
    with replacing_in(tmp_path) as part:
        write_json(part / "a.json", {"new": 1})
        write_tensors(part / "sub" / "b.safetensors", {"a": torch.ones(1)}, None)
    assert names(tmp_path) == ["a.json", "other", "sub", "sub/b.safetensors"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"new": 1}
    assert load_file(tmp_path / "sub" / "b.safetensors")["a"].item() == 1


def test_writers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    """Each publishes and removes only what it wrote, whoever ends first, and whether it ends or fails."""
    with replacing_in(tmp_path) as one:
        write_json(one / "a.json", {"by": "one"})
        with replacing_in(tmp_path) as two:
            write_json(two / "b.json", {"by": "two"})
            assert names(tmp_path) == sorted([one.name, f"{one.name}/a.json", two.name, f"{two.name}/b.json"])
        assert names(tmp_path) == sorted([one.name, f"{one.name}/a.json", "b.json"])
        with pytest.raises(KeyError), replacing_in(tmp_path) as three:
            write_json(three / "a.json", {"by": "three"})
            raise KeyError
    assert names(tmp_path) == ["a.json", "b.json"] and json.loads((tmp_path / "a.json").read_text()) == {"by": "one"}


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as part:
        part.write_text("half")
        left = tmp_path / "copy"
        left.write_text("half")
    path.unlink()
    left.rename(part)
    write_json(path, {"by": "the next"})
    assert names(tmp_path) == ["a.json"] and json.loads(path.read_text()) == {"by": "the next"}


def test_what_is_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    """What writers and a browser have begun is neither hashed nor read, even if it is whole: alone, and beside a finished file."""
    path = tmp_path / "model.safetensors"
    with pytest.raises(KeyError), replacing(path) as part, replacing_in(tmp_path) as parts:
        for begun in (part, parts / path.name, tmp_path / f"{path.name}.part"):
            save_file({"a": torch.zeros(2)}, begun)
        assert files_of(tmp_path) == []
        with pytest.raises(FileNotFoundError, match="holds no weights"):
            weights_in(tmp_path)
        save_file({"a": torch.ones(2)}, path)
        assert files_of(tmp_path) == [path] and weights_in(tmp_path).path == path
        raise KeyError  # no writer finishes


def test_files_of_the_user_that_are_called_part_stay(tmp_path: Path) -> None:
    (tmp_path / ".part").mkdir()
    mine = [tmp_path / "a.json.part", tmp_path / ".part" / "mine"]
    for path in mine:
        path.write_text("mine")
    for fail in (False, True):
        for writing, name in ((replacing(tmp_path / "a.json"), ""), (replacing_in(tmp_path), "b.json")):
            with contextlib.suppress(KeyError), writing as part:
                (part / name).write_text("new")
                if fail:
                    raise KeyError
    assert [path.read_text() for path in mine] == ["mine"] * 2
    assert names(tmp_path) == [".part", ".part/mine", "a.json", "a.json.part", "b.json"]


def test_only_regular_files_are_hashed(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="is not a regular file"):
            sha256(path)


JSONS: dict[str, tuple[bytes, str]] = {
    "a list": (b"[1]", "is not a JSON object"),
    "brackets": (b"[" * 200_000, "is not a JSON object"),
    "bytes": (b"\xff\xfe\x00", "is not a JSON object"),
    "control characters": (b'{"\x1b[2J": ', "is not a JSON object"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a Git LFS pointer.*git lfs pull",
    ),
    "a page": (b"\n<!DOCTYPE html><html>", "is a web page, not the file"),
}


@pytest.mark.parametrize("case", JSONS)
def test_what_is_not_json_is_named(tmp_path: Path, case: str) -> None:
    content, sentence = JSONS[case]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json {sentence}") as refused:
        read_json(tmp_path / "a.json")
    assert "\x1b" not in str(refused.value)


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_text_from_files_is_escaped() -> None:
    assert printable("down.0.weight é") == "down.0.weight é"
    assert printable("\x1b[2J\n\u202e\0") == r"\x1b[2J\n\u202e\x00"
    assert len(printable("x" * 10**6)) < 400


# which numbers are finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for number, finite in zip(numbers.split(1), numbers.isfinite().tolist(), strict=True):
        assert is_finite(number) == finite
    assert is_finite(numbers[numbers.isfinite()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 2**18 - 1, 2**18, 300_000])
def test_one_number_among_many(dtype: torch.dtype, place: int) -> None:
    many, limits = torch.randn(300_001).to(dtype), torch.finfo(dtype)
    for number in (limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0):
        many[place] = number
        assert is_finite(many)
    for number in (math.inf, -math.inf, math.nan):
        many[place] = number
        assert not is_finite(many)
        assert not is_finite(many[: place + 1].expand(2, -1).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_whose_sum_is_not(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype)) and not is_finite(torch.tensor([math.inf, -math.inf]).to(dtype))


def test_integers_are_finite() -> None:
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.tensor([1, 2**62]))
