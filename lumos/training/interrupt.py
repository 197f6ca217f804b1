"""Being told to stop without losing work."""

from __future__ import annotations

import signal


class Interrupt:
    """While open, SIGTERM and SIGINT only set `name`; a second SIGINT interrupts at once.

    Outside the main thread Python allows no handlers, and nothing is caught.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self._set)
            except ValueError:
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: object) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
