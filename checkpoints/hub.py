"""Find models by name, owner/name or owner/name/path, in the user's Hugging Face cache."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints.files import printable

_PART = re.compile(r"[A-Za-z0-9][\w.-]*")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_BASE = ["model_index.json", *(f"{part}/*.{end}" for part in _PARTS for end in ("json", "safetensors", "txt"))]
_VARIANTS = ["*.fp16.*", "*.non_ema.*"]


def locate(path: Path, download: bool = False) -> Path:
    """Return `path` if it exists; otherwise the file or folder of that name in the Hugging Face cache.

    `owner/name` is a base model as a diffusers folder; `owner/name/path` is a file or folder in a repository, such as
    `h94/IP-Adapter/models/image_encoder`. `download` downloads what the cache lacks, also what an interrupted
    download left; without it nothing is sent anywhere. Paths that cannot be such names are returned as they are. Raises
    FileNotFoundError if the cache lacks it, and OSError if it can't be downloaded.
    """
    if path.exists() or path.is_absolute() or len(path.parts) < 2 or not all(map(_PART.fullmatch, path.parts)):
        return path
    place = _downloaded(path) if download else _cached(path)
    if place.exists():
        return place
    if download:
        repository = "/".join(path.parts[:2])
        raise FileNotFoundError(f"{path} is not in the repository {repository}, or the network can't be reached: look up its name")
    raise FileNotFoundError(
        f"{path} is neither here nor in the Hugging Face cache: name a file or folder, or add --download to download it"
    )


def _in_snapshot(path: Path, snapshot: Path) -> Path:
    """Return where `path` is in a snapshot of its repository; `path` itself if it is a base model and the snapshot is not."""
    inside = path.parts[2:]
    is_model = inside or (snapshot / "unet").exists()  # an adapter's repository, or a few files, is no base model
    return snapshot.joinpath(*inside) if is_model else path


def _cached(path: Path) -> Path:
    """Return where `path` is in the cache; `path` itself if the cache lacks its repository."""
    from huggingface_hub import snapshot_download  # imported here, because it takes a second
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download("/".join(path.parts[:2]), local_files_only=True)
    except LocalEntryNotFoundError as error:
        snapshot = getattr(error, "snapshot_path", "")  # of a snapshot with only some of the repository's files
    return _in_snapshot(path, Path(snapshot)) if snapshot else path


def _downloaded(path: Path) -> Path:
    """Download what the cache lacks of `path`, and return where it is. If that fails but nothing is lacking, use the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, pattern = "/".join(path.parts[:2]), "/".join(path.parts[2:])
    only: dict[str, Any] = {"allow_patterns": [pattern, f"{pattern}/*"]}
    if not pattern:
        only = {"allow_patterns": _BASE, "ignore_patterns": _VARIANTS}
    try:
        return _in_snapshot(path, Path(snapshot_download(repository, **only)))
    except Exception as error:  # the network can fail in many ways
        with suppress(LocalEntryNotFoundError):
            if (place := _in_snapshot(path, Path(snapshot_download(repository, local_files_only=True, **only)))).exists():
                return place
        raise OSError(f"{path} can't be downloaded: {printable(str(error).strip().partition(chr(10))[0])}") from error
