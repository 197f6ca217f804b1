"""A cache of row groups, through which training reads single clips of many shards, local or behind a URL (`format.py`).

The row groups that were used last are kept in memory, and remote shards that are needed next are
downloaded ahead.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

from lumos.data.shards import format as shards
from lumos.data.shards.remote import LocalCopies, Remote
from lumos.errors import RunError, UserError

GROUPS_KEPT = 64
"""Row groups kept in memory."""
DOWNLOADS_AT_ONCE = 4


class ShardReader:
    """Reads clips from the shards at `paths`; `digests` are the digests of their content.

    Remote shards are read from local `copies`, which is None for local shards. `made_by` is the result
    of `tokenizer.fingerprint.tokenizer_facts` for the tokenizer that made the codes.
    """

    def __init__(
        self,
        paths: list[Path] | list[Remote],
        digests: list[str],
        copies: LocalCopies | None,
        made_by: dict[str, Any],
    ):
        self.paths, self.digests, self.copies, self.made_by = paths, digests, copies, made_by
        self.groups: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()
        self.lock = threading.Lock()  # several threads make batches
        self.asked: dict[str, set[int]] = {}
        self.downloads = threading.Semaphore(DOWNLOADS_AT_ONCE)

    def read(self, shard: int, group: int, row: int) -> dict[str, Any]:
        """Return a row of a row group as `shards.read_group` does.

        Raise RunError if the shard is damaged or, for remote shards, changed since the run began.
        """
        with self.lock:
            if (shard, group) not in self.groups:
                self.groups[shard, group] = self._read_group(shard, group)
                if len(self.groups) > GROUPS_KEPT:
                    self.groups.popitem(last=False)
            self.groups.move_to_end((shard, group))
            return self.groups[shard, group][row]

    def ask_for(self, coming: list[int], purpose: str) -> None:
        """Start to download the shards that will soon be read, and return at once.

        `coming` replaces the list of the last call for the same purpose.
        """
        if self.copies is None:
            return
        with self.lock:
            fresh = [shard for shard in coming if shard not in self.asked.get(purpose, ())]
            self.asked[purpose] = set(coming)
        for shard in fresh:
            threading.Thread(target=self._fetch, args=(shard,), daemon=True).start()

    def _read_group(self, shard: int, group: int) -> list[dict[str, Any]]:
        path = self.paths[shard]
        if self.copies is None:
            return shards.read_group(path, group, made_by=self.made_by)
        with self.copies.open(path, *self._copy(shard)) as file:
            return shards.read_group(path, group, shards.open_shard(path, file), self.made_by)

    def _fetch(self, shard: int) -> None:
        with self.downloads, suppress(RunError, UserError, OSError):  # the error is raised when the shard is read
            self.copies.fetch(self.paths[shard], *self._copy(shard))

    def _copy(self, shard: int) -> tuple[str, Any]:
        """Return the name of the local copy of a shard, and the function that checks a downloaded file."""

        def check(file: Path) -> None:
            with suppress(RunError):
                if shards.read_facts(file).digest == self.digests[shard]:
                    return
            raise RunError(
                f"{self.paths[shard]} is not what it was when the run began: it was changed, or the download was incomplete; "
                "run the same command again"
            )

        return f"{self.digests[shard]}.parquet", check
