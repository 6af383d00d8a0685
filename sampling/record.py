"""The record of a drawing in its PNG, and `--again`, which finds the same files to draw it again.

A record is {"request": ..., "model": ..., "sha256": {file: hash}}. It names files as the user did, except that a shipped
file is "ip-adapter:weights/..." and the home folder is "~". A record may come from anyone, so nothing in it is trusted, and a
file is used only if it has the recorded hash.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from checkpoints import files
from checkpoints.lora import peft_config
from checkpoints.lora_names import CONFIG
from checkpoints.reader import File
from sampling.fields import from_json, map_paths, paths, to_json
from sampling.images import read_settings
from sampling.loading import prompt_files
from sampling.options import PROMPT
from sampling.request import ImagePrompt, Model, Request

ROOT = Path(__file__).parent.parent
SHIPPED = "ip-adapter:"
BESIDE = (".json", ".yaml", ".yml")  # settings that a file of weights has beside it
FOLDERS = ("weights", "sampling/examples", "results")  # of shipped files


def stored_name(path: Path) -> str:
    """Return the name under which a record stores a file or folder."""
    full = Path(os.path.abspath(path))
    if any(full.is_relative_to(ROOT / folder) for folder in FOLDERS):
        return SHIPPED + full.relative_to(ROOT).as_posix()
    home = Path(os.path.expanduser("~"))  # stays "~" where there is none
    if path.is_absolute() and full.is_relative_to(home):
        return f"~/{full.relative_to(home).as_posix()}"
    return path.as_posix()


def sha256(path: Path) -> str:
    """Return the hash of a regular file. Raises ValueError for anything else, because reading a device might never end."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _sha256(path: Path, size: int, mtime: int) -> str:
    return files.sha256(path)


def used_files(request: Request, model: Model) -> list[Path]:
    """List every file that affects the picture: weights with their configs, and the pictures, embeddings and masks of the request."""
    base = [model.checkpoint]
    if (model.checkpoint / "unet.safetensors").exists():
        parts = ("unet", "text_encoder") if model.vae else ("unet", "vae", "text_encoder")
        base = [model.checkpoint / f"{part}.safetensors" for part in parts]
    base += [model.vae] if model.vae else []
    if request.image_prompts or model.adapters or model.image_encoder:  # an adapter may hold a LoRA, so that it acts without a picture
        adapters, encoder = prompt_files(model.checkpoint, model.adapters or None, model.image_encoder)
        base += [*adapters, *([encoder] if encoder else [])]
    base += [*model.controls, *(lora.path for lora in model.loras)]
    settings = [config for lora in model.loras if lora.path.is_file() and (config := peft_config(File(lora.path)))]
    return [*(file for path in base for file in files.files_of(path)), *settings, *paths(request)]


def digests(request: Request, model: Model) -> dict[str, str]:
    """Return the hash of each of `used_files`, by its stored name."""
    return {stored_name(path): sha256(path) for path in used_files(request, model)}


def record(request: Request, model: Model, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the record that `save_image` writes into a picture. `hashes`: the result of `digests`."""
    settings = [to_json(map_paths(item, lambda path: Path(stored_name(path)))) for item in (request, model)]
    return {"request": settings[0], "model": settings[1], "sha256": dict(hashes)}


def recall(picture: Path) -> tuple[Request, Model]:
    """Read the request and the model from a picture that this program drew; find every file and compare its hash.

    Raises ValueError if the picture stores no request, or if a file is missing or has changed.
    """
    settings = read_settings(picture)
    hashes = settings.get("sha256")
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise ValueError(f"{picture} stores no request (sheets do not), so it can't be drawn again")
    try:
        request, model = _read(settings)
    except ValueError as error:
        raise ValueError(f"{picture} can't be drawn again: {error}") from None

    def find(path: Path) -> Path:
        return _find(path, picture, hashes)

    request, model = map_paths(request, find), map_paths(model, find)
    for path in used_files(request, model):  # including an adapter that the user did not name
        if sha256(path) not in hashes.values():
            raise ValueError(f"{picture} does not say which {path} it was drawn with, so it can't be drawn again")
    return request, model


def _read(settings: Mapping[str, Any]) -> tuple[Request, Model]:
    if "request" not in settings:
        return _from_arguments(settings.get("arguments"))
    return from_json(Request, settings.get("request")), from_json(Model, settings.get("model"))


def _from_arguments(arguments: object) -> tuple[Request, Model]:
    """Read a record of the first format, which stored the arguments of the command line."""
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are not a JSON object")
    values = {key: value for key, value in arguments.items() if key not in ("num", "device", "compile", "no_paste")}
    adapters = values.pop("ip_adapter", None)
    several = isinstance(adapters, list)
    options = {PROMPT[name]: values.pop(name) for name in PROMPT if name in values}
    if several and not all(isinstance(each, list) and len(each) == len(adapters) for each in options.values()):
        raise ValueError("its numbers of image prompts and adapters differ")
    each = [{name: value[i] for name, value in options.items()} for i in range(len(adapters))] if several else [options]
    prompts = tuple(
        from_json(ImagePrompt, {name: value for name, value in one.items() if value is not None})
        for one in each
        if one.get("images")
    )
    model = {name: values.pop(name) for name in ("checkpoint", "image_encoder", "dtype") if name in values}
    model["adapters"] = adapters if several else [adapters] * (adapters is not None)
    paste = {} if arguments.get("no_paste") is None else {"paste": arguments["no_paste"] is False}
    request = {"version": 1, "image_prompts": prompts, **values, **paste}
    return from_json(Request, request), from_json(Model, model)


def _find(path: Path, picture: Path, hashes: Mapping[str, str]) -> Path:
    """Find the file or folder that a record names: at `path`, beside the picture, in the current folder, or among the shipped files.

    Raises ValueError unless all its parts have the recorded hashes.
    """
    name = path.as_posix()
    parts = _parts(name, hashes)
    if not parts:
        raise ValueError(f"{picture} does not say which {name} it was drawn with, so it can't be drawn again")
    place = ROOT / name.removeprefix(SHIPPED) if name.startswith(SHIPPED) else Path(os.path.expanduser(name))
    folders = [picture.parent, Path.cwd(), ROOT, ROOT / "sampling" / "examples"]
    places = [place, *(folder / each for folder in folders for each in (name, path.name))]
    alike = (other for folder in folders for other in sorted(folder.iterdir()) if other.suffix == path.suffix)
    for candidate in chain(places, alike):
        if _changed_part(candidate, parts) is None:
            return candidate
    nearest = next((candidate for candidate in places if candidate.exists()), place)
    rest = _changed_part(nearest, parts) or ""
    part = _part(path, rest).as_posix()
    if _part(nearest, rest).exists():
        raise ValueError(f"{picture} was drawn with another {part}: the file has changed since")
    raise ValueError(f"{picture} was drawn with {part}, which is not there: put it beside the picture")


def _parts(name: str, hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the recorded hashes of a file and the settings beside it, or of the files in a folder, by the rest of their names."""
    parts = {key.removeprefix(name): h for key, h in hashes.items() if key == name or key.startswith(f"{name}/")}
    stem = os.path.splitext(name)[0]
    if (config := Path(name).with_name(CONFIG).as_posix()) in hashes:  # of a LoRA
        parts |= {CONFIG: hashes[config]} if name in hashes else {}
    return parts | {end: hashes[stem + end] for end in BESIDE if name in hashes and stem + end in hashes}


def _part(path: Path, rest: str) -> Path:
    if rest == CONFIG:
        return path.with_name(rest)
    return path.with_suffix(rest) if rest in BESIDE else path / rest[1:] if rest else path


def _changed_part(path: Path, parts: Mapping[str, str]) -> str | None:
    """Return the first part that is missing or has changed, or None."""
    for rest, digest in parts.items():
        part = _part(path, rest)
        if not part.is_file() or sha256(part) != digest:
            return rest
    return None
