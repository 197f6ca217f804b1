"""The lock of a folder that only one process at a time may write into.

If the file system supports locks, the process locks the file `.lock`; this lock ends with the process.
Otherwise (NFS without a lock daemon, Lustre without the option, Windows) the process creates the file
`.lock-owner`, which names the process, and removes it at the end. The file of a process that no longer
runs is ignored.
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
"""Seconds after which a `.lock-owner` without a name counts as left over by a killed process.

A process writes its name into the file right after it has created it.
"""
_held: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


class LockHeld(Exception):
    """Another process holds the lock. The message says which one, if that is known, and is else empty."""


class Lock:
    """A lock that is held from its construction to `release`.

    Raises LockHeld if another process holds it, OSError if the folder cannot be locked.
    """

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
                # Not true in a forked process, or if another process has taken over the lock.
                if json.loads(self.name.read_bytes())["owner"] == owner():
                    self.name.unlink()


def _lock_file(folder: Path) -> IO[bytes] | None:
    """Return the locked file, or None if the file system has no locks."""
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
                raise LockHeld("") from error
            if error.errno in NO_LOCKS and stat.S_ISREG(path.lstat().st_mode):
                return None
            raise
        file.close()  # the file was replaced between open and lock; try again with the new one
    raise LockHeld("")


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
    raise LockHeld("")


def _check_gone(path: Path) -> None:
    """Remove the `.lock-owner` of a process that no longer runs. Raises LockHeld if the process may still run."""
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
        raise LockHeld(f" ({who}, as {path.name} says: this file system has no locks{doubt})")
    gone = temporary_name(path)
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return
    if gone.read_bytes() != text:  # another process has taken the lock since, and this is its file
        os.rename(gone, path)
        raise LockHeld("")
    remove(gone)


def _let_go() -> None:
    """Close the lock files of the parent in a forked process, so that the locks end with the parent."""
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
