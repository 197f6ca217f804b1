"""CPU threads of this process: how many it uses, how they wait for each other, and whether they get the cores they need.

torch computes with OpenMP. Its default is a thread for each core, and a thread that waits for the others spins. On a machine that
does anything else, the spinning threads take the cores from those that work, and a clip can take twenty times as long.
OpenMP reads its settings from the environment when torch is imported, so `prepare_process` must run before that.
This module imports no torch unless a function says so.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lumos.errors import UserError, shown
from lumos.progress import LOGGER

MAX_THREADS = 1024
OWN_VARIABLE = "LUMOS_THREADS"
MKL = "MKL_NUM_THREADS"
COUNT_VARIABLES = ("OMP_NUM_THREADS", MKL)
"""Environment variables of the number of threads, which torch's libraries read; the first that is set counts."""
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Settings with which a waiting thread sleeps: of every OpenMP runtime, of GCC's (in torch for Linux), of LLVM's and Intel's."""
LOOKS = 5
"""Looks at the number of running threads, a hundredth of a second apart."""
WATCH_SECONDS = 10.0
"""Seconds between two looks at the waiting times of the threads."""


@dataclass(frozen=True)
class Machine:
    """The cores that this process may use, and the load of other processes.

    allowed  cores of the affinity mask
    quota    cores' worth of time that the control groups allow; inf: no limit
    load     threads of other programs that run or want to run
    cores    cores of the machine
    """

    allowed: int
    quota: float
    load: float
    cores: int

    @classmethod
    def now(cls, root: Path = Path("/")) -> Machine:
        """Return the present state of this machine, by the files /proc and /sys below `root`."""
        cores = os.cpu_count() or 1
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        return cls(allowed, quota(root), load(root), cores)

    def free_threads(self) -> int:
        """Return how many threads find a free core: at least 1, at most the allowed cores and the whole cores of the quota.

        The load is assumed to lie on all cores alike.
        """
        left = self.allowed * (1 - self.load / max(self.cores, self.allowed))
        return max(1, math.floor(min(self.allowed, self.quota, left + 0.5)))


def quota(root: Path = Path("/")) -> float:
    """Return the cores' worth of CPU time that the control groups of this process allow, versions 1 and 2; inf: no limit.

    A group has at most what the groups above it have. A container may see its own group as the root.
    """
    found = [math.inf]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mounts = ("", "unified")
        elif "cpu" in controllers.split(","):
            mounts = ("cpu", controllers)
        else:
            continue
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            inner = top / path.lstrip("/")
            groups = [inner, *(parent for parent in inner.parents if parent.is_relative_to(top))]
            found += [_quota_of(group) for group in groups]
    return min(found)


def _quota_of(group: Path) -> float:
    """Return the quota that the files of one control group set: cpu.max, or cpu.cfs_quota_us and cpu.cfs_period_us."""
    words = " ".join(_lines(group / "cpu.max")[:1]).split()
    if not words:
        words = [" ".join(_lines(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period")]
    try:
        time, period = map(int, words)
    except ValueError:  # "max", or no such files
        return math.inf
    return time / period if time > 0 and period > 0 else math.inf


def load(root: Path = Path("/"), pause: Callable[[float], None] = time.sleep) -> float:
    """Return how many threads of other programs run or want to run; 0 where the system does not say.

    On Linux it is the median of a few looks at the number of running threads. The load average of the last minute counts only
    elsewhere: it still holds the last command of the same user, and does not hold a job that has just begun.
    """
    if not (root / "proc").is_dir():
        with suppress(AttributeError, OSError):
            return os.getloadavg()[0]
        return 0.0
    seen = []
    for look in range(LOOKS):
        if look:
            pause(0.01)
        words = " ".join(_lines(root / "proc/loadavg")).split()
        running = words[3].partition("/")[0] if len(words) > 3 else ""
        seen.append(max(0, int(running) - 1) if running.isdecimal() else 0)  # this thread is one of them
    return float(statistics.median(seen))


def _lines(path: Path) -> list[str]:
    """Return the lines of a file, [] if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def processes_here(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many processes of this run are on this machine, as torchrun, deepspeed or mpirun say."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE"):
        if (text := environ.get(name, "")).isdecimal() and int(text):
            return int(text)
    return 1


def checked(count: int, name: str) -> int:
    """Return a number of threads; raise UserError if it is not 1 to MAX_THREADS. `name` is the option that gave it."""
    if not 1 <= count <= MAX_THREADS:
        allowed = "at least 1" if count < 1 else f"at most {MAX_THREADS:,}"
        raise UserError(f"{name} {shown(count)} is not allowed; give {allowed}")
    return count


def given_count(asked: int | None, environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of threads that the user gave: `asked` (--threads), else LUMOS_THREADS; None: neither is given.

    Raise UserError for a number that is not allowed.
    """
    if asked is not None:
        return checked(asked, "--threads")
    if text := environ.get(OWN_VARIABLE, "").strip():
        if not text.lstrip("-").isdecimal():
            raise UserError(f"{OWN_VARIABLE} is {shown(text)}; give a number of threads")
        return checked(int(text), OWN_VARIABLE)
    return None


def prepare_process(
    asked: int | None, environ: MutableMapping[str, str] = os.environ, machine: Callable[[], Machine] = Machine.now
) -> None:
    """Set the number of threads and passive waiting in the environment of this process. It must not have imported torch yet.

    The number is `asked`, else LUMOS_THREADS, else OMP_NUM_THREADS or MKL_NUM_THREADS, else the free cores of `machine()`
    divided by the processes of this run on the machine. If one of the variables in PASSIVE is set, waiting stays as it says.
    """
    count, stated = given_count(asked, environ), stated_count(environ)
    if count is None and stated is None:  # not set, or no number, as 0 is: then OpenMP takes all cores
        count = max(1, machine().free_threads() // processes_here(environ))
    if count is not None:
        environ.update({name: str(count) for name in COUNT_VARIABLES if name in environ}, OMP_NUM_THREADS=str(count))
    elif MKL in environ:
        environ[MKL] = str(stated)  # of two numbers, torch takes this one
    if not any(environ.get(name) for name in PASSIVE):
        environ.update(PASSIVE)


@contextmanager
def threads_of_a_call(asked: int | None) -> Iterator[None]:
    """Inside, torch uses `asked` threads, in a process that is not ours to prepare; None: nothing changes. Imports torch."""
    if asked is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(checked(asked, "--threads"))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores_in_use(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of threads that a prepared process uses; without a number in the environment, its allowed cores."""
    return stated_count(environ) or Machine.now().allowed


def stated_count(environ: Mapping[str, str]) -> int | None:
    """Return the number of threads that the first set one of COUNT_VARIABLES states, or None."""
    text = next((environ[name] for name in COUNT_VARIABLES if environ.get(name)), "").split(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) else None


Times = dict[str, tuple[int, int]]
"""For each thread, by its id: the nanoseconds for which it ran, and for which it waited for a core."""


def thread_times(root: Path = Path("/")) -> Times:
    """Return the times of all threads of this process; {} where the system does not tell them (Linux does)."""
    found = {}
    for path in (root / "proc/self/task").glob("*/schedstat"):
        words = " ".join(_lines(path)).split()
        if len(words) == 3:
            found[path.parent.name] = int(words[0]), int(words[1])
    return found


def waiting_note(before: Times, after: Times, count: int) -> str | None:
    """Return a note if the threads of this process waited for a core for half of the time that they ran, or more; else None.

    before, after: the times of the threads at the begin and at the end of some seconds. One thread gives no note, as there is no
    smaller number to choose.
    """
    ran, waited = (
        sum(times[i] - before.get(thread, (0, 0))[i] for thread, times in after.items()) / 1e9 for i in (0, 1)
    )  # fmt: skip
    if count < 2 or waited < 1 or waited < ran / 2:
        return None
    return (
        f"other programs use this machine: {count} threads waited {waited:.0f} s for a core and ran {ran:.0f} s, which makes every "
        f"step slow; fewer threads are often faster, for example --threads {max(1, count // 2)}"
    )


@contextmanager
def watched(seconds: float = WATCH_SECONDS, root: Path = Path("/")) -> Iterator[None]:
    """Inside, look every few seconds at how long the threads wait for a core; at most one note goes to the logger."""
    over = threading.Event()

    def watch() -> None:
        before = thread_times(root)
        while before and not over.wait(seconds):
            after = thread_times(root)
            if note := waiting_note(before, after, cores_in_use()):
                LOGGER.warning(f"note: {note}")
                return
            before = after

    thread = threading.Thread(target=watch, name="threads-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
