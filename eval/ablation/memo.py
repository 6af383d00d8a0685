"""Finished units of work, one safetensors file each.

A unit is plain data, and arrays with one row per drawing. For results/, `pack` joins the arrays of all units.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.files import replacing

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """A result. `value`: plain data. `made`: the commit and the processor it comes from. `arrays`: int16, one row per drawing."""

    value: Any
    made: dict[str, str]
    arrays: Arrays = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values()), ()))


@dataclass(frozen=True)
class Memo:
    """A folder of units. It belongs to one study, so a name is enough to identify a unit."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.unit.safetensors"

    def read(self, name: str) -> Unit:
        """Read a unit. Raises FileNotFoundError, and ValueError if the file is damaged."""
        path = self.path(name)
        try:
            with safe_open(path, "pt") as file:
                arrays = {key: file.get_tensor(key) for key in sorted(file.keys())}
                return Unit(**json.loads(file.metadata()["unit"]), arrays=arrays)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, so that it is computed again") from None

    def write(self, name: str, unit: Unit) -> None:
        with replacing(self.path(name)) as part:
            save_file(unit.arrays, part, {"unit": json.dumps({"value": unit.value, "made": unit.made})})

    def __call__(self, name: str, make: Callable[[], Unit]) -> Unit:
        """Return the stored unit, or make and store it."""
        if not self.path(name).exists():
            self.write(name, make())
        return self.read(name)

    def restore(self, units: Mapping[str, Unit]) -> None:
        """Store those units that are not there yet."""
        for name, unit in units.items():
            if not self.path(name).exists():
                self.write(name, unit)


def pack(units: Mapping[str, Unit]) -> tuple[dict[str, Any], Arrays]:
    """Return the plain data of all units, and their arrays, joined in this order."""
    data = {name: {"value": unit.value, "made": unit.made, "rows": unit.rows} for name, unit in units.items()}
    parts = [unit.arrays for unit in units.values() if unit.rows]
    return data, {key: torch.cat([arrays[key] for arrays in parts]) for key in (parts[0] if parts else ())}


def unpack(data: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Unit]:
    """Undo `pack`. Raises ValueError if the number of rows is not that of the units."""
    rows = [unit["rows"] for unit in data.values()]
    if any(len(array) != sum(rows) for array in arrays.values()):
        raise ValueError("the results file and the safetensors file beside it do not belong together: restore both from the same commit")
    parts = {key: array.split(rows) for key, array in arrays.items()}
    return {
        name: Unit(unit["value"], unit["made"], {key: part[i].clone() for key, part in parts.items()} if unit["rows"] else {})
        for i, (name, unit) in enumerate(data.items())
    }
