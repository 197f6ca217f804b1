"""Renames that survive a power cut, and temporary names for files that are being written.

A file system may store a rename before it stores the data of the renamed file. It may also lose a
rename that it has reported as done. So a file is synchronized to the disk before it is renamed, and
the folder that holds its name is synchronized after that.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import sys
import time
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

NAME_LENGTH = 40
"""The number of characters of a file's name that its temporary name repeats."""
ABANDONED_AFTER = 86400.0
"""Seconds after which a temporary file of another machine counts as left over by a killed process."""
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors that mean that a file system does not support a call, not that something is broken."""
NOT_FOR_FOLDERS = {*UNSUPPORTED, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
UNFINISHED = ".unfinished"
"""The name of a folder for unfinished files; each file is moved out of it when it is finished."""
RENAME_EXCHANGE, AT_FDCWD = 2, -100


def sync_file(path: str | Path) -> None:
    """Wait until the disk holds the data of a file.

    Raises OSError if that fails, but not if the file system does not support the call.
    """
    _sync(path, UNSUPPORTED)


def sync_folder(path: str | Path) -> None:
    """Wait until the disk holds the names in a folder, on systems that support this."""
    _sync(path, NOT_FOR_FOLDERS)


def sync_tree(path: Path) -> None:
    """Synchronize a file, or a folder with all of its content, to the disk, and give the files the mode that the umask implies.

    The mode is set because some libraries, safetensors among them, write files that only their owner
    may read. Links are not followed.
    """
    kind = path.lstat().st_mode
    if stat.S_ISDIR(kind):
        for entry in path.iterdir():
            sync_tree(entry)
        sync_folder(path)
    elif stat.S_ISREG(kind):
        _share(path)
        sync_file(path)


def put_file(source: Path, target: Path) -> None:
    """Rename a finished file or a new folder to `target` so that the rename survives a power cut.

    `target` may be an older file, which is replaced. A target with a temporary name is not synchronized,
    because it does not need to survive.
    """
    if is_temporary(target):
        os.replace(source, target)
        return
    sync_tree(source)
    os.replace(source, target)
    sync_folder(target.parent)


def put_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target` as `put_file` does, and replace an older folder of that name.

    On Linux, `target` exists at every moment. If the system cannot exchange two folders, a kill between
    two renames may leave the older folder under another name; `put_back` then restores it.
    """
    if not os.path.lexists(target):
        put_file(source, target)
        return
    sync_tree(source)
    old = source
    if not _exchange(source, target):
        old = _aside(target)
        remove(old)
        os.replace(target, old)
        try:
            os.replace(source, target)
        except BaseException:
            os.replace(old, target)
            raise
    sync_folder(target.parent)
    remove(old)


def put_back(path: Path) -> None:
    """Clean up after a kill in `put_folder`: restore the older folder, or remove it if the new one is in place."""
    aside = _aside(path)
    if os.path.lexists(path):
        remove(aside)
    elif os.path.lexists(aside):
        os.replace(aside, path)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents so that they survive a power cut. It may already exist."""
    new = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        new.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it exists.

    An OSError is ignored, so that a failed removal does not hide an earlier error.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass


def temporary_name(path: Path) -> Path:
    """Return a new temporary name in the folder of `path`, for a file that will be renamed to `path`.

    The name contains the `owner` of the file, so that `sweep` can tell whether its writer still runs.
    """
    return path.with_name(f".{_short(path.name)}.{owner()}-{uuid.uuid4().hex[:4]}.part")


def is_temporary(path: Path) -> bool:
    """Return whether a path, or a folder above it, has one of this library's temporary names."""
    return any(part == UNFINISHED or re.fullmatch(r"\..*\.part", part) for part in path.parts)


def sweep(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left. Those of running processes stay."""
    _sweep(path.parent, re.escape(f".{_short(path.name)}."))


def sweep_dead(folder: Path) -> None:
    """Remove the temporary files in a folder that killed processes left. Those of running processes stay."""
    _sweep(folder, r"\..*\.")


def _sweep(folder: Path, beginning: str) -> None:
    temporary = re.compile(beginning + r"(?:[0-9a-f]{8}|(\w+-\d+-\d+)-[0-9a-f]{4})\.part")
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and (match := temporary.fullmatch(entry.name)):
                with suppress(OSError):
                    old = time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_AFTER
                    alive = match[1] is not None and is_alive(match[1])
                    if not alive if alive is not None else old:
                        remove(Path(entry.path))


def sweep_folder(folder: Path) -> None:
    """Remove everything with a temporary name from a folder. Call it only if no other process can write there."""
    for left_over in folder.glob(".*.part"):
        remove(left_over)


def owner() -> str:
    """Return a text that identifies this process: a hash of its machine's name, its id and its start time.

    `is_alive` reads it.
    """
    return f"{_host()}-{os.getpid()}-{_started(os.getpid())}"


def is_alive(owner: str) -> bool | None:
    """Return whether the process that `owner` identifies runs, or None if it belongs to another machine."""
    host, number, started = owner.split("-")
    if host != _host():
        return None
    now = _started(int(number))
    return now is not None and abs(now - int(started)) <= 2


def _started(process: int) -> int | None:
    """Return the start time of a process in seconds since 1970, or None if there is no such process."""
    import psutil

    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else round(found.create_time())
    except psutil.NoSuchProcess:
        return None


@lru_cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _short(name: str) -> str:
    """Return the name; a long name is replaced by its beginning and a hash, so that it stays unique."""
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH - 9]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def _aside(path: Path) -> Path:
    return path.with_name(f".old-{_short(path.name)}")


def _sync(path: str | Path, ignored: set[int]) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in ignored:
            raise


def _share(path: Path) -> None:
    """Change the mode of a file from 0600 to that of a new file in its folder."""
    if os.name != "posix" or stat.S_IMODE(path.stat().st_mode) != 0o600:
        return
    probe = temporary_name(path)  # the umask itself cannot be read without changing it for all threads
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
    finally:
        remove(probe)
    path.chmod(mode)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one folder atomically and return True; return False if the system cannot do so."""
    call = _renameat2()
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(second))


@lru_cache
def _renameat2():
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2 if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None
