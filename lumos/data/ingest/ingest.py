"""Videos and pictures to shards of codes: one function per item, spread by an engine, written so that a kill costs little.

Items are written in the order of the sources, all clips of an item in one shard, so that an interrupted and continued
ingest gives the same shards as an uninterrupted one; `state` says how.
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
from lumos.durable import sweep_folder
from lumos.errors import RunError, UserError, printable
from lumos.files import only_writer, write_json
from lumos.runtime import versions
from tokenizer import VideoTokenizer

EXECUTORS: dict[str, type[Executor]] = {"local": LocalExecutor, "ray": RayExecutor}
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
    workers: int = 0,
    item_timeout: float | None = None,
    max_failure_rate: float = 0.1,
    shard_clips: int = 1000,
    retry_skipped: bool = False,
    device: str | None = None,
    on_item: Callable[[int, int], None] = lambda done, skipped: None,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Encode what is new in the sources into the folder `out`; returns the report, which is also in out/report.json.

    `workers` 0 is this process. With processes of their own an item that ends its worker twice, or takes more than
    `item_timeout` seconds (None: half an hour), is skipped. `warn` is told what the user should know of changed items and
    shards. UserError for settings that cannot work or differ from those of the folder, and for other items under the names
    of some that are in it. RunError when more than `max_failure_rate` of all items so far gave no clip, for a damaged shard,
    when another ingest writes into the folder, and unless every item of the sources is in a shard or was skipped.
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
    todo = items(sources, captions)
    shards.parquet()
    model = VideoTokenizer.from_pretrained(tokenizer, device="cpu")
    settings.check(model)
    executor = EXECUTORS[engine](EncoderSpec(str(tokenizer), settings, device), workers, item_timeout)
    with only_writer(out, "ingest"):
        sweep_folder(out)
        _claim(out, settings, model, tokenizer)
        state = State(out, shard_clips=shard_clips, retry_skipped=retry_skipped)
        if state.fingerprints:
            state.check(items(sources, captions))
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
        for warning in state.warnings:
            warn(printable(warning))
        problem = lost or state.failure(max_failure_rate)
        report = {
            **state.counts(), "new_items": len(state.done) + len(state.skipped) - earlier, "seen_items": tally.seen,
            "stopped": problem, "warnings": state.warnings,
            "skipped": [{"id": id_, **why} for id_, why in list(state.skipped.items())[:1000]], "all_skipped": JOURNAL,
            "settings": asdict(settings), "sources": [as_text(str(source)) for source in sources], "workers": workers,
            "engine": engine,
            "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
        }  # fmt: skip
        write_json(out / shards.REPORT, report)
    if problem:
        raise RunError(problem)
    if not state.done and not state.skipped:
        raise UserError(f"there is nothing to ingest in {', '.join(map(str, sources))}: no media file and no row")
    return report


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
