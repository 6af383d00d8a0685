"""Reading tensors: shards, prefixes, files that are something else, and files that claim more than they hold."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.describe import inspect
from checkpoints.reader import File
from weights_convert import main

TENSORS = {f"layer.{i}.weight": torch.full((2, 3), float(i)) for i in range(5)}


def equal(file: File, tensors: dict[str, Tensor]) -> None:
    assert file.keys() == tensors.keys() and file.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    assert all(torch.equal(file[name], tensor) for name, tensor in tensors.items())


def write_shards(
    folder: Path, stem: str = "model", end: str = ".safetensors", tensors: dict[str, Tensor] = TENSORS
) -> Path:
    """As transformers and diffusers write a file that is too large for one."""
    where = {name: f"{stem}-0000{1 + i % 2}-of-00002{end}" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        part = {name: tensor for name, tensor in tensors.items() if where[name] == shard}
        (save_file if end == ".safetensors" else torch.save)(part, folder / shard)  # type: ignore[operator]
    index = folder / f"{stem}{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_shards_are_one_file(tmp_path: Path, end: str) -> None:
    equal(File(write_shards(tmp_path, end=end)), TENSORS)


BAD_INDEX: dict[str, tuple[object, str]] = {
    "no map": ({}, "is not the index of"),
    "a list": ({"weight_map": ["a"]}, "is not the index of"),
    "elsewhere": ({"weight_map": {"a": "../model-00001-of-00002.safetensors"}}, "is not the index of"),
    "a number": ({"weight_map": {"a": 1}}, "is not the index of"),
    "another tensor": ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "lists a, but its shard lacks it"),
    "no shard": ({"weight_map": {"a": "none.safetensors"}}, "none.safetensors"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_broken_indices_are_refused(tmp_path: Path, case: str) -> None:
    content, sentence = BAD_INDEX[case]
    index = write_shards(tmp_path)
    index.write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        File(index)


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_shards_with_the_same_tensor_are_refused(tmp_path: Path, end: str) -> None:
    """Although the index names one of them: they may come from two models."""
    index = write_shards(tmp_path, end=end)
    part = {name: TENSORS[name] for name in ("layer.1.weight", "layer.3.weight")} | {"layer.4.weight": torch.zeros(2, 3)}
    (save_file if end == ".safetensors" else torch.save)(part, tmp_path / f"model-00002-of-00002{end}")  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"model\{end}\.index\.json has two shards with the same tensor: download them again"):
        File(index)


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_a_prefix_of_data_parallel_training_is_left_out(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"a{end}"
    (save_file if end == ".safetensors" else torch.save)({f"module.{k}": t for k, t in TENSORS.items()}, path)  # type: ignore[operator]
    equal(File(path), TENSORS)


def test_checksums_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each version of a file: it takes as long as reading all of it."""
    path, checked, check = tmp_path / "a.ckpt", [], ZipFile.testzip
    monkeypatch.setattr(ZipFile, "testzip", lambda file: checked.append(file) or check(file))
    torch.save(TENSORS, path)
    for _ in range(3):
        equal(File(path), TENSORS)
    assert len(checked) == 1
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    torch.save(other, tmp_path / "b.ckpt")
    (tmp_path / "b.ckpt").replace(path)
    equal(File(path), other)
    assert len(checked) == 2
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((6,), 5.0).numpy().tobytes())] ^= 1  # in one tensor
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.ckpt is not a readable checkpoint .* is damaged"):
            File(path)


def test_names_are_joined_and_left_out(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    file = File(tmp_path / "a.safetensors")
    joined = file.rename({"both": ("layer.1.weight", "layer.0.weight"), "one": "layer.4.weight"})
    equal(
        joined,
        {"both": torch.cat([TENSORS["layer.1.weight"], TENSORS["layer.0.weight"]]), "one": TENSORS["layer.4.weight"]},
    )
    assert file.without(r"layer\.[0-3]").keys() == {"layer.4.weight"}


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (9, 9)).save(content, "PNG")
    return content.getvalue()


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (9, 9)).save(content, "JPEG")
    return content.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n",
        "a Git LFS pointer.*git lfs pull",
    ),
    "a page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page, not the file"),
    "another page": (b"\xef\xbb\xbf  <HTML lang=en>", "a web page, not the file"),
    "PNG": (png(), "not a file of weights but a PNG picture"),
    "JPEG": (jpeg(), "not a file of weights but a JPEG picture"),
    "JSON": (b'{"config": {"a": 1}}', "not a file of weights but JSON"),
    "a JSON list": (b'[1,2,3, {"a": 1}]', "not a file of weights but JSON"),
    "text": (b"no weights at all\n", "not a file of weights but text"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "not a file of weights but a GGUF file"),
    "gzip": (b"\x1f\x8b\x08\x00", "not a file of weights but a gzip archive: unpack it"),
}


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.ckpt", "a.png"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_named_whatever_they_are_called(tmp_path: Path, case: str, name: str) -> None:
    content, sentence = OTHERS[case]
    (tmp_path / name).write_bytes(content)
    for read in (File, inspect):
        with pytest.raises(ValueError, match=f"{name} is {sentence}"):
            read(tmp_path / name)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a regular file"):
        File(Path("/dev/zero"))
    with ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("readme.txt", "x")
    with pytest.raises(ValueError, match="a zip archive without tensors"):
        File(tmp_path / "a.zip")


def compressed(path: Path) -> None:
    """400 MB of zeros in 400 kB."""
    torch.save({"a": torch.zeros(25 << 20)}, plain := path.with_suffix(".plain"))
    with ZipFile(plain) as source, ZipFile(path, "w", ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    plain.unlink()


def stride_zero(path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(3 * 10**12)}, path)


def stride_zero_old(path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, path, _use_new_zipfile_serialization=False)


def many_views(path: Path) -> None:
    """A thousand names for one tensor of 1 MB."""
    one = torch.ones(1 << 18)
    torch.save({str(i): one for i in range(1000)}, path)


BOMBS: dict[str, Callable[[Path], None]] = {
    "compressed": compressed,
    "stride 0": stride_zero,
    "stride 0 in an old file": stride_zero_old,
    "many views": many_views,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_files_that_claim_far_more_than_they_hold_are_refused(tmp_path: Path, bomb: str) -> None:
    BOMBS[bomb](tmp_path / "a.bin")
    before = anonymous()
    with pytest.raises(ValueError, match=r"a\.bin is not a readable checkpoint .*far more"):
        File(tmp_path / "a.bin")
    assert anonymous() - before < 50e6


def anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


EVIL = "image_proj.\x1b[2J\x1b]0;owned\x07\nname"


@pytest.mark.parametrize("end", [".safetensors", ".bin", ".pickle"])
def test_names_of_tensors_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str) -> None:
    path = tmp_path / f"a{end}"
    tensors = {EVIL: torch.ones(2), "image_proj.proj.weight": torch.ones(2, 2), "image_proj.norm.weight": torch.ones(2)}
    if end == ".pickle":
        path.write_bytes(pickle.dumps({EVIL: 1}, protocol=2))
    else:
        (save_file if end == ".safetensors" else torch.save)(tensors, path)  # type: ignore[operator]
        assert r"image_proj.\x1b[2J\x1b]0;owned\x07\nname" in File(path)
    for command in (
        ["inspect", str(path)],
        ["convert", str(path), str(tmp_path / "b.safetensors")],
        ["verify", str(path), str(path)],
    ):
        try:
            main(command)
            said = capsys.readouterr().out
        except SystemExit as ended:
            said = str(ended)
        assert said and not any(c in said for c in "\x1b\x07")


def test_names_that_look_the_same_are_refused(tmp_path: Path) -> None:
    save_file({"a\x1b": torch.ones(1), "a\\x1b": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="names that look the same"):
        File(tmp_path / "a.safetensors")
