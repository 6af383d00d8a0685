"""Cache finished results in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from checkpoints.files import read_json, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Memo:
    """A folder with a JSON file {key, value} for each result."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def __call__(self, name: str, key: dict[str, Any], make: Callable[[], T]) -> T:
        """Return the cached value if its key is the same; otherwise call make() and cache its result."""
        if self.path(name).exists() and (entry := read_json(self.path(name)))["key"] == as_json(key):
            return cast(T, entry["value"])
        value = make()
        write_json(self.path(name), {"key": key, "value": value})
        return value

    def restore(self, entries: Mapping[str, Any]) -> None:
        """Write those entries, for example from a results file, that are not cached yet."""
        for name in entries:
            if not self.path(name).exists():
                write_json(self.path(name), entries[name])


def as_json(data: dict[str, Any]) -> dict[str, Any]:
    """Convert data as a round trip through JSON does: tuples become lists."""
    return dict(json.loads(json.dumps(data)))
