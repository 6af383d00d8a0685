"""Pictures with captions, as sequences that need not fit in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sampling.images import decode_image, open_image, picture_size
from train.fingerprint import digest


class Member(NamedTuple):
    """A file inside a tar file: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture, its captions (at least one), and `key`, the hash of its bytes. It is a file, or a `member` of the tar file `path`."""

    path: Path
    texts: tuple[str, ...]
    key: int
    member: Member | None = None

    @property
    def text(self) -> str:
        """Return the first caption."""
        return self.texts[0]

    @property
    def size(self) -> tuple[int, int]:
        """Return the (height, width) of the upright picture, without decoding it."""
        return picture_size(self.path if self.member is None else BytesIO(self._bytes()))

    def open(self) -> Image.Image:
        """Open the picture as upright 8-bit RGB. Raises ValueError, naming the file, if it is not a picture."""
        if self.member is None:
            return open_image(self.path)
        return decode_image(BytesIO(self._bytes()), f"{self.path}: {self.member.name}")

    def _bytes(self) -> bytes:
        """Return the bytes of the picture in its tar file."""
        assert self.member is not None
        with open(self.path, "rb") as file:
            file.seek(self.member.offset)
            return file.read(self.member.size)


def first_rows(keys: Tensor) -> Tensor:
    """Return the row at which each different key first occurs, in the order of the keys, smallest first. `keys`: `n`, int64."""
    different, which = keys.unique(return_inverse=True)
    return torch.full_like(different, len(keys)).scatter_reduce(0, which, torch.arange(len(keys)), "amin")


class Album(Sequence[CaptionedPicture]):
    """Pictures with captions. `num_broken` is the number of pictures that were left out because they cannot be read."""

    num_broken: int

    @property
    @abstractmethod
    def keys(self) -> Tensor:
        """Return the keys of all pictures, `n`."""

    @abstractmethod
    def select(self, rows: Tensor) -> Album:
        """Return the album of the pictures at `rows`, in that order."""

    @abstractmethod
    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures and the captions."""


class ListAlbum(Album):
    """An album in memory."""

    def __init__(self, files: Sequence[CaptionedPicture], num_broken: int = 0) -> None:
        self.files, self.num_broken = files, num_broken

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> CaptionedPicture:  # type: ignore[override]
        return self.files[i]

    @property
    def keys(self) -> Tensor:
        return torch.tensor([file.key for file in self.files], dtype=torch.int64)

    def select(self, rows: Tensor) -> ListAlbum:
        return ListAlbum([self.files[i] for i in rows.tolist()], self.num_broken)

    def made_from(self) -> dict[str, str]:
        return {"pictures": digest(self.keys.tolist()), "captions": digest([file.texts for file in self.files])}
