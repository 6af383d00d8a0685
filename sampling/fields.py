"""Frozen dataclasses that check the types of their fields, and turn into JSON and back. Nothing here imports torch."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MOST_PIXELS = 1 << 24  # 4096 x 4096
LIMIT = 1e4  # largest magnitude of lambda, a guidance weight or a picture's weight: beyond it float16 and the networks overflow

Preset = Literal["style", "layout", "finest"]
Layers = str | tuple[float, ...] | dict[str, Any]  # as `sampling.layer_weights` reads them
T = TypeVar("T")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as a command line that is not UTF-8 leaves it


def settle(item: Any) -> None:
    """Check the type of every field of a frozen dataclass, and convert it."""
    hints = get_type_hints(type(item))
    for field in fields(item):
        object.__setattr__(item, field.name, _read(hints[field.name], getattr(item, field.name), field.name))


def _read(kind: Any, value: object, name: str) -> Any:
    """Convert `value` to `kind`, the type of the field `name`. Raises ValueError that names the field."""
    if kind == Layers | None:
        return None if value is None else _layers(value, name)
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _read(next(k for k in get_args(kind) if k is not NoneType), value, name)
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_read(get_args(kind)[0], each, name) for each in values)
    if is_dataclass(kind):
        return value if isinstance(value, kind) else from_json(kind, value)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        return _check(value, value in get_args(kind), name, f"one of {', '.join(get_args(kind))}")
    if kind is float:
        return check_number(value, name)
    if kind is int:
        return _check(value, isinstance(value, int) and not isinstance(value, bool), name, "a whole number")
    if kind is Path:
        return Path(_check(value, isinstance(value, str | Path), name, "the name of a file"))  # type: ignore[arg-type]
    if kind is bool:
        return _check(value, isinstance(value, bool), name, "true or false")
    return _check(value, isinstance(value, str) and not _SURROGATE.search(value), name, "text")


def _check(value: object, right: bool, name: str, expected: str) -> object:
    if not right:
        raise ValueError(f"{name} must be {expected}, not {reprlib.repr(value)}")
    return value


def check_number(value: object, name: str) -> float:
    """Return a number as a float. Raises ValueError, with the field's name, if it is not finite or its magnitude exceeds LIMIT."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LIMIT  # False for NaN
    return float(_check(value, right, name, f"a number between {-LIMIT:g} and {LIMIT:g}"))  # type: ignore[arg-type]


def _layers(value: object, name: str) -> Any:
    """Read a preset's name, a weight for each layer, or diffusers' blocks: {"up": {"block_1": [0, 1, 0]}, "mid": 1}."""
    if not isinstance(value, Mapping | list | tuple):
        return str(_check(value, value in get_args(Preset), name, f"{', '.join(get_args(Preset))}, or weights in JSON"))

    def weights(each: object, depth: int) -> Any:
        if isinstance(each, Mapping) and depth:
            return {_read(str, key, name): weights(inner, depth - 1) for key, inner in each.items()}
        return tuple(check_number(one, name) for one in each) if isinstance(each, list | tuple) else check_number(each, name)

    return weights(value, 2)


def to_json(item: object) -> Any:
    """Convert to plain values for `json.dumps`: a dataclass becomes an object (with its VERSION), a Path a string, a tuple a list."""
    if is_dataclass(item):
        return _version(type(item)) | {field.name: to_json(getattr(item, field.name)) for field in fields(item)}
    if isinstance(item, Mapping):
        return {key: to_json(value) for key, value in item.items()}
    if isinstance(item, tuple):
        return [to_json(value) for value in item]
    return item.as_posix() if isinstance(item, Path) else item


def from_json(kind: type[T], data: object) -> T:
    """Build a dataclass from the result of `to_json`; missing fields take their defaults.

    Treats `data` as untrusted: raises ValueError where it is anything else.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} must be a JSON object, not {reprlib.repr(data)}")
    values = dict(data)
    if current := _version(kind):
        version = values.pop("version", None)
        if version not in range(1, current["version"] + 1):
            raise ValueError(f"a request of version {reprlib.repr(version)}; this program reads up to version {current['version']}")
    settings = {field.name: field.default is MISSING for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in settings]:
        raise ValueError(f"{kind.__name__} has no setting {reprlib.repr(unknown[0])}: another version wrote it")
    if missing := [name for name, required in settings.items() if required and name not in values]:
        raise ValueError(f"{kind.__name__} needs {missing[0]}")
    return kind(**values)


def _version(kind: type) -> dict[str, int]:
    """Return the version to write with a dataclass that has one."""
    return {"version": kind.VERSION} if hasattr(kind, "VERSION") else {}


def map_paths(item: T, change: Callable[[Path], Path]) -> T:
    """Apply `change` to every path in a dataclass."""

    def apply(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(apply(each) for each in value)
        if is_dataclass(value):
            return map_paths(value, change)
        return change(value) if isinstance(value, Path) else value

    return replace(item, **{field.name: apply(getattr(item, field.name)) for field in fields(item)})  # type: ignore


def paths(item: object) -> list[Path]:
    """List every path in a dataclass."""
    result: list[Path] = []

    def keep(path: Path) -> Path:
        result.append(path)
        return path

    map_paths(item, keep)
    return result


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed outside the range of torch's generators."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"the seed must be a whole number from -2^63 to 2^64 - 1, not {reprlib.repr(seed)}")


def check_eta(eta: float, sampler: str, takes: bool) -> None:
    """Raise ValueError unless eta is in [0, 1], and 0 for a sampler that does not take it."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (DDIM) and 1 (DDPM), not {eta}")
    if eta and not takes:
        raise ValueError(f"eta works only with DDIM: with {sampler} it must be 0, not {eta}")


def inside(step: int, steps: int, start: float, end: float) -> bool:
    """Return whether step i of n (i from 0) is inside a range: start <= i / n and (i + 1) / n <= end."""
    return start <= step / steps and (step + 1) / steps <= end


def check_range(option: str, start: float, end: float, steps: int) -> None:
    """Raise ValueError if none of the steps that run is inside the range of `option`-start and `option`-end."""
    first = int(start * steps)  # this step, or the next one, is the first that starts in the range
    if steps > 0 and not any(inside(step, steps, start, end) for step in (first, first + 1)):
        between = f"{option}-start {start:g} and {option}-end {end:g}"
        raise ValueError(f"between {between} there is no whole step of {steps}: widen the range, or increase --steps")


def check_size(width: int, height: int) -> None:
    """Raise ValueError for more than MOST_PIXELS pixels, before memory is allocated."""
    if abs(width * height) > MOST_PIXELS:
        size = f"{reprlib.repr(width)} x {reprlib.repr(height)}"
        raise ValueError(f"{size} is too large: a picture has at most {MOST_PIXELS:,} pixels (4096 x 4096)")
