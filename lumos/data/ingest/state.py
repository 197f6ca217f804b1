"""The state of an ingest: which items are in its shards, and which items were skipped.

An item is done if it is in a shard of the folder or in the journal of skipped items, `skipped.jsonl`.
Before a shard is written, a line of `shards.jsonl` records its items and the digest of their clips. If
the shard is then not in the folder (it was deleted, or the ingest was killed), it is a gap. The next
ingest writes the items of a gap into a shard of the same name and in the same order. The folder then
has the same content as before, which a resumed training run checks.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lumos.data.ingest.encode import Skip
from lumos.data.ingest.fingerprint import CHANGED, OTHER, compare, fingerprint
from lumos.data.ingest.item import Item
from lumos.data.shards import format as shards
from lumos.durable import sync_file, sync_folder
from lumos.errors import RunError, UserError, printable
from lumos.files import MAX_DOCUMENT_BYTES, open_regular, parse_json

JOURNAL, CONTENTS = "skipped.jsonl", "shards.jsonl"
MAX_LINE = MAX_DOCUMENT_BYTES
"""Largest number of bytes of a line of a journal. A line names all items of a shard: 100 bytes each, more for long paths."""
DETAIL_LENGTH = 1000
"""Largest number of characters of the reason that the journal gives. A message can name a path of 4096 characters twice."""


@dataclass
class _Made:
    """The content of a shard that is not yet written: the clips and the fingerprint of each item, by id."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        return sum(map(len, self.rows.values()))


class State:
    """The content of an output folder: read from its files at the start, then kept up to date while writing.

    done, skipped  ids of the items in shards, and of the skipped items with the reason
    fingerprints   by id, of done and skipped items
    gaps, filling  by name, the lines of missing shards, and the content they have again so far
    new            content of the next new shard
    warnings       messages for the user
    """

    def __init__(self, out: Path, *, shard_clips: int, retry_skipped: bool):
        self.out, self.shard_clips = out, shard_clips
        self.done: set[str] = set()
        self.clips = 0
        for path in shards.shard_paths(out):
            ids = shards.read_ids(path)
            self.done.update(ids)
            self.clips += len(ids)
        self.fingerprints: dict[str, str] = {}
        self.gaps: dict[str, dict[str, Any]] = {}
        for name, entry in {entry["shard"]: entry for entry in _read_lines(out / CONTENTS)}.items():
            self.fingerprints |= {id_: value for id_, value in entry["items"].items() if id_ in self.done}
            if not (out / name).exists() and self.done.isdisjoint(entry["items"]):
                self.gaps[name] = entry
        self.gap_of = {id_: name for name, entry in self.gaps.items() for id_ in entry["items"]}
        self.filling = {name: _Made() for name in self.gaps}
        self.new = _Made()
        self.warnings: list[str] = []
        self.skipped: dict[str, dict[str, str]] = {}
        if retry_skipped:
            (out / JOURNAL).unlink(missing_ok=True)
        for entry in _read_lines(out / JOURNAL):
            if entry["id"] not in self.done:
                self.skipped[entry["id"]] = {"reason": entry["reason"], "detail": entry["detail"]}
                if "mark" in entry:
                    self.fingerprints[entry["id"]] = entry["mark"]

    def check(self, todo: Iterable[Item]) -> None:
        """Add warnings about items that changed but are not encoded again.

        Raise UserError if an item of `todo` has the name of an item in a shard, but is another file at
        another path.
        """
        done, skipped = [], []
        for item in todo:
            difference = compare(item, self.fingerprints[item.id]) if item.id in self.fingerprints else None
            if difference == OTHER and item.id in self.done:
                raise UserError(
                    f"{item.path} would have the name {item.id}, which another file in {self.out} has, from a source of the "
                    "same name in another place; rename the folder or file that is the source, or use another --out"
                )
            if difference in (OTHER, CHANGED):
                (done if item.id in self.done else skipped).append(item.id)
        if done:
            self.warnings.append(
                f"{len(done)} items changed (file or caption) since they were ingested, such as {done[0]}; they are not encoded "
                "again: use a new --out for that"
            )
        if skipped:
            self.warnings.append(
                f"{len(skipped)} items that were skipped changed since, such as {skipped[0]}; --retry-skipped tries them again"
            )

    def knows(self, item: Item) -> bool:
        """Return whether the item is in a shard or was skipped."""
        return item.id in self.done or item.id in self.skipped

    def skip(self, item: Item, why: Skip) -> None:
        """Record a skipped item in the journal."""
        entry = {"reason": why.reason, "detail": printable(why.detail[:DETAIL_LENGTH])}
        self.skipped[item.id] = entry
        _append(self.out / JOURNAL, {"id": item.id, **entry, "mark": fingerprint(item)})

    def add(self, item: Item, rows: list[dict[str, Any]]) -> None:
        """Add the clips of an item to its shard; write the shard if it is full."""
        self.done.add(item.id)
        gap = self.gap_of.get(item.id)
        made = self.filling[gap] if gap else self.new
        made.rows[item.id], made.fingerprints[item.id] = rows, fingerprint(item)
        if gap and len(made.rows) == len(self.gaps[gap]["items"]):
            self._fill(gap)
        elif not gap and made.clips >= self.shard_clips:
            self._write_new()

    def finish(self, whole: bool) -> None:
        """Write the clips that are not yet in a shard.

        `whole` says that all items of the sources were run. Then the gaps are also filled if some of
        their items are missing, with a warning. Otherwise a later ingest fills them.
        """
        if self.new.rows:
            self._write_new()
        for name, made in list(self.filling.items()):
            if not whole:
                self.done -= set(made.rows)
            elif made.rows:
                self._fill(name)
            else:
                count = len(self.gaps[name]["items"])
                self.warnings.append(
                    f"{name} is missing, and its {count} items are not in the sources: run the ingest with their source again"
                )
        self._sync_journals()

    def _write_new(self) -> None:
        path = shards.next_shard(self.out, reserved=self.gaps)
        self._write(path, self.new)
        self.new = _Made()

    def _fill(self, name: str) -> None:
        """Write a missing shard again, with its items in the old order."""
        old, made = self.gaps.pop(name), self.filling.pop(name)
        ids = [id_ for id_ in old["items"] if id_ in made.rows]
        made = _Made({id_: made.rows[id_] for id_ in ids}, {id_: made.fingerprints[id_] for id_ in ids})
        digest = self._write(self.out / name, made, written=old)
        if digest != old["digest"]:
            lost = len(old["items"]) - len(ids)
            why = f"{lost} of its {len(old['items'])} items gave no clip" if lost else "a file, a caption or the device changed"
            self.warnings.append(
                f"{name} differs from the shard that it replaces ({why}): a training run on these shards cannot be resumed"
            )

    def _write(self, path: Path, made: _Made, written: dict[str, Any] | None = None) -> str:
        """Write a shard and return its digest. `written` is the line that `shards.jsonl` already has for it."""
        # The line is written first. If the process is killed before the shard is written, the shard is a gap,
        # which the next ingest fills with the same items.
        rows = [row for of_item in made.rows.values() for row in of_item]
        entry = {"shard": path.name, "digest": shards.content_digest(rows), "items": made.fingerprints}
        if entry != written:
            _append(self.out / CONTENTS, entry)
        self._sync_journals()
        shards.write_shard(path, rows)
        self.clips += len(rows)
        return entry["digest"]

    def _sync_journals(self) -> None:
        """Write the journals to the disk, so that no power cut loses their lines but keeps the shard."""
        for journal in (self.out / CONTENTS, self.out / JOURNAL):
            if journal.exists():
                sync_file(journal)
        sync_folder(self.out)

    def reasons(self) -> dict[str, int]:
        """Return the number of skipped items by reason, the most frequent reason first."""
        return dict(Counter(entry["reason"] for entry in self.skipped.values()).most_common())

    def counts(self) -> dict[str, Any]:
        """Return the counts that the report contains."""
        return {"items": len(self.done) + len(self.skipped), "encoded": len(self.done), "clips": self.clips,
                "skipped_items": len(self.skipped), "reasons": self.reasons()}  # fmt: skip

    def failure(self, max_rate: float) -> str | None:
        """Return an error message if more than `max_rate` of the items were skipped, else None."""
        total = len(self.done) + len(self.skipped)
        if len(self.skipped) <= max_rate * total:
            return None
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons().items())
        return (
            f"{len(self.skipped)} of {total} items gave no clip ({reasons}), more than --max-failure-rate {max_rate:g}; they are "
            f"listed in {self.out / JOURNAL}; repair them and use --retry-skipped, or raise the rate"
        )


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a journal; remove an incomplete last line, which a killed process leaves.

    A journal may be of any length, a line may not. Raise RunError for a file that ingest would not write.
    """
    if not path.exists():
        return
    end = 0  # of the whole lines
    try:
        with open_regular(path) as file:
            for number in count(1):
                line = file.readline(MAX_LINE + 1)
                if len(line) > MAX_LINE:
                    raise RunError(
                        f"{path}, line {number} has more than the {MAX_LINE:,} bytes that ingest writes at most; delete that line, "
                        "or use another --out"
                    )
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                yield _entry(line, path.name == CONTENTS, f"{path}, line {number}")
    except OSError as error:
        raise RunError(f"cannot read {path} as a journal of ingest ({error.strerror}); delete it, or use another --out") from error
    if line:
        os.truncate(path, end)


def _entry(line: bytes, is_shard: bool, where: str) -> dict[str, Any]:
    """Return the entry of a line: of a shard, or of a skipped item. Raise RunError if ingest would not write such a line."""
    try:
        entry = parse_json(line.decode("utf-8", "replace"), where)
    except UserError as error:
        raise RunError(f"{error}; delete that line, or use another --out") from error
    fields = {"shard": str, "digest": str, "items": dict} if is_shard else {"id": str, "reason": str, "detail": str}
    whole = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())
    if whole and is_shard:
        marks = entry["items"].values()
        whole = bool(re.fullmatch(r"shard-[0-9]{6,}\.parquet", entry["shard"]))
    elif whole:
        marks = [entry["mark"]] if "mark" in entry else []
    if not whole or not all(isinstance(mark, str) for mark in marks):
        raise RunError(f"{where} is not a line that ingest writes; delete it, or use another --out")
    return entry


def _append(path: Path, entry: dict[str, Any]) -> None:
    line = json.dumps(entry) + "\n"
    if len(line) > MAX_LINE:
        raise RunError(f"a line of {path} would have {len(line):,} bytes, allowed are {MAX_LINE:,}; give a smaller --shard-clips")
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
