"""Ingest: an executor encodes the items of the sources, and this process writes their codes into shards.

The items are written in the order of the sources, and all clips of an item go into one shard. An
ingest that was interrupted and continued therefore gives the same shards as one that was not;
`lumos.data.ingest.state` explains how.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lumos.data.ingest.encode import ClipSettings, EncoderSpec, Skip
from lumos.data.ingest.executors import Executor, LocalExecutor
from lumos.data.ingest.item import as_text
from lumos.data.ingest.manifest import items
from lumos.data.ingest.ray_executor import RayExecutor
from lumos.data.ingest.state import JOURNAL, State
from lumos.data.ingest.tally import Tally, missing_in_folder
from lumos.data.shards import format as shards
from lumos.data.shards.description import DESCRIPTION, FORMAT, REPORT, read_description
from lumos.durable import sweep_folder
from lumos.errors import RunError, UserError, printable
from lumos.files import only_writer, write_json
from lumos.runtime import versions
from tokenizer import VideoTokenizer
from tokenizer.fingerprint import tokenizer_facts

EXECUTORS: dict[str, type[Executor]] = {"local": LocalExecutor, "ray": RayExecutor}
RATE_FROM = 50
"""Number of items from which the failure rate can stop a run. The rate of fewer items says little."""


def ingest(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path,
    settings: ClipSettings | None = None,
    *,
    captions: str | Path | None = None,
    caption: str | None = None,
    engine: str = "local",
    workers: int = 0,
    item_timeout: float | None = None,
    max_failure_rate: float = 0.1,
    shard_clips: int = 1000,
    retry_skipped: bool = False,
    device: str | None = None,
    on_item: Callable[[int, int], None] = lambda done, skipped: None,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Encode the new items of the sources into the folder `out`.

    Return the report, which is also written to out/report.json.

    `captions` and `caption` are those of `lumos.data.ingest.manifest.items`.

    With `workers` 0 the local executor runs the items in this process. With worker processes, an item
    that ends its worker twice or takes more than `item_timeout` seconds (None: half an hour) is
    skipped. `on_item` is called after each item with the numbers of items in shards and of skipped
    items. `warn` is called with each warning about changed items or shards.

    Raise UserError for settings that cannot work or that differ from those of the folder, and if other
    items have the names of items that are in the folder. Raise RunError if more than
    `max_failure_rate` of all items of the folder gave no clip, if a shard is damaged, if another ingest writes into
    the folder, and if in the end an item of the sources is neither in a shard nor skipped.
    """
    out, settings, started = Path(out), settings or ClipSettings(), time.perf_counter()
    for name, value, least in (("workers", workers, 0), ("shard_clips", shard_clips, 1)):
        if value < least:
            raise UserError(f"{name} {value} is not allowed; give at least {least}")
    if item_timeout is not None and not item_timeout > 0:
        raise UserError(f"item_timeout {item_timeout} is not allowed; give seconds above 0")
    if not 0 <= max_failure_rate <= 1:
        raise UserError(f"max_failure_rate {max_failure_rate} is not allowed; it is a share from 0 to 1")
    if engine not in EXECUTORS:
        raise UserError(f"engine {engine!r} is unknown; allowed: {', '.join(EXECUTORS)}")
    said: list[str] = []
    todo = items(sources, captions, said.append, caption)
    shards.parquet()
    model = VideoTokenizer.from_pretrained(tokenizer, device="cpu")
    settings.check(model)
    executor = EXECUTORS[engine](EncoderSpec(str(tokenizer), settings, device), workers, item_timeout)
    with only_writer(out, "ingest"):
        sweep_folder(out)
        _claim(out, settings, model, tokenizer)
        state = State(out, shard_clips=shard_clips, retry_skipped=retry_skipped)
        if state.fingerprints:
            state.check(items(sources, captions, caption=caption))
        earlier = len(state.done) + len(state.skipped)
        whole, tally = True, Tally(todo, state.knows)
        with closing(executor.results(tally.todo())) as results:
            for item, result in results:
                tally.back(item)
                if isinstance(result, Skip):
                    state.skip(item, result)
                else:
                    state.add(item, result)
                on_item(len(state.done), len(state.skipped))
                if len(state.done) + len(state.skipped) >= RATE_FROM and state.failure(max_failure_rate):
                    whole = False
                    break
        lost = tally.lost() if whole else None
        state.finish(whole and not lost)
        lost = lost or missing_in_folder(state)
        warnings = [*state.warnings, *said]
        for warning in warnings:
            warn(printable(warning))
        problem = lost or state.failure(max_failure_rate)
        report = {
            **state.counts(), "new_items": len(state.done) + len(state.skipped) - earlier, "seen_items": tally.seen,
            "stopped": problem, "warnings": warnings,
            "skipped": [{"id": id_, **why} for id_, why in list(state.skipped.items())[:1000]], "all_skipped": JOURNAL,
            "settings": asdict(settings), "sources": [as_text(str(source)) for source in sources], "workers": workers,
            "engine": engine,
            "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
        }  # fmt: skip
        write_json(out / REPORT, report)
    if problem:
        raise RunError(problem)
    if not state.done and not state.skipped:
        raise UserError(f"there is nothing to ingest in {', '.join(map(str, sources))}: no media file and no row")
    return report


def _claim(out: Path, settings: ClipSettings, model: VideoTokenizer, tokenizer: str | Path) -> None:
    """Write dataset.json, or check that this ingest matches the dataset.json in the folder.

    Raise UserError if the folder was made with another tokenizer or other settings.
    """
    description = {
        "format": FORMAT, "tokenizer": tokenizer_facts(model) | {"folder": str(tokenizer)},
        "settings": asdict(settings), "versions": versions(),
    }  # fmt: skip
    if not (out / DESCRIPTION).exists():
        if shards.shard_paths(out):
            raise UserError(f"{out} holds shards, but no {DESCRIPTION}; choose another folder")
        write_json(out / DESCRIPTION, description)
        return
    old = read_description(out)
    if old["tokenizer"]["fingerprint"] != description["tokenizer"]["fingerprint"]:
        folder = old["tokenizer"].get("folder")
        raise UserError(f"{out} was made with another tokenizer ({folder}), not with {tokenizer}; use another folder")
    before = {"per_frame_codes": False} | old["settings"]  # earlier versions had no such setting
    for name, value in description["settings"].items():
        if before.get(name) != value:
            raise UserError(f"{out} was made with {name} {before.get(name)}, not {value}; use that, or another folder")
