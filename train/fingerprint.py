"""Short hashes that identify the inputs of a result: weights and plain data."""

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


def digest(data: Any) -> str:
    """Hash plain data, such as a list of captions or of other hashes, to sixteen hex digits."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
