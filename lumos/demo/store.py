"""The one folder that the demo writes into and serves from."""

from __future__ import annotations

import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lumos.demo.limits import FORM_BYTES, Busy, Limits
from lumos.prompt_lists.clips import record_path

RESULT = re.compile(r"[a-z0-9-]+-[0-9a-f]{12}\.(mp4|png)")
FRESH_SECONDS = 120  # that an upload of the page stays in any case: its visitor is about to press Generate
UNUSED_SECONDS = 3600  # after which an upload of the page that no job needs is removed
UNDELIVERED_SECONDS = 300  # that a result stays in any case: whoever asked for it is about to fetch it


@dataclass
class Upload:
    """A file of a page: its bytes, when it came, how many jobs need it, and whether its session has gone."""

    size: int
    since: float
    needed: int = 0
    left: bool = False


class Store:
    """`results/` is served, file by file and by name; `visitors-uploads/` holds what visitors gave.

    Only files of its own are ever removed: results by their names, uploads by that folder, which is emptied at the beginning.
    What requests in flight have announced or sent counts against the bytes of uploads before it is taken.
    """

    def __init__(self, root: Path, limits: Limits):
        self.results, self.uploads = root.resolve() / "results", root.resolve() / "visitors-uploads"
        self._keep_results, self._keep_bytes = limits.keep_results, int(limits.keep_uploads_mb * 2**20) + FORM_BYTES
        self._lock = threading.RLock()
        self._stays: dict[str, float] = {}  # until when a result is not removed
        self._delivering: Counter[str] = Counter()
        self._kept: dict[Path, Upload] = {}  # the oldest first
        self._reserved = 0
        self.clear()
        self.results.mkdir(parents=True, exist_ok=True)

    # -- results

    def new_result(self, name: str) -> Path:
        """A path for a result, with a name that nobody can guess; makes room for it."""
        with self._lock:
            kept = oldest_first([path for path in self.results.iterdir() if RESULT.fullmatch(path.name)])
            surplus = max(0, len(kept) + 1 - self._keep_results)
            for old in [path for path in kept if not self._is_awaited(path.name)][:surplus]:
                record_path(old).unlink(missing_ok=True)
                old.unlink(missing_ok=True)
                self._stays.pop(old.name, None)
        path = self.results / name
        return path.with_stem(f"{path.stem}-{uuid.uuid4().hex[:12]}")

    def stay(self, name: str, seconds: float = UNDELIVERED_SECONDS) -> None:
        """Keep a result, whatever comes, for so many seconds from now."""
        with self._lock:
            self._stays[name] = time.monotonic() + seconds

    @contextmanager
    def delivering(self, name: str) -> Iterator[None]:
        """A result is not removed inside of the block."""
        with self._lock:
            self._delivering[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._delivering[name] -= 1
                self._delivering += Counter()  # without zeros

    def _is_awaited(self, name: str) -> bool:
        return self._delivering[name] > 0 or time.monotonic() < self._stays.get(name, 0)

    def find(self, name: str) -> Path | None:
        """A result or its record by its name, and nothing else: no path, no link to elsewhere."""
        path = self.results / name
        if not RESULT.fullmatch(name.removesuffix(".json")) or path.is_symlink() or not path.is_file():
            return None
        return path

    # -- uploads

    @contextmanager
    def reservation(self) -> Iterator[Reservation]:
        """Room for the bytes of one request, given back at the end of the block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            with self._lock:
                self._reserved -= reservation.size

    def new_upload(self, name: str) -> Path:
        """A path, in a folder of its own, for a file that a visitor calls so."""
        folder = self.uploads / f"upload-{uuid.uuid4().hex}"
        folder.mkdir()
        return folder / (re.sub(r"[^\w.-]+", "_", name.replace("\\", "/").rpartition("/")[2])[-80:].lstrip(".") or "upload")

    def keep(self, path: Path) -> str:
        """Count a file that has arrived as an upload of the page; returns what the page calls it."""
        with self._lock:
            self._kept[path] = Upload(path.stat().st_size, time.monotonic())
        return path.relative_to(self.uploads).as_posix()

    def upload(self, called: str) -> Path | None:
        """The upload that the page calls so, None if there is none."""
        path = self.uploads / called
        return path if path in self._kept and self.holds_upload(path) else None

    def holds_upload(self, path: str | Path) -> bool:
        """Whether this is a file that a visitor has uploaded, and no other of this machine."""
        path = Path(path).resolve()
        return path.is_relative_to(self.uploads) and path.is_file()

    @contextmanager
    def needing(self, path: Path | None) -> Iterator[None]:
        """An upload of the page is not removed inside of the block."""
        with self._lock:
            upload = self._kept.get(path)
            if upload is not None:
                upload.needed += 1
        try:
            yield
        finally:
            if upload is not None:
                with self._lock:
                    upload.needed -= 1
                if upload.left:
                    self.leave(path)

    def leave(self, path: Path) -> None:
        """The session of this upload has gone: remove it, once no job needs it."""
        with self._lock:
            upload = self._kept.get(path)
            if upload is not None:
                upload.left = True
                if not upload.needed:
                    self._remove(path)

    def clear(self) -> None:
        """Remove all uploads."""
        shutil.rmtree(self.uploads, ignore_errors=True)
        self.uploads.mkdir(parents=True, exist_ok=True)
        self._kept.clear()

    def _make_room(self, more: int) -> None:
        """Remove old uploads until so many bytes more fit; Busy if those that are needed leave too few."""
        now = time.monotonic()
        for path, upload in list(self._kept.items()):
            if not upload.needed:
                full = self._total() + more > self._keep_bytes
                if now - upload.since > (FRESH_SECONDS if full else UNUSED_SECONDS):
                    self._remove(path)
        if self._total() + more > self._keep_bytes:
            raise Busy("the server has no room for more uploads now; try again later")

    def _total(self) -> int:
        return self._reserved + sum(upload.size for upload in self._kept.values())

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        self._kept.pop(path, None)


class Reservation:
    """Bytes of uploads that a request in flight holds."""

    def __init__(self, store: Store):
        self.size, self._store = 0, store

    def grow(self, size: int) -> None:
        """Hold so many bytes in all; Busy if they do not fit beside what others hold and need."""
        with self._store._lock:
            self._store._make_room(size - self.size)
            self._store._reserved += size - self.size
            self.size = size


def oldest_first(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime if path.exists() else 0.0)
