"""Read the tar files that webdataset writes ("shards"), at random.

Members with the same name up to the first dot of the last part belong together: a picture, `key.jpg`, and its captions, `key.txt` or
`key.json` or both. Each shard is read once, and its index is stored: where the pictures are, their hashes, their captions, and what is
broken. The index is memory-mapped, and it is made again if the size or the time of the shard changes.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import replacing
from sampling.images import decode_image
from train import processes
from train.album import Album, CaptionedPicture, Member
from train.fingerprint import content_key, digest

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = "caption", "captions"  # fields of a JSON member


def shards_in(data: Path) -> list[Path]:
    """List the tar files in a folder."""
    return sorted(data.glob("*.tar")) if data.is_dir() else []


def index_shards(shards: Sequence[Path], folder: Path) -> tuple[Shards, list[str]]:
    """Read the index of each shard in `folder`, or make it. Return the pictures, and the problems of all shards.

    Processes share the shards to index. Raises ValueError if a file is not a tar file.
    """
    for shard in shards:
        _members(shard, first=True)
    files = [folder / f"{shard.stem}-{digest(str(shard.resolve()))}.safetensors" for shard in shards]
    missing, team = [i for i, file in enumerate(files) if _read(file, shards[i]) is None], processes.team()
    processes.wait()  # so that all processes find the same ones missing
    own = missing[team.rank :: team.size]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda i: _write(files[i], shards[i]), own)
        list(tqdm(results, desc="indexing shards", total=len(own), disable=not own or team.rank > 0))
    processes.wait()
    indices, problems = list[dict[str, Tensor]](), list[str]()
    for file, shard in zip(files, shards, strict=True):
        if (pair := _read(file, shard)) is None:
            raise FileNotFoundError(f"{file} is not here, or {shard} is being changed: keep --state on a disk that all processes share")
        indices.append(pair[0])
        problems += pair[1]
    return Shards(shards, indices, torch.arange(sum(len(index["keys"]) for index in indices))), problems


class Shards(Album):
    """The pictures at `rows` of the shards, counted on from one shard to the next. Memory holds 8 bytes per picture."""

    def __init__(self, shards: Sequence[Path], indices: Sequence[dict[str, Tensor]], rows: Tensor, num_broken: int = 0) -> None:
        self.shards, self.indices, self.rows, self.num_broken = shards, indices, rows, num_broken
        self.starts = [0, *accumulate(len(index["keys"]) for index in indices)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> CaptionedPicture:  # type: ignore[override]
        row = int(self.rows[i])
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        index, at = self.indices[shard], row - self.starts[shard]
        start, end = index["words"][at : at + 2].tolist()
        name, *texts = json.loads(index["text"][start:end].numpy().tobytes())
        member = Member(name, int(index["offsets"][at]), int(index["sizes"][at]))
        return CaptionedPicture(self.shards[shard], tuple(texts), int(index["keys"][at]), member)

    @property
    def keys(self) -> Tensor:
        return torch.cat([index["keys"] for index in self.indices])[self.rows]

    def select(self, rows: Tensor) -> Shards:
        return Shards(self.shards, self.indices, self.rows[rows], self.num_broken)

    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures and captions. A change of any caption in the shards changes the second."""
        texts = [str(content_key(index["text"].numpy().tobytes())) for index in self.indices]
        return {"pictures": str(content_key(self.keys.numpy().tobytes())), "captions": digest([texts, len(self)])}


def _members(shard: Path, first: bool = False) -> tuple[list[tarfile.TarInfo], str]:
    """List the files in a tar file, all or only the `first`, and say why the list ends early, if it does."""
    members = list[tarfile.TarInfo]()
    try:
        with tarfile.open(shard, "r:") as file:
            while (member := file.next()) and not (first and members):
                members += [member] if member.isreg() else []
    except tarfile.TarError as error:
        if not members:
            raise ValueError(f"{shard} is not an uncompressed tar file ({error}): write shards as webdataset does, or remove it") from None
        return members, f"{shard}: the file is cut off after {members[-1].name} ({error})"
    return members, ""


def scan(shard: Path) -> tuple[list[tuple[list[str], int, int, int]], list[str]]:
    """Read a shard. Return an entry for each good picture ([name, *captions], offset, size, key), and a sentence for each broken one."""
    members, truncation = _members(shard)
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        key, dot, kind = name.partition(".")
        if key and dot:
            groups.setdefault(f"{folder}/{key}", {})[f".{kind.lower()}"] = member
    entries, problems = list[tuple[list[str], int, int, int]](), [truncation] if truncation else []
    with open(shard, "rb") as file:
        for group in groups.values():
            for member in (group[kind] for kind in group if kind in PICTURES):
                content = _bytes(file, member)
                try:
                    texts = _captions(*(_bytes(file, group[kind]) if kind in group else None for kind in (".txt", ".json")))
                    decode_image(BytesIO(content), member.name)
                except ValueError as error:
                    reason = str(error).removeprefix(f"{member.name}: ")
                    problems.append(f"{shard}: {member.name}: {reason}")
                    continue
                entries.append(([member.name, *texts], member.offset_data, member.size, content_key(content)))
    return entries, problems


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _captions(text: bytes | None, content: bytes | None) -> list[str]:
    """Return the different captions in a text and a JSON member; either may be missing. An empty one counts only if there is no other.

    Raises ValueError if there are none.
    """
    try:
        captions = [text.decode("utf-8-sig").strip()] if text is not None else []
        value = json.loads(content.decode("utf-8-sig")) if content is not None else {}
    except UnicodeDecodeError:
        raise ValueError("its caption is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("its .json member is not JSON") from None
    for name in CAPTIONS:
        caption = value.get(name) if isinstance(value, dict) else None
        captions += [caption] if isinstance(caption, str) else caption if isinstance(caption, list) else []
    if not captions or not all(isinstance(each, str) for each in captions):
        raise ValueError('it has no caption: add a .txt member, or a .json member {"caption": ...}')
    return list(dict.fromkeys(filter(None, captions))) or [""]


def _write(file: Path, shard: Path) -> None:
    """Make the index of a shard."""
    state, (entries, problems) = _state(shard), scan(shard)
    words, offsets, sizes, keys = zip(*entries, strict=True) if entries else ((), (), (), ())
    texts = [json.dumps(each).encode() for each in words]

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64)

    text = torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy())
    index = {"offsets": numbers(offsets), "sizes": numbers(sizes), "keys": numbers(keys), "text": text}
    index["words"] = numbers([0, *accumulate(map(len, texts))])
    with replacing(file) as part:
        save_file(index, part, {"shard": state, "problems": json.dumps(problems)})


def _read(file: Path, shard: Path) -> tuple[dict[str, Tensor], list[str]] | None:
    """Map an index into memory, with its problems. Return None if there is none for this state of the shard."""
    try:
        with safe_open(file, "pt") as stream:
            about = stream.metadata() or {}
            if about.get("shard") != _state(shard):
                return None
            return {name: stream.get_tensor(name) for name in stream.keys()}, json.loads(about["problems"])  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None


def _state(shard: Path) -> str:
    """Return the size and the time of a shard, which change when it is written again."""
    stat = shard.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"
