"""Kills of a function at chosen file calls or at chosen times, for scripts ("drivers") that have not started a thread yet.

The function runs in a process that is forked from the driver, so that a kill costs a fraction of a second. File calls are those
that Python audits: open, rename, remove, mkdir, truncate.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def share_forkserver(*preload: str) -> None:
    """Start the server from which worker processes are forked once for all, because its imports take seconds."""
    forkserver.set_forkserver_preload(list(preload))
    forkserver.ensure_running()


def forked(function: Callable[[], object], *, seconds: float | None = None) -> int:
    """Run `function` in a process of its own, killed after `seconds`; return its exit code, negative for a signal."""
    process = os.fork()
    if not process:
        forkserver._forkserver.ensure_running = lambda: None  # it runs, but is no child of this process
        try:
            code = function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)  # a process that has ended is still there until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def at_file_calls(folder: Path, do: Callable[[int, str], object]) -> None:
    """Have this process call `do(number, call)` just before each of its file calls in the folder; numbers count from 0.

    `call` names the kind of call and the file, with a star for the random part of the file's name.
    """
    numbers, inside = iter(range(10**9)), os.path.abspath(folder)

    def hook(event: str, arguments: tuple) -> None:
        if event in CALLS:
            paths = [os.path.abspath(os.fsdecode(path)) for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike))]
            for path in paths:
                if path.startswith(inside):
                    do(next(numbers), f"{event} {re.sub('[0-9a-f]{8,}', '*', path[len(inside):])}")
                    return

    sys.addaudithook(hook)


def file_calls(function: Callable[[], object], folder: Path) -> list[str]:
    """Return the file calls of the function in the folder."""
    log = folder.with_name(f"{folder.name}.calls")

    def logged() -> object:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        at_file_calls(folder, lambda _, call: os.write(descriptor, f"{call}\n".encode()))
        return function()

    assert forked(logged) == 0
    return log.read_text().splitlines()


def killed_at(function: Callable[[], object], folder: Path, call: int) -> int:
    """Run the function in a process that is killed just before its file call of this number; return the exit code."""

    def dying() -> object:
        at_file_calls(folder, lambda number, _: number == call and os.kill(os.getpid(), signal.SIGKILL))
        return function()

    return forked(dying)


def first_of_each(calls: list[str]) -> list[int]:
    """Return the numbers of the calls whose kind and file no earlier call has."""
    return [number for number, call in enumerate(calls) if call not in calls[:number]]


def spread(numbers: list[int], count: int) -> list[int]:
    """Return at most `count` of the numbers, evenly spaced, with the first and the last."""
    if len(numbers) <= count:
        return numbers
    return [numbers[n * (len(numbers) - 1) // (count - 1)] for n in range(count)]
