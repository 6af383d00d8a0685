"""The card that is written beside weights: how they were made, and what is known of their licence."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import read_json
from train.loop import Plan

WORLD_LICENCE = "CC BY-SA 4.0, trained on drawings by OpenMoji (https://openmoji.org)"
ROOT = Path(__file__).parent.parent


def card(
    phases: tuple[Plan, ...], log: list[dict[str, Any]], command: str, about: Mapping[str, Any], licence: str | None
) -> dict[str, Any]:
    """The true command, what the weights were made from, the settings of each phase, the last validation, and the versions.

    `about` says what else is known, such as data and base. `licence` is None where it is not known: the licence of weights
    depends on their data.
    """
    results: dict[str, Any] = next((row for row in reversed(log) if "seconds" in row), {})
    written = {"command": command, **about, "settings": [asdict(plan) for plan in phases], "results": results}
    written |= {"code": code_version(), "torch": torch.__version__}
    return written if licence is None else written | {"licence": licence}


def code_version() -> str:
    """The commit of this repository, with "-dirty" when files were changed; else the version of the installed package."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == ROOT.resolve():  # not of a repository that the project lies in
            return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return metadata.version("ip-adapter-from-scratch")
    except metadata.PackageNotFoundError:
        return "unknown"


def check_free(file: Path, made_from: dict[str, Any], phases: Sequence[Plan], state: Path) -> None:
    """Raises FileExistsError when `file` is there from another run, so that a user's result is not overwritten.

    Without its card it is this run's own if this run has a state: it was stopped between the two.
    """
    card, own = file.with_suffix(".json"), (made_from, json.loads(json.dumps([*map(asdict, phases)])))
    if not file.exists() or (state.exists() and not card.exists()):
        return
    found = read_json(card) if card.exists() else {}
    if (found.get("made_from"), found.get("settings")) != own:
        raise FileExistsError(f"{file} is there, from another run: name another folder with --weights, or remove it")
