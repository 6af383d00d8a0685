"""A user's pictures and captions: read, checked as a whole before anything is computed, and some of them held out."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sampling.images import open_image

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
LEAST = 20  # with fewer different pictures none is held out
LISTED = 100  # problems, at most
Pair = tuple[Path, str]


@dataclass(frozen=True)
class Captioned:
    """A picture file, its caption, and the hash of the file's bytes."""

    path: Path
    text: str
    digest: str


def captioned_files(data: Path) -> list[Captioned]:
    """The pictures and captions of a user's data, all of them opened and checked.

    `data` is a folder of pictures with a `.txt` beside each, or the official trainer's JSON list
    `[{"image_file": ..., "text": ...}]` with paths relative to the file. Captions are UTF-8. Raises ValueError with a list of
    everything that is wrong.
    """
    pairs, problems = _in_folder(data) if data.is_dir() else _in_list(data)
    if not pairs and not problems:
        raise ValueError(f"{data}: there are no pictures in it")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = list(pool.map(_hash, [path for path, _ in pairs]))
    problems += dict.fromkeys(problem for _, problem in checked if problem)
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        what = f"{data}: mend or remove these before training ({len(problems)} found)"
        raise ValueError("\n  ".join([what, *problems[:LISTED], *more]))
    return [Captioned(path, text, digest) for (path, text), (digest, _) in zip(pairs, checked, strict=True)]


def skipped(data: Path) -> list[Path]:
    """What is in a folder of pictures and is not read: other files, folders, hidden ones, captions without a picture."""
    if not data.is_dir():
        return []
    pictures = set(_pictures_in(data))
    captions = {path.with_suffix(".txt") for path in pictures}
    return sorted(path for path in data.iterdir() if path not in pictures | captions)


def split(files: list[Captioned]) -> tuple[list[Captioned], list[Captioned]]:
    """(to train on, held out): of n >= 20 different pictures a twentieth, at least 4, is held out; of fewer, none.

    Pictures are told apart by content, so a copy of a held-out picture is not trained on either; it is left out. Which ones
    are held out depends on their content alone, and hardly changes when others are added.
    """
    different = sorted({file.digest for file in files})
    if len(different) < LEAST:
        return files, []
    out = set(different[: max(4, len(different) // 20)])
    first = {file.digest: file for file in reversed(files) if file.digest in out}
    return [file for file in files if file.digest not in out], [first[digest] for digest in sorted(out)]


def summary(data: Path, train: list[Captioned], held_out: list[Captioned]) -> str:
    """What is read of a user's data, and what is not."""
    parts = [f"{data}: {len(train)} pictures to train on, {len(held_out)} held out to measure whether the adapter learns"]
    if not held_out:
        parts.append(f"fewer than {LEAST} different pictures: none is held out, so nothing is measured")
    if others := skipped(data):
        kinds = sorted({path.suffix or "folders and others" for path in others})
        parts.append(f"{len(others)} files are skipped ({', '.join(kinds)})")
    return "; ".join(parts)


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES and f.name[0] != "." and f.is_file())


def _in_folder(folder: Path) -> tuple[list[Pair], list[str]]:
    """The pairs of a folder, and what is wrong with its captions."""
    pairs, problems = list[Pair](), list[str]()
    for path in _pictures_in(folder):
        caption = path.with_suffix(".txt")
        try:
            pairs.append((path, caption.read_text("utf-8-sig").strip()))
        except FileNotFoundError:
            problems.append(f"{path}: there is no caption beside it, {caption.name}")
        except UnicodeDecodeError:
            problems.append(f"{caption}: the caption is not UTF-8; save it as UTF-8")
        except OSError as error:
            problems.append(f"{caption}: {error.strerror}")
    return pairs, problems


def _in_list(data: Path) -> tuple[list[Pair], list[str]]:
    """The pairs of a JSON list, and which of its entries are wrong."""
    wanted = 'a folder of pictures, or a JSON list of {"image_file": ..., "text": ...}'
    try:
        entries = json.loads(data.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{data}: {error.strerror}; name {wanted}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{data}: the file is not UTF-8; name {wanted}, saved as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{data}: not JSON ({error}); name {wanted}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{data}: not a list; name {wanted}")
    pairs, problems = list[Pair](), list[str]()
    for i, entry in enumerate(entries):
        found = {key: entry.get(key) for key in ("image_file", "text")} if isinstance(entry, dict) else {}
        file, text = found.get("image_file"), found.get("text")
        if isinstance(file, str) and isinstance(text, str) and "\0" not in file:
            pairs.append((data.parent / file, text))
        else:
            wrong = " and ".join(key for key in ("image_file", "text") if not isinstance(found.get(key), str))
            problems.append(f"entry {i}: {wrong or 'image_file'} is not a text: {json.dumps(entry)[:100]}")
    return pairs, problems


def _hash(path: Path) -> tuple[str, str]:
    """(hash of a picture's bytes, what is wrong with it)."""
    try:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        content = path.read_bytes()
        if not content:
            raise ValueError(f"{path}: the file is empty")
        open_image(path)
    except (ValueError, OSError) as error:
        return "", str(error)
    return hashlib.sha256(content).hexdigest()[:32], ""
