"""Recognise files that are not weights, such as Git LFS pointers, web pages and images, by their first bytes."""

from __future__ import annotations

from pathlib import Path

_PLACEHOLDERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file: run git lfs pull, or download the file itself",
    b"<!doctype": "is a web page, not the file: download the file itself",
    b"<html": "is a web page, not the file: download the file itself",
}
_OTHER_FORMATS = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"RIFF": "a WebP picture or another RIFF file",
    b"GGUF": "a GGUF file",
    b"%PDF": "a PDF file",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
}


def check_not_placeholder(path: Path) -> None:
    """Raise ValueError if the file is a Git LFS pointer or a web page instead of the intended download."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for first, problem in _PLACEHOLDERS.items():
        if start.startswith(first):
            raise ValueError(f"{path} {problem}")


def check_is_weights(path: Path) -> None:
    """Raise ValueError, naming what the file is, unless it holds weights or an index of shards."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file of weights in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        start = file.read(256)
    if not start:
        raise ValueError(f"{path} is empty: download it again")
    check_not_placeholder(path)
    for first, what in _OTHER_FORMATS.items():
        if start.startswith(first):
            raise ValueError(f"{path} is not a file of weights but {what}")
    is_text = all(byte >= 32 or byte in b"\t\r\n" for byte in start)
    if is_text and not is_index(path):
        what = "JSON" if start.lstrip()[:1] in (b"{", b"[") else "text"
        raise ValueError(f"{path} is not a file of weights but {what}")


def is_index(path: Path) -> bool:
    """Return whether the name of a file is that of an index of shards, such as `model.safetensors.index.json`."""
    return ".index." in path.name and path.suffix == ".json"
