"""The one folder that the demo writes into and serves from."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from lumos.commands.generate import record_path

RESULT = re.compile(r"[a-z0-9-]+\.(mp4|png)(\.json)?")


class Store:
    """`results/` is served, file by file and by name; `uploads/` holds what visitors gave, until it is read."""

    def __init__(self, root: Path, keep_results: int):
        self.results, self.uploads, self._keep = root.resolve() / "results", root.resolve() / "uploads", keep_results
        for folder in (self.results, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)

    def new_result(self, name: str) -> Path:
        """A path for a result whose name nobody can guess; makes room for it."""
        kept = sorted((path for path in self.results.glob("*.*") if path.suffix != ".json"), key=lambda p: p.stat().st_mtime)
        for old in kept[: max(0, len(kept) + 1 - self._keep)]:
            record_path(old).unlink(missing_ok=True)
            old.unlink(missing_ok=True)
        path = self.results / name
        return path.with_stem(f"{path.stem}-{uuid.uuid4().hex[:12]}")

    def find(self, name: str) -> Path | None:
        """A result or its record by its name, and nothing else: no path, no link to elsewhere."""
        path = self.results / name
        if not RESULT.fullmatch(name) or path.is_symlink() or not path.is_file():
            return None
        return path

    def new_upload(self, name: str) -> Path:
        """A path, in a folder of its own, for a file that a visitor calls so."""
        folder = self.uploads / f"api-{uuid.uuid4().hex}"
        folder.mkdir()
        return folder / (re.sub(r"[^\w.-]+", "_", name.replace("\\", "/").rpartition("/")[2])[-80:].lstrip(".") or "upload")
