"""Finished work, kept in files so that nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from checkpoints.files import read_json, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Memo:
    """A folder with a JSON file {key, value} for each result; keys and values are what JSON can hold."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def __call__(self, name: str, key: dict[str, Any], make: Callable[[], T]) -> T:
        """make(), or what it returned when it was last called with the same key."""
        if self.path(name).exists() and (entry := read_json(self.path(name)))["key"] == as_json(key):
            value: T = entry["value"]
            return value
        value = make()
        write_json(self.path(name), {"key": key, "value": value})
        return value

    def restore(self, entries: Mapping[str, Any]) -> None:
        """Write the entries that are not there, such as those of a results file."""
        for name in entries:
            if not self.path(name).exists():
                write_json(self.path(name), entries[name])


def as_json(data: dict[str, Any]) -> dict[str, Any]:
    """The data as JSON returns it, with lists in place of tuples."""
    return dict(json.loads(json.dumps(data)))
