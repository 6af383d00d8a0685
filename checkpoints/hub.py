"""Find models by name, owner/name or owner/name/path, in the user's Hugging Face cache."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoints.files import printable

_PART = re.compile(r"[A-Za-z0-9][\w.-]*")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_BASE = ["model_index.json", *(f"{part}/*.{end}" for part in _PARTS for end in ("json", "safetensors", "txt"))]
_VARIANTS = ["*.fp16.*", "*.non_ema.*"]


def locate(path: Path, download: bool = False) -> Path:
    """Return `path` if it exists; otherwise the file or folder of that name in the Hugging Face cache.

    `owner/name` is a base model as a diffusers folder; `owner/name/path` is a file or folder in a repository, such as
    `h94/IP-Adapter/models/image_encoder`. `download` downloads what the cache lacks; without it nothing is sent anywhere. Paths
    that cannot be such names are returned as they are. Raises FileNotFoundError if the cache lacks it, and OSError if it can't be
    downloaded.
    """
    if path.exists() or path.is_absolute() or len(path.parts) < 2 or not all(map(_PART.fullmatch, path.parts)):
        return path
    place = _cache_path(path)
    if place.exists():
        return place
    if not download:
        raise FileNotFoundError(
            f"{path} is neither here nor in the Hugging Face cache: name a file or folder, or add --download to download it"
        )
    _download(path)
    if not place.exists() and not (place := _cache_path(path)).exists():
        raise FileNotFoundError(f"{path} is not in the repository {'/'.join(path.parts[:2])}: look up its name")
    return place


def _cache_path(path: Path) -> Path:
    """Return where `path` is in the cache; `path` itself if the cache lacks its repository."""
    from huggingface_hub import snapshot_download  # imported here, because it takes a second
    from huggingface_hub.errors import LocalEntryNotFoundError

    owner, name, *inside = path.parts
    try:
        folder = Path(snapshot_download(f"{owner}/{name}", local_files_only=True))
    except LocalEntryNotFoundError:
        return path
    complete = inside or (folder / "unet").exists()  # an adapter's repository, or a few files, is no base model
    return folder.joinpath(*inside) if complete else path


def _download(path: Path) -> None:
    from huggingface_hub import snapshot_download

    owner, name, *inside = path.parts
    pattern = "/".join(inside)
    try:
        snapshot_download(
            f"{owner}/{name}", allow_patterns=[pattern, f"{pattern}/*"] if inside else _BASE, ignore_patterns=None if inside else _VARIANTS
        )
    except Exception as error:  # the network can fail in many ways
        raise OSError(f"{path} can't be downloaded: {printable(str(error).strip().partition(chr(10))[0])}") from error
