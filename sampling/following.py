"""Options that apply to the file named before them, such as `--image` and `--scale` to an `--ip-adapter`."""

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

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, option: str | None = None) -> None:
        before = len(getattr(args, self.owner, []))
        value = self.const if self.nargs == 0 else value
        setattr(args, self.dest, [*getattr(args, self.dest, []), (before, value)])


class FollowingControl(Following):
    """As Following, for `--control`."""

    owner = "control"


class FollowingLora(Following):
    """The same for `--lora`."""

    owner = "lora"


def options_by_file(
    arguments: dict[str, Any],
    names: Collection[str],
    owner: str,
    files: Sequence[Path],
    examples: str,
    repeatable: Collection[str] = (),
) -> list[dict[str, list[Any]]]:
    """Take the options `names` out of `arguments`. Return the options of each file, in order, as {name: values}.

    A single file gets all of them, wherever they are given. If there are several files, each gets the options that follow it.
    Without files, return one dict. Raises ValueError if an option is given before the first of several files, or if one that is
    not in `repeatable` is given twice for a file.
    """
    options = {name: arguments.pop(name) for name in names if name in arguments}
    several, by_file = len(files) > 1, []
    if several and any(before == 0 for values in options.values() for before, _ in values):
        raise ValueError(f"with several {flag(owner)}, give each its own {examples} after it, none before the first")
    for number in range(1, max(1, len(files)) + 1):
        own = {name: [v for before, v in each if before == number or not several] for name, each in options.items()}
        own = {name: values for name, values in own.items() if values}
        if twice := [name for name, values in own.items() if len(values) > 1 and name not in repeatable]:
            raise ValueError(f"{flag(twice[0])} is given twice for one {_NOUNS[owner]}")
        by_file.append(own)
    return by_file
