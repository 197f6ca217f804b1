"""Files behind URLs (s3://, gs://, hf://, https://, ...), read with fsspec, and a folder of local copies of limited size."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from lumos.errors import RunError, UserError
from lumos.files import check_writable, replacing

ATTEMPTS = 3
"""The number of attempts of a request."""


def location(path: str | Path) -> Path | Remote:
    """Return a path or URL as a Path or Remote, which have the same methods to join, list and read files."""
    return Remote(str(path).rstrip("/")) if is_url(path) else Path(path)


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder behind a URL, with the methods of `pathlib.Path` that reading needs.

    The methods raise UserError if the URL has an unknown protocol or if the package for its protocol is
    not installed, and RunError if the file cannot be read.
    """

    url: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def glob(self, pattern: str) -> list[Remote]:
        """Return the files of this folder whose names match the pattern; none if there is no such folder."""
        try:
            found = self._call("ls", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in found}
        return [self / name for name in names if fnmatch(name, pattern)]

    def read_bytes(self, last: int | None = None) -> bytes:
        """Return the content of the file, or its last `last` bytes (all bytes if it has fewer).

        Raise FileNotFoundError if there is no such file, as a Path does.
        """
        return self._call("cat_file", start=None if last is None else -last)

    def download(self, target: Path) -> None:
        """Copy the file to `target`; raise RunError if it does not exist."""
        try:
            self._call("get_file", str(target))
        except FileNotFoundError as error:
            raise RunError(f"{self} does not exist any more") from error

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the file system of the URL; try again after errors that can be temporary."""
        import fsspec

        for attempt in range(ATTEMPTS):
            try:
                system, path = fsspec.core.url_to_fs(self.url)
                return getattr(system, method)(path, *args, **options)
            except FileNotFoundError:
                raise
            except ImportError as error:
                raise UserError(f"{self} needs a package that is not installed ({error}); install it with pip") from error
            except PermissionError as error:
                raise RunError(f"{self} may not be read ({_line(error)}); check the credentials") from error
            except ValueError as error:
                raise UserError(f"{self} cannot be read ({_line(error)}); allowed: URLs that fsspec knows, and paths") from error
            except Exception as error:  # every file system has errors of its own
                if attempt + 1 == ATTEMPTS:
                    raise RunError(
                        f"{self} cannot be read, tried {ATTEMPTS} times ({_line(error)}); check address, network and credentials"
                    ) from error
                time.sleep(2**attempt)
        raise AssertionError


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class LocalCopies:
    """A folder of local copies of remote files, which several processes can share.

    The name of a copy is a key that identifies its content. If the copies have more than `limit` bytes,
    the least recently used ones are deleted. Raise UserError if the folder is not writable.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        check_writable(self.folder / "copy")
        for part in self.folder.glob(".*.part"):
            with suppress(OSError):
                # A killed process left this file: a running process would have written to it within a day.
                if time.time() - part.stat().st_mtime > 86400:
                    part.unlink()

    def open(self, file: Remote, key: str, check: Callable[[Path], None]) -> BinaryIO:
        """Open the copy of a file for reading, and download it first if necessary.

        An open copy stays readable if another process deletes it. Raise RunError if copies are deleted
        again and again before they can be opened.
        """
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):  # another run deleted the copy to make room
                return self.fetch(file, key, check).open("rb")
        raise RunError(
            f"copies in {self.folder} are deleted before they are read; raise data.cache_gb, or use another data.cache_dir"
        )

    def fetch(self, file: Remote, key: str, check: Callable[[Path], None]) -> Path:
        """Return the path of the copy of a file, and download it first if necessary.

        `check` is called with the downloaded file and raises an error if its content is wrong.
        """
        copy = self.folder / key
        if not copy.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{copy}.lock"):  # without the lock each process of a machine would download the file
                if not copy.is_file():
                    with replacing(copy) as temporary:
                        file.download(temporary)
                        check(temporary)
                    self._make_room(copy)
        with suppress(FileNotFoundError):
            os.utime(copy)
        return copy

    def _make_room(self, newest: Path) -> None:
        """Delete the least recently used copies until at most `limit` bytes are left; keep `newest`."""
        copies = []
        for path in self.folder.glob(f"*{newest.suffix}"):
            with suppress(FileNotFoundError):
                copies.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                break
            if path != newest:
                with suppress(OSError):
                    path.unlink()
                    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
                total -= size
