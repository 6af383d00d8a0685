"""Exceptions that end a training early. This file does not import torch, so that the command line starts quickly."""

from __future__ import annotations

from pathlib import Path


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped a run after its state was saved. `number` is the signal number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite. The weights keep their values from before the step."""


class GateError(RuntimeError):
    """A check before training failed: a trainable tensor gets no gradient, or a frozen one does."""


class OtherRun(ValueError):
    """The saved state belongs to a run with other inputs or settings."""


class DamagedState(ValueError):
    """The saved state cannot be read."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged ({why}): remove it to restart this part of the training")
