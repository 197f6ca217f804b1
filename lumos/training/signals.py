"""Signals that ask a run to stop, so that it can save its work first."""

from __future__ import annotations

import os
import signal

import psutil


class Interrupt:
    """A context in which SIGTERM and SIGINT only set `name`, and a second SIGINT interrupts at once.

    The deepspeed command does not forward SIGTERM: it ends, and its processes go on. They see that
    their parent process has changed, and `name` becomes "a lost launcher". Outside the main thread
    Python allows no signal handlers, so no signal is caught there.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self.before: dict[int, object] = {}
        self.launcher = _launcher()

    @property
    def name(self) -> str | None:
        """The signal (or lost launcher) that asked the run to stop; None if none has."""
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
    """Return the process ids of deepspeed's launcher on this machine and of its parent process.

    The result is None if this process was not started by deepspeed's launcher.
    """
    try:
        parent = psutil.Process(os.getppid())
        return (parent.pid, parent.ppid()) if any("deepspeed.launcher" in word for word in parent.cmdline()) else None
    except psutil.Error:
        return None
