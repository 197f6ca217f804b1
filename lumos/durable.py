"""Renames that survive a power cut, and the temporary names of files that are being written.

A file system may store a rename before it stores the data of the renamed file, and may forget a rename of which it has told
the program. So a file is synchronized before it is renamed, and the folder with its name after that.
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
"""Characters of a file's name that its temporary name keeps."""
ABANDONED_AFTER = 86400.0
"""Seconds after which a temporary file of another machine is taken for that of a killed process."""
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors with which a file system says that it cannot do something, and not that something is broken."""
NOT_FOR_FOLDERS = {*UNSUPPORTED, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
UNFINISHED = ".unfinished"
"""A folder whose content is moved elsewhere file by file, each when it is finished."""
RENAME_EXCHANGE, AT_FDCWD = 2, -100


def sync_file(path: str | Path) -> None:
    """Return when the disk holds the data of a file. OSError if it cannot, unless its file system knows no such call."""
    _sync(path, UNSUPPORTED)


def sync_folder(path: str | Path) -> None:
    """Return when the disk holds the names in a folder, where the system can tell."""
    _sync(path, NOT_FOR_FOLDERS)


def settle(path: Path) -> None:
    """Synchronize a file, or a folder with all that is in it, and make files readable for others as the umask says.

    Some libraries, safetensors among them, make files that only their owner may read. Links are not followed.
    """
    kind = path.lstat().st_mode
    if stat.S_ISDIR(kind):
        for entry in path.iterdir():
            settle(entry)
        sync_folder(path)
    elif stat.S_ISREG(kind):
        _share(path)
        sync_file(path)


def put_file(source: Path, target: Path) -> None:
    """Give a finished file or a new folder the name `target`, which may be that of an older file, so that it lasts.

    Within what is temporary itself, nothing needs to last.
    """
    if is_temporary(target):
        os.replace(source, target)
        return
    settle(source)
    os.replace(source, target)
    sync_folder(target.parent)


def put_folder(source: Path, target: Path) -> None:
    """As `put_file`, for a folder that may take the place of an older one: at every moment one of the two is there.

    Where the system cannot exchange two folders, a kill may leave the older one aside; `put_back` gives it its name again.
    """
    if not os.path.lexists(target):
        put_file(source, target)
        return
    settle(source)
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
    """Undo what a kill in `put_folder` left: the older folder has its name again if there is no new one, else it goes."""
    aside = _aside(path)
    if os.path.lexists(path):
        remove(aside)
    elif os.path.lexists(aside):
        os.replace(aside, path)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """As `path.mkdir(parents=True, exist_ok=True)`, so that it lasts."""
    new = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        new.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there. Raises no OSError, so that it hides no other error."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass


def temporary_name(path: Path) -> Path:
    """A new name beside `path` for what will take its place. The name tells which process writes it."""
    return path.with_name(f".{_short(path.name)}.{owner()}-{uuid.uuid4().hex[:4]}.part")


def is_temporary(path: Path) -> bool:
    """Whether a path is, or is within, what this library writes under a name that is not the last one."""
    return any(part == UNFINISHED or re.fullmatch(r"\..*\.part", part) for part in path.parts)


def sweep(path: Path) -> None:
    """Remove what killed processes left under temporary names of `path`. Those of processes at work stay."""
    of_path = re.compile(re.escape(f".{_short(path.name)}.") + r"(?:[0-9a-f]{8}|(\w+-\d+-\d+)-[0-9a-f]{4})\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(".") and (match := of_path.fullmatch(entry.name)):
                with suppress(OSError):
                    old = time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_AFTER
                    alive = match[1] is not None and is_alive(match[1])
                    if not alive if alive is not None else old:
                        remove(Path(entry.path))


def sweep_folder(folder: Path) -> None:
    """Remove everything under a temporary name in a folder. Call it only while no other process may write there."""
    for left_over in folder.glob(".*.part"):
        remove(left_over)


def owner() -> str:
    """This process: its machine, its number and when it started, as `is_alive` reads them."""
    return f"{_host()}-{os.getpid()}-{_started(os.getpid())}"


def is_alive(owner: str) -> bool | None:
    """Whether a process runs, by what `owner` gave there; None for one of another machine, of which nobody here can tell."""
    host, number, started = owner.split("-")
    if host != _host():
        return None
    now = _started(int(number))
    return now is not None and abs(now - int(started)) <= 2


def _started(process: int) -> int | None:
    """Seconds since 1970 at which it started; None if there is no such process."""
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
    """The name, or of a long one its beginning and a digest, so that no two share it."""
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
    """Give a file that only its owner may read the mode of a new file in its folder."""
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
    """Let two names of one folder change places at once; False where the system cannot."""
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
