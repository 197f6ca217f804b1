"""The lock of a folder that only one process may write into.

Where the file system has locks, it is one on the file `.lock`, which ends with the process. Elsewhere (NFS without a lock
daemon, Lustre without the option, Windows) it is the file `.lock-owner`, which names the process and is removed at the end; one
of a process that is gone counts for nothing.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from lumos.durable import UNSUPPORTED, is_alive, owner, remove, sync_file, sync_folder, temporary_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, OWNER = ".lock", ".lock-owner"
NO_LOCKS = {*UNSUPPORTED, errno.ENOLCK}
ATTEMPTS = 100
UNREADABLE_AFTER = 60.0
"""Seconds in which a process has surely written its name into the file it has made."""
_held: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


class Busy(Exception):
    """Another process has the lock; the text says more where more is known."""


class Lock:
    """Held from its construction to `release`. Busy if another process holds it, OSError if the folder cannot be used so."""

    def __init__(self, folder: Path):
        self.file: IO[bytes] | None = None
        self.name: Path | None = None
        if fcntl is not None:
            self.file = _lock_file(folder)
        if self.file is None:
            self.name = _own_by_name(folder / OWNER)

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.name is not None:
            with suppress(OSError, ValueError):
                if json.loads(self.name.read_bytes())["owner"] == owner():  # not in a forked process, nor another's new one
                    self.name.unlink()


def _lock_file(folder: Path) -> IO[bytes] | None:
    """The locked file; None if the file system has no locks."""
    path = folder / LOCK
    for _ in range(ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, f"{LOCK} is not a regular file")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(descriptor, path):
                _held.add(file)
                return file
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Busy("") from error
            if error.errno in NO_LOCKS and stat.S_ISREG(path.lstat().st_mode):
                return None
            raise
        file.close()  # its name went to another file before it was locked: another process was done here
    raise Busy("")


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), found)


def _own_by_name(path: Path) -> Path:
    for _ in range(ATTEMPTS):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _check_gone(path)
            continue
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"owner": owner(), "process": os.getpid(), "machine": platform.node(), "since": time.ctime()}, file)
        sync_file(path)
        sync_folder(path.parent)
        return path
    raise Busy("")


def _check_gone(path: Path) -> None:
    """Remove the file of a process that is gone; Busy if it may be there."""
    try:
        text = path.read_bytes()
        age = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return
    try:
        told = json.loads(text)
        alive, who = is_alive(told["owner"]), f"process {int(told['process'])} on {str(told['machine'])[:80]!r}"
    except (ValueError, KeyError, TypeError, AttributeError):
        alive, who = age < UNREADABLE_AFTER, "a process"
    if alive is not False:
        doubt = "" if alive else f"; if that process is gone, delete {path}"
        raise Busy(f" ({who}, as {path.name} says: this file system has no locks{doubt})")
    gone = temporary_name(path)
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return
    if gone.read_bytes() != text:  # another process was faster, and this is its file
        os.rename(gone, path)
        raise Busy("")
    remove(gone)


def _let_go() -> None:
    """A forked process shares the locks of its parent, and must not keep them when that one ends."""
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
