"""Progress bars, and the logger "lumos" that carries the library's messages.

On a terminal a bar is that of tqdm. Elsewhere, as in the log file of a cluster, a line is printed each minute instead.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

LOGGER = logging.getLogger("lumos")
SECONDS_BETWEEN_LINES = 60.0
NOTEBOOK = "ipykernel"
"""The package of the streams of Jupyter, which say that they are no terminals."""


class ProgressLines(tqdm):
    """A progress bar that prints its state as a line each minute, and nothing before the first minute has passed."""

    def __init__(self, *args: Any, **options: Any):
        self.printed = time.monotonic()
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES:
            return False
        self.printed = now
        self.fp.write(f"{self}\n")
        self.fp.flush()
        return True

    def clear(self, *args: Any, **options: Any) -> None:
        """Do nothing, because a line that is printed stays."""

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """Return a progress bar on stderr, with the arguments of tqdm; no bar if the logger "lumos" is below WARNING (--quiet)."""
    file = options.setdefault("file", sys.stderr)
    if options.pop("disable", None) or not LOGGER.isEnabledFor(logging.WARNING) or file is None:
        return tqdm(*args, **{**options, "disable": True})
    if is_terminal(file):
        return tqdm(*args, **options)
    return ProgressLines(*args, **{**options, "mininterval": 1.0})


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal, or that of a notebook, which draws a bar as a terminal does.

    Programs without a console have None as stderr, or an object of their own.
    """
    return bool(getattr(stream, "isatty", bool)()) or type(stream).__module__.startswith(NOTEBOOK)


class BesideBars(logging.Handler):
    """A handler that prints messages on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):
            self.handleError(record)
