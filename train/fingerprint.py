"""Short hashes of what a result was made from: weights, files, plain data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn


def fingerprint(module: nn.Module) -> str:
    """Eight hex digits that change when a module's weights do."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def digest(data: Any) -> str:
    """Sixteen hex digits of plain data, such as a list of captions or of other hashes."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
