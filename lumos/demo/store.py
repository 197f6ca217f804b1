"""The one folder that the demo writes into and serves from."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from lumos.batch.clips import record_path
from lumos.demo.limits import Limits

RESULT = re.compile(r"[a-z0-9-]+-[0-9a-f]{12}\.(mp4|png)")


class Store:
    """`results/` is served, file by file and by name; `visitors-uploads/` holds what visitors gave.

    Only files of its own are ever removed: results by their names, uploads by that folder.
    """

    def __init__(self, root: Path, limits: Limits):
        self.results, self.uploads = root.resolve() / "results", root.resolve() / "visitors-uploads"
        self._keep_results, self._keep_bytes = limits.keep_results, int(limits.keep_uploads_mb * 2**20) - limits.upload_bytes
        for folder in (self.results, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)

    def new_result(self, name: str) -> Path:
        """A path for a result, with a name that nobody can guess; makes room for it."""
        kept = oldest_first([path for path in self.results.iterdir() if RESULT.fullmatch(path.name)])
        for old in kept[: max(0, len(kept) + 1 - self._keep_results)]:
            record_path(old).unlink(missing_ok=True)
            old.unlink(missing_ok=True)
        path = self.results / name
        return path.with_stem(f"{path.stem}-{uuid.uuid4().hex[:12]}")

    def find(self, name: str) -> Path | None:
        """A result or its record by its name, and nothing else: no path, no link to elsewhere."""
        path = self.results / name
        if not RESULT.fullmatch(name.removesuffix(".json")) or path.is_symlink() or not path.is_file():
            return None
        return path

    def new_upload(self, name: str) -> Path:
        """A path, in a folder of its own, for a file that a visitor calls so."""
        folder = self.uploads / f"api-{uuid.uuid4().hex}"
        folder.mkdir()
        return folder / (re.sub(r"[^\w.-]+", "_", name.replace("\\", "/").rpartition("/")[2])[-80:].lstrip(".") or "upload")

    def holds_upload(self, path: str | Path) -> bool:
        """Whether this is a file that a visitor has uploaded, and no other of this machine."""
        path = Path(path).resolve()
        return path.is_relative_to(self.uploads) and path.is_file()

    def make_room(self) -> None:
        """Remove the oldest uploads until one more fits."""
        files = oldest_first([path for path in self.uploads.rglob("*") if path.is_file()])
        total = sum(map(size, files))
        for path in files:
            if total <= self._keep_bytes:
                return
            total -= size(path)
            path.unlink(missing_ok=True)


def oldest_first(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime if path.exists() else 0.0)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
