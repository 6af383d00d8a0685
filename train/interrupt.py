"""Ctrl-C and SIGTERM as a number that a loop reads between its steps."""

from __future__ import annotations

import signal


class Interrupt:
    """Inside `with`, Ctrl-C and SIGTERM only set `signal_number`, which the loop reads between steps."""

    signal_number = 0

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.signal_number = number
