"""Time of whole processes: commands of the command line as a user starts them, alone or beside a busy process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lumos.errors import RunError, UserError
from lumos.threads import COUNT_VARIABLES, OWN_VARIABLE, PASSIVE

SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(1_000_000): pass"
"""Keeps a core busy until the process that started it has ended, even if that was killed and could not end this one."""


@dataclass(frozen=True)
class Spent:
    """The time that a process took: seconds by the clock, and CPU seconds of its threads and of its child processes."""

    seconds: float
    cpu_seconds: float


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of this process without settings of threads, with the given variables, and with Lumos importable.

    This process may have made settings of threads for itself, which its children would inherit. PYTHONDONTWRITEBYTECODE is left
    out too, because with it every process would compile modules that an installed Lumos has compiled.
    """
    ours = {OWN_VARIABLE, *COUNT_VARIABLES, *PASSIVE, "PYTHONDONTWRITEBYTECODE"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path} | variables


def timed_process(command: Sequence[str], env: Mapping[str, str], what: str) -> Spent:
    """Run Python with the arguments `command` and return what the process took; RunError with its last line if it fails."""
    try:
        import resource
    except ImportError as error:
        raise UserError("CPU seconds of processes are measured on Linux and macOS only") from error
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")
        raise RunError(f"measuring {what} failed: {reason}")
    return Spent(seconds, sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime")))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within the block, run `count` other processes, each of which keeps a core busy."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", SPIN, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
