"""The clock of a run: how long it trained, how long its steps waited for data, and how many pictures it read per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROW = "seconds", "waiting", "pictures_per_second"  # what `row` returns


class Clock:
    """Counts from where a run was resumed. `before`: the seconds of training before that."""

    def __init__(self, before: float = 0.0) -> None:
        self.before, self.began = before, time.monotonic()
        self.busy, self.waited, self.pictures = 0.0, 0.0, 0

    def elapsed(self) -> float:
        """Return the seconds of training so far, including those before a restart."""
        return self.before + time.monotonic() - self.began

    @contextmanager
    def step(self, pictures: int) -> Iterator[None]:
        """Count the time of a step on so many pictures."""
        began = time.perf_counter()
        yield
        self.busy += time.perf_counter() - began
        self.pictures += pictures

    @contextmanager
    def waiting(self, idle: Callable[[], bool]) -> Iterator[None]:
        """Count the time in which a step waits for data, if the device is `idle` at the end: otherwise it still had work."""
        began = time.perf_counter()
        yield
        if idle():
            self.waited += time.perf_counter() - began

    def row(self) -> dict[str, float]:
        """Return `elapsed`, the share of the steps' time that they waited for data, and the pictures per second of the steps.

        Validation and saving do not count as steps. On a GPU, a step that is only started counts with the step that waits for it.
        """
        steps = {"waiting": self.waited / self.busy, "pictures_per_second": self.pictures / self.busy} if self.busy else {}
        return {"seconds": self.elapsed(), **steps}
