"""Files behind URLs (s3://, gs://, hf://, https://, ...) by fsspec, and a bounded folder of local copies of them."""

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


def location(path: str | Path) -> Path | Remote:
    """Where a path or URL points; both kinds can be joined, listed and read in the same words."""
    return Remote(str(path).rstrip("/")) if is_url(path) else Path(path)


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder behind a URL, with the part of pathlib's interface that reading needs.

    UserError for a URL of an unknown kind and for a kind whose package is missing, RunError if it cannot be read.
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
        """Files of this folder whose name fits the pattern; a folder that is not there has none."""
        try:
            found = self._call("ls", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in found}
        return [self / name for name in names if fnmatch(name, pattern)]

    def read_bytes(self, last: int | None = None) -> bytes:
        """The whole file, or its last so many bytes (all if it has fewer). FileNotFoundError as a path raises it."""
        return self._call("cat_file", start=None if last is None else -last)

    def download(self, target: Path) -> None:
        try:
            self._call("get_file", str(target))
        except FileNotFoundError as error:
            raise RunError(f"{self} is not there any more") from error

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        """A method of its file system, tried again on what may be a passing fault of the network."""
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
    """Copies of remote files in a folder that several processes may share, each under a key that stands for its content.

    When they hold more than `limit` bytes, the least recently used go. UserError if the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder), limit
        check_writable(self.folder / "copy")
        for part in self.folder.glob(".*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > 86400:  # of a killed process, not of one at work
                    part.unlink()

    def open(self, file: Remote, key: str, check: Callable[[Path], None]) -> BinaryIO:
        """The copy for reading; once open it stays readable, whatever becomes of the name."""
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):  # another run that shares the folder needed the room
                return self.fetch(file, key, check).open("rb")
        raise RunError(f"copies in {self.folder} vanish as they are made; raise data.cache_gb, or use another data.cache_dir")

    def fetch(self, file: Remote, key: str, check: Callable[[Path], None]) -> Path:
        """Make the copy if there is none; `check` raises if what arrived is not what it should be."""
        copy = self.folder / key
        if not copy.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{copy}.lock"):  # else each process of a machine would download it
                if not copy.is_file():
                    with replacing(copy) as temporary:
                        file.download(temporary)
                        check(temporary)
                    self._make_room(copy)
        with suppress(FileNotFoundError):
            os.utime(copy)
        return copy

    def _make_room(self, newest: Path) -> None:
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
