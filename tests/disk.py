"""A record of the calls that decide what a power cut leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lumos import durable

FSYNC = os.fsync


class Disk:
    """Calls of fsync and rename in their order, as ("sync", path) and ("rename", target); `refuse(path)` may give an errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[str, Path]] = []
        self.renames: list[tuple[int, Path, Path, set[Path]]] = []
        self.refuse: Callable[[Path], int | None] = lambda path: None
        exchange = durable._exchange

        def synced(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if number := self.refuse(path):
                raise OSError(number, os.strerror(number))
            FSYNC(descriptor)
            self.calls.append(("sync", path))

        def renamed(function: Callable, source: Path, target: Path) -> object:
            source, target = Path(source), Path(target)
            inside = {source, *source.rglob("*")} if source.is_dir() else {source}
            done = function(source, target)
            if done is not False:
                self.renames.append((len(self.calls), source, target, inside))
                self.calls.append(("rename", target))
            return done

        monkeypatch.setattr(os, "fsync", synced)
        for name in ("replace", "rename"):
            function = getattr(os, name)
            monkeypatch.setattr(os, name, lambda source, target, function=function: renamed(function, source, target))
        monkeypatch.setattr(durable, "_exchange", lambda first, second: renamed(exchange, first, second))

    def check_renames(self) -> None:
        """Assert that renamed files and folders are synchronized before the rename, and the folder of the name after it."""
        assert self.renames
        for position, source, target, inside in self.renames:
            if durable.is_temporary(target) or target.name.startswith(".old-"):  # temporary files, and files that are removed later
                continue
            before = {path for kind, path in self.calls[:position] if kind == "sync"}
            assert inside <= before, (source, inside - before)
            assert ("sync", target.parent) in self.calls[position:], target
