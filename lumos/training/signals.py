"""Being told to stop without losing work."""

from __future__ import annotations

import os
import signal

import psutil


class Interrupt:
    """While open, SIGTERM and SIGINT only set `name`; a second SIGINT interrupts at once.

    The deepspeed command passes no SIGTERM on: it ends and leaves its processes behind. They notice, as "a lost launcher".
    Outside the main thread Python allows no handlers, and nothing is caught.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self.before: dict[int, object] = {}
        self.launcher = _launcher()

    @property
    def name(self) -> str | None:
        """What told the run to stop."""
        if self._name is None and self.launcher is not None and self.launcher != _launcher():
            self._name = "a lost launcher"
        return self._name

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
        if self._name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name


def _launcher() -> tuple[int, int] | None:
    """Process ids of deepspeed's launcher on this machine and of the command that started it; None where there is none."""
    try:
        parent = psutil.Process(os.getppid())
        return (parent.pid, parent.ppid()) if any("deepspeed.launcher" in word for word in parent.cmdline()) else None
    except psutil.Error:
        return None
