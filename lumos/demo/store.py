"""The folder that holds the results and the uploads of the demo."""

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

from lumos.demo.limits import FORM_BYTES, Limits, ServerBusy
from lumos.durable import sweep_dead
from lumos.prompt_lists.clips import record_path

RESULT = re.compile(r"[^/\\\0-\x1f.]+-[0-9a-f]{12}\.(mp4|png)")
"""The names of results. They begin with words of the prompt in any script, see `lumos.prompt_lists.clips.default_name`."""
FRESH_SECONDS = 120  # an upload is never removed in this time: its visitor is about to press Generate
UNUSED_SECONDS = 3600  # after this time an upload that no job needs is removed
UNDELIVERED_SECONDS = 300  # a result is never removed in this time: its client is about to fetch it


@dataclass
class Upload:
    """A file that was uploaded from the page."""

    size: int  # bytes
    since: float  # time.monotonic() of its arrival
    needed: int = 0  # jobs that need it
    left: bool = False  # whether its session has ended


class Store:
    """The folders `results/`, which the server serves file by file, and `visitors-uploads/`.

    The store removes only files of its own: files in `results/` whose names have its form, and
    everything in `visitors-uploads/`, which is emptied at the start. The bytes that a request in
    flight has announced or sent count against the limit of uploads before they are written.
    """

    def __init__(self, root: Path, limits: Limits):
        self.results, self.uploads = root.resolve() / "results", root.resolve() / "visitors-uploads"
        self._keep_results, self._keep_bytes = limits.keep_results, int(limits.keep_uploads_mb * 2**20) + FORM_BYTES
        self._lock = threading.RLock()
        self._stays: dict[str, float] = {}  # time.monotonic() until which a result is not removed
        self._delivering: Counter[str] = Counter()
        self._kept: dict[Path, Upload] = {}  # uploads of the page, the oldest first
        self._reserved = 0
        self.clear()
        self.results.mkdir(parents=True, exist_ok=True)
        sweep_dead(self.results)

    # -- results

    def new_result(self, name: str) -> Path:
        """Remove the oldest results beyond the limit, and return a path for a new one, whose name nobody can guess."""
        with self._lock:
            kept = oldest_first([path for path in self.results.iterdir() if RESULT.fullmatch(path.name)])
            surplus = max(0, len(kept) + 1 - self._keep_results)
            for old in [path for path in kept if not self._is_awaited(path.name)][:surplus]:
                self.remove(old.name)
        path = self.results / name
        return path.with_stem(f"{path.stem}-{uuid.uuid4().hex[:12]}")

    def remove(self, name: str) -> None:
        """Remove a result and its record."""
        with self._lock:
            record_path(self.results / name).unlink(missing_ok=True)
            (self.results / name).unlink(missing_ok=True)
            self._stays.pop(name, None)

    def stay(self, name: str, seconds: float = UNDELIVERED_SECONDS) -> None:
        """Keep a result from being removed for so many seconds from now."""
        with self._lock:
            self._stays[name] = time.monotonic() + seconds

    @contextmanager
    def delivering(self, name: str) -> Iterator[None]:
        """Keep a result from being removed inside of the `with` block."""
        with self._lock:
            self._delivering[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._delivering[name] -= 1
                self._delivering += Counter()  # removes entries that are 0

    def _is_awaited(self, name: str) -> bool:
        return self._delivering[name] > 0 or time.monotonic() < self._stays.get(name, 0)

    def find(self, name: str) -> Path | None:
        """Return the path of a result or of a record, or None.

        A name that is a path, and a symbolic link, give None, so that no other file can be read.
        """
        path = self.results / name
        if not RESULT.fullmatch(name.removesuffix(".json")) or path.is_symlink() or not path.is_file():
            return None
        return path

    # -- uploads

    @contextmanager
    def reservation(self) -> Iterator[Reservation]:
        """Yield a reservation for the bytes of one request, which ends with the `with` block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            with self._lock:
                self._reserved -= reservation.size

    def new_upload(self, name: str) -> Path:
        """Return a path, in a new folder, for a file that has this name at the visitor."""
        folder = self.uploads / f"upload-{uuid.uuid4().hex}"
        folder.mkdir()
        return folder / (re.sub(r"[^\w.-]+", "_", name.replace("\\", "/").rpartition("/")[2])[-80:].lstrip(".") or "upload")

    def keep(self, path: Path) -> str:
        """Count a file as an upload of the page, and return the name under which the page refers to it."""
        with self._lock:
            self._kept[path] = Upload(path.stat().st_size, time.monotonic())
        return path.relative_to(self.uploads).as_posix()

    def upload(self, called: str) -> Path | None:
        """Return the path of the upload that the page refers to by this name, or None."""
        path = self.uploads / called
        return path if path in self._kept and self.holds_upload(path) else None

    def holds_upload(self, path: str | Path) -> bool:
        """Return whether the path is a file that a visitor has uploaded."""
        path = Path(path).resolve()
        return path.is_relative_to(self.uploads) and path.is_file()

    @contextmanager
    def needing(self, path: Path | None) -> Iterator[None]:
        """Keep an upload of the page from being removed inside of the `with` block."""
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
        """Remove an upload whose session has ended, as soon as no job needs it."""
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
        """Remove old uploads until `more` bytes fit; ServerBusy if they do not fit beside the uploads that must stay."""
        now = time.monotonic()
        for path, upload in list(self._kept.items()):
            if not upload.needed:
                full = self._total() + more > self._keep_bytes
                if now - upload.since > (FRESH_SECONDS if full else UNUSED_SECONDS):
                    self._remove(path)
        if self._total() + more > self._keep_bytes:
            raise ServerBusy("the server has no room for more uploads now; try again later")

    def _total(self) -> int:
        return self._reserved + sum(upload.size for upload in self._kept.values())

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        self._kept.pop(path, None)


class Reservation:
    """The bytes of uploads that one request in flight reserves."""

    def __init__(self, store: Store):
        self.size, self._store = 0, store

    def grow(self, size: int) -> None:
        """Raise the reservation to `size` bytes in all; ServerBusy if they do not fit beside the other uploads and reservations."""
        with self._store._lock:
            self._store._make_room(size - self.size)
            self._store._reserved += size - self.size
            self.size = size


def oldest_first(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime if path.exists() else 0.0)
