"""How a training ends early. (This file imports nothing, so that the command line can name these without loading torch.)"""

from __future__ import annotations

from pathlib import Path


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended a run, after its state was saved. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite. The weights are as they were before that step."""


class GateError(RuntimeError):
    """Training would not do what it should: a gradient is missing, or reaches what must stay frozen."""


class OtherRun(ValueError):
    """The state was made from something else."""


class Damaged(ValueError):
    """The state cannot be read."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged ({why}): remove it, and this part of the training starts again")
