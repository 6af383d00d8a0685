"""The card written beside a file of weights: how they were trained, and under which licence they come."""

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
from train.plan import Plan

WORLD_LICENCE = "CC BY-SA 4.0, trained on drawings by OpenMoji (https://openmoji.org)"
ROOT = Path(__file__).parent.parent


def card(
    phases: tuple[Plan, ...], log: list[dict[str, Any]], command: str, details: Mapping[str, Any], licence: str | None
) -> dict[str, Any]:
    """Record the command, `details` such as data and base, the settings of each phase, the last validation, and the versions.

    Pass None for `licence` if it is unknown: the licence of weights depends on the data.
    """
    results: dict[str, Any] = next((row for row in reversed(log) if "seconds" in row), {})
    content = {"command": command, **details, "settings": [asdict(plan) for plan in phases], "results": results}
    content |= {"code": code_version(), "torch": torch.__version__}
    return content if licence is None else content | {"licence": licence}


def code_version() -> str:
    """Return the commit of this repository, with "-dirty" if a Python file was changed, or the version of the installed package."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == ROOT.resolve():  # ignore a repository that merely contains the project
            return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return metadata.version("ip-adapter-from-scratch")
    except metadata.PackageNotFoundError:
        return "unknown"


def check_free(file: Path, made_from: dict[str, Any], phases: Sequence[Plan], state: Path) -> None:
    """Raise FileExistsError if another run wrote `file`, so that no result is overwritten.

    A file without a card belongs to this run if this run has a saved state: the run stopped between writing the two.
    """
    card, own = file.with_suffix(".json"), (made_from, json.loads(json.dumps([*map(asdict, phases)])))
    if not file.exists() or (state.exists() and not card.exists()):
        return
    content = read_json(card) if card.exists() else {}
    if (content.get("made_from"), content.get("settings")) != own:
        raise FileExistsError(f"{file} was written by another run: choose another folder with --weights, or remove it")
