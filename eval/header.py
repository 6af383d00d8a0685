"""The first entries of a results file: how the results were computed, and with which weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints.files import sha256
from eval.device import dtype


def header(command: str, weights: Path, n: int, steps: int, guidance: float, device: str) -> dict[str, Any]:
    """Return `command`, `settings` and `sha256` of the results of `python -m eval COMMAND` with n prompts, seeds 0 .. n-1."""
    return {
        "command": f"python -m eval {command} --n {n} --steps {steps} --guidance {guidance:g} --device {device}",
        "settings": {"n": n, "steps": steps, "guidance": guidance, "dtype": dtype(device), "seeds": f"0..{n - 1}"},
        "sha256": hashes(weights),
    }


def hashes(weights: Path) -> dict[str, str]:
    """Hash all weights in a folder."""
    return {path.name: sha256(path) for path in sorted(weights.glob("*.safetensors"))}
