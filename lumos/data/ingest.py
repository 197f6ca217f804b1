"""Videos and pictures to shards of codes: one function per item, spread by an engine, written so that a kill costs little.

The state of an ingest is its finished shards and the journal of skipped items: an item is done if it is in one of them.
Items are written in the order of the sources, all clips of an item in one shard, so that an interrupted and continued
ingest gives the same shards as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lumos.data import shards
from lumos.data.encode import ClipSettings, Skip
from lumos.data.engines import Engine, LocalEngine, Work
from lumos.data.manifest import Item, items
from lumos.data.ray_engine import RayEngine
from lumos.errors import RunError, UserError
from lumos.files import only_writer, write_json
from lumos.runtime import versions
from tokenizer import VideoTokenizer

ENGINES: dict[str, type[Engine]] = {"local": LocalEngine, "ray": RayEngine}
JOURNAL, REPORT = "skipped.jsonl", "report.json"
RATE_FROM = 50
"""Items before which the failure rate does not stop a run: one bad file of the first two says nothing."""


def ingest(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path,
    settings: ClipSettings | None = None,
    *,
    captions: str | Path | None = None,
    engine: str = "local",
    workers: int = 1,
    max_failure_rate: float = 0.1,
    shard_clips: int = 1000,
    retry_skipped: bool = False,
    device: str | None = None,
    on_item: Callable[[int, int], None] = lambda done, skipped: None,
) -> dict[str, Any]:
    """Encode what is new in the sources into the folder `out`; returns the report, which is also in out/report.json.

    UserError for settings that cannot work or differ from those of the folder. RunError when more than `max_failure_rate`
    of all items so far gave no clip, for a damaged shard, and when another ingest writes into the folder.
    """
    out, settings, started = Path(out), settings or ClipSettings(), time.perf_counter()
    for name, value in (("workers", workers), ("shard_clips", shard_clips)):
        if value < 1:
            raise UserError(f"{name} {value} is not allowed; give at least 1")
    if not 0 <= max_failure_rate <= 1:
        raise UserError(f"max_failure_rate {max_failure_rate} is not allowed; it is a share from 0 to 1")
    if engine not in ENGINES:
        raise UserError(f"engine {engine!r} is unknown; allowed: {', '.join(ENGINES)}")
    todo = items(sources, captions)
    shards.parquet()
    model = VideoTokenizer.from_pretrained(tokenizer, device="cpu")
    settings.check(model)
    spread = ENGINES[engine](Work(str(tokenizer), settings, device), workers)
    with only_writer(out, "ingest"):
        _claim(out, settings, model, tokenizer)
        state = _State(out, retry_skipped)
        earlier = len(state.done) + len(state.skipped)
        fresh = (item for item in todo if item.id not in state.done and item.id not in state.skipped)
        rows: list[dict[str, Any]] = []
        with closing(spread.results(fresh)) as results:
            for item, result in results:
                if isinstance(result, Skip):
                    state.skip(item, result)
                else:
                    state.done.add(item.id)
                    rows += result
                if len(rows) >= shard_clips:
                    state.write(rows)
                    rows = []
                on_item(len(state.done), len(state.skipped))
                if len(state.done) + len(state.skipped) >= RATE_FROM and state.failure(max_failure_rate):
                    break
        if rows:
            state.write(rows)
        problem = state.failure(max_failure_rate)
        report = {
            **state.counts(), "new_items": len(state.done) + len(state.skipped) - earlier, "stopped": problem,
            "skipped": [{"id": id_, **why} for id_, why in list(state.skipped.items())[:1000]], "all_skipped": JOURNAL,
            "settings": asdict(settings), "sources": [str(source) for source in sources], "workers": workers, "engine": engine,
            "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
        }  # fmt: skip
        write_json(out / REPORT, report)
    if not state.done and not state.skipped:
        raise UserError(f"there is nothing to ingest in {', '.join(map(str, sources))}: no media file and no row")
    if problem:
        raise RunError(problem)
    return report


class _State:
    """What an output folder holds: derived from its finished shards and its journal, and kept up to date while writing."""

    def __init__(self, out: Path, retry_skipped: bool):
        self.out, self.done, self.clips = out, set(), 0
        for path in shards.shard_paths(out):
            ids = shards.read_columns(path, ["id"])["id"]
            self.done.update(ids)
            self.clips += len(ids)
        self.journal = out / JOURNAL
        self.skipped: dict[str, dict[str, str]] = {}
        if retry_skipped:
            self.journal.unlink(missing_ok=True)
        if self.journal.is_file():
            data = self.journal.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line off
            os.truncate(self.journal, len(whole))
            for line in whole.decode("utf-8").splitlines():
                entry = json.loads(line)
                if entry["id"] not in self.done:
                    self.skipped[entry["id"]] = {"reason": entry["reason"], "detail": entry["detail"]}

    def skip(self, item: Item, why: Skip) -> None:
        self.skipped[item.id] = {"reason": why.reason, "detail": why.detail}
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": item.id, "reason": why.reason, "detail": why.detail}) + "\n")

    def write(self, rows: list[dict[str, Any]]) -> None:
        shards.write_shard(shards.next_shard(self.out), rows)
        self.clips += len(rows)

    def reasons(self) -> dict[str, int]:
        return dict(Counter(entry["reason"] for entry in self.skipped.values()).most_common())

    def counts(self) -> dict[str, Any]:
        return {"items": len(self.done) + len(self.skipped), "encoded": len(self.done), "clips": self.clips,
                "skipped_items": len(self.skipped), "reasons": self.reasons()}  # fmt: skip

    def failure(self, max_rate: float) -> str | None:
        total = len(self.done) + len(self.skipped)
        if len(self.skipped) <= max_rate * total:
            return None
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons().items())
        return (
            f"{len(self.skipped)} of {total} items gave no clip ({reasons}), more than --max-failure-rate {max_rate:g}; they are "
            f"listed in {self.journal}; mend them and use --retry-skipped, or raise the rate"
        )


def _claim(out: Path, settings: ClipSettings, model: VideoTokenizer, tokenizer: str | Path) -> None:
    """Write dataset.json, or check that this ingest fits the one that is there."""
    description = {
        "format": shards.FORMAT, "tokenizer": shards.tokenizer_facts(model) | {"folder": str(tokenizer)},
        "settings": asdict(settings), "versions": versions(),
    }  # fmt: skip
    if not (out / shards.DESCRIPTION).exists():
        if shards.shard_paths(out):
            raise UserError(f"{out} holds shards, but no {shards.DESCRIPTION}; choose another folder")
        write_json(out / shards.DESCRIPTION, description)
        return
    old = shards.read_description(out)
    if old["tokenizer"]["fingerprint"] != description["tokenizer"]["fingerprint"]:
        folder = old["tokenizer"].get("folder")
        raise UserError(f"{out} was made with another tokenizer ({folder}), not with {tokenizer}; use another folder")
    for name, value in description["settings"].items():
        if old["settings"].get(name) != value:
            raise UserError(f"{out} was made with {name} {old['settings'].get(name)}, not {value}; use that, or another folder")
