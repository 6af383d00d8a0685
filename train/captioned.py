"""Read a user's pictures and captions, check them before training, and split off a held-out set."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sampling.images import open_image
from train.album import Album, CaptionedPicture, ListAlbum, first_rows
from train.fingerprint import content_key
from train.shards import index_shards, shards_in

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
MIN_PICTURES = 20  # with fewer different pictures than this, none are held out
MAX_HELD_OUT = 512
MAX_LISTED = 100  # list at most this many problems
Pair = tuple[Path, str]


def captioned_files(data: Path, cache: Path, skip_broken: bool = False) -> Album:
    """Open and check all pictures and captions in a user's data.

    `data` is a folder of pictures with a `.txt` beside each, a folder of shards (train/shards.py), which are indexed in `cache`, or the
    official trainer's JSON list `[{"image_file": ..., "text": ...}]`, with paths relative to the list. Captions are UTF-8. Raises
    ValueError with a list of all problems; with `skip_broken`, leaves the broken pictures out.
    """
    shards = shards_in(data)
    album: Album
    if shards:
        album, problems = index_shards(shards, cache / "shards")
    else:
        album, problems = _open_all(*(_in_folder(data) if data.is_dir() else _in_list(data)))
    if problems and not skip_broken:
        more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        heading = f"{data}: fix or remove these before training, or train with --skip-broken ({len(problems)} problems)"
        raise ValueError("\n  ".join([heading, *problems[:MAX_LISTED], *more]))
    if not len(album):
        raise ValueError(f"{data}: no pictures found: add pictures ({', '.join(PICTURES)}) and their captions, or shards (.tar)")
    album.num_broken = len(problems)
    return album


def _open_all(pairs: list[Pair], problems: list[str]) -> tuple[ListAlbum, list[str]]:
    """Open all pictures. Return the good ones, and all problems."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_key, [path for path, _ in pairs]))
    problems += dict.fromkeys(problem for problem in results if isinstance(problem, str))
    good = zip(pairs, results, strict=True)
    return ListAlbum([CaptionedPicture(path, (text,), key) for (path, text), key in good if isinstance(key, int)]), problems


def ignored_entries(data: Path) -> list[Path]:
    """List the entries of a folder that training ignores: other files, folders, hidden files, captions without a picture."""
    if not data.is_dir():
        return []
    if shards := shards_in(data):
        return sorted(set(data.iterdir()) - set(shards))
    pictures = set(_pictures_in(data))
    captions = {path.with_suffix(".txt") for path in pictures}
    return sorted(path for path in data.iterdir() if path not in pictures | captions)


def split(files: Album) -> tuple[Album, Album]:
    """Split into (training, held out). Of n >= 20 different pictures, hold out n // 20, from 4 to `MAX_HELD_OUT`; of fewer, none.

    Pictures are compared by content, so copies of a held-out picture are not trained on either. The choice depends only on the
    content of the pictures, so it changes little if pictures are added.
    """
    keys = files.keys
    different, which = keys.unique(return_inverse=True)
    n = len(different)
    if n < MIN_PICTURES:
        return files, files.select(torch.arange(0))
    out = min(max(4, n // 20), MAX_HELD_OUT)
    return files.select((which >= out).nonzero()[:, 0]), files.select(first_rows(keys)[:out])


def summary(data: Path, train: Album, held_out: Album) -> str:
    """Describe in one line which of a user's files are used and which are skipped."""
    parts = [f"{data}: {len(train)} pictures to train on, {len(held_out)} held out to measure whether the adapter learns"]
    if not len(held_out):
        parts.append(f"fewer than {MIN_PICTURES} different pictures, so none are held out and nothing is measured")
    if train.num_broken:
        parts.append(f"{train.num_broken} left out because they are broken")
    if others := ignored_entries(data):
        kinds = sorted({path.suffix or "folders and others" for path in others})
        parts.append(f"{len(others)} files are skipped ({', '.join(kinds)})")
    return "; ".join(parts)


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES and f.name[0] != "." and not f.is_dir())


def _in_folder(folder: Path) -> tuple[list[Pair], list[str]]:
    """Return the pairs in a folder and the problems with its captions."""
    pairs, problems = list[Pair](), list[str]()
    for path in _pictures_in(folder):
        caption = path.with_suffix(".txt")
        try:
            pairs.append((path, caption.read_text("utf-8-sig").strip()))
        except FileNotFoundError:
            problems.append(f"{path}: it has no caption file; write {caption.name}")
        except UnicodeDecodeError:
            problems.append(f"{caption}: the caption is not UTF-8; save it as UTF-8")
        except OSError as error:
            problems.append(f"{caption}: {error.strerror}")
    return pairs, problems


def _in_list(data: Path) -> tuple[list[Pair], list[str]]:
    """Return the pairs in a JSON list and the problems with its entries."""
    expected = 'a folder of pictures, or a JSON list of {"image_file": ..., "text": ...}'
    try:
        entries = json.loads(data.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{data}: {error.strerror}; give {expected}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{data}: the file is not UTF-8; give {expected}, saved as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{data}: not JSON ({error}); give {expected}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{data}: not a list; give {expected}")
    pairs, problems = list[Pair](), list[str]()
    for i, entry in enumerate(entries):
        values = {key: entry.get(key) for key in ("image_file", "text")} if isinstance(entry, dict) else {}
        file, text = values.get("image_file"), values.get("text")
        if isinstance(file, str) and isinstance(text, str) and "\0" not in file:
            pairs.append((data.parent / file, text))
        else:
            wrong = " and ".join(key for key in ("image_file", "text") if not isinstance(values.get(key), str))
            problems.append(f"entry {i}: {wrong or 'image_file'} must be a valid string: {json.dumps(entry)[:100]}")
    return pairs, problems


def _key(path: Path) -> int | str:
    """Return the key of a picture, or what is wrong with it."""
    try:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        content = path.read_bytes()
        if not content:
            raise ValueError(f"{path}: the file is empty")
        open_image(path)
    except (ValueError, OSError) as error:
        return str(error)
    return content_key(content)
