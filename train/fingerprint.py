"""Short hashes that identify the inputs of a result, weights and plain data, and a rounding that keeps them the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn


def fingerprint(module: nn.Module) -> str:
    """Hash a module's weights to eight hex digits."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def configuration(*modules: nn.Module) -> str:
    """Hash the configs of modules and of their parts, which say how the weights are used, to sixteen hex digits."""
    return digest([repr(part.config) for module in modules for part in module.modules() if hasattr(part, "config")])


def digest(data: Any) -> str:
    """Hash plain data, such as a list of captions or of other hashes, to sixteen hex digits."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def content_key(content: bytes) -> int:
    """Hash bytes to a signed integer of 64 bits, by which files are compared and their encodings are found."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def significant(x: float) -> float:
    """Round to four significant digits, as SD rounded its 0.18215 to five.

    A statistic measured on a GPU differs in the last bits each time. Weights that depend on the rounded number are the same when a
    finished stage runs again, so the states of later stages still fit.
    """
    return float(f"{x:.4g}")
