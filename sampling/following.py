"""Options that belong to the file named before them, as `--image` and `--scale` belong to an `--ip-adapter`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

_NOUNS = {"ip_adapter": "adapter", "control": "control", "lora": "LoRA"}  # the options that name such files


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Following(argparse.Action):
    """Store a value together with the number of `owner` flags before it."""

    owner = "ip_adapter"

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        before = len(getattr(args, self.owner, []))
        value = self.const if self.nargs == 0 else value
        setattr(args, self.dest, [*getattr(args, self.dest, []), (before, value)])


class FollowingControl(Following):
    """The same for `--control`."""

    owner = "control"


class FollowingLora(Following):
    """The same for `--lora`."""

    owner = "lora"


def following(
    given: dict[str, Any],
    names: Collection[str],
    owner: str,
    files: Sequence[Path],
    examples: str,
    repeated: Collection[str] = (),
) -> list[dict[str, list[Any]]]:
    """Take the options `names` out of `given`, and return those of each file in turn: {name: values}.

    One file takes them wherever they stand; of several, each takes those that follow it. Without a file there is one dict.
    Raises ValueError for an option that stands before several files, and for one that is given twice and not in `repeated`.
    """
    options = {name: given.pop(name) for name in names if name in given}
    several, found = len(files) > 1, []
    if several and any(before == 0 for values in options.values() for before, _ in values):
        raise ValueError(f"of several {flag(owner)}, each is followed by its own {examples}; none stands before")
    for place in range(1, max(1, len(files)) + 1):
        own = {name: [v for before, v in each if before == place or not several] for name, each in options.items()}
        own = {name: values for name, values in own.items() if values}
        if twice := [name for name, values in own.items() if len(values) > 1 and name not in repeated]:
            raise ValueError(f"{flag(twice[0])} is given twice for one {_NOUNS[owner]}")
        found.append(own)
    return found
