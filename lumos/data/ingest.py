"""Videos and pictures to shards of codes: one function per item, spread by an engine, written so that a kill costs little.

The state of an ingest is its finished shards and the journal of skipped items: an item is done if it is in one of them.
Items are written in the order of the sources, all clips of an item in one shard, so that an interrupted and continued
ingest gives the same shards as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumos.data import shards
from lumos.data.buckets import bucket_for
from lumos.data.manifest import Item, as_file, items
from lumos.errors import RunError, UserError
from lumos.files import write_json
from lumos.frames import fit, from_uint8
from lumos.pipeline import pick_device
from lumos.runtime import versions
from lumos.video_reading import count_frames, read_image, read_video
from tokenizer import VideoTokenizer

TARGET_SIZES = {"256p": 352, "384p": 528, "480p": 656}  # reference, section 8.2
JOURNAL, REPORT = "skipped.jsonl", "report.json"
MISSING, UNREADABLE, TOO_SHORT = "missing file", "unreadable", "too short"
RATE_FROM = 50
"""Items before which the failure rate does not stop a run: one bad file of the first two says nothing."""


@dataclass(frozen=True)
class ClipSettings:
    """What a clip is. A folder of shards holds clips of one such setting.

    `fps` frames a second, `size` 256p, 384p, 480p (buckets by aspect ratio) or HEIGHTxWIDTH, `num_frames` of a clip, at
    least `min_frames` from a video that has fewer (None: such a video is skipped), up to `clips_per_video` from a long one.
    """

    fps: int = 12
    size: str = "256p"
    num_frames: int = 25
    min_frames: int | None = None
    clips_per_video: int = 1

    def check(self, tokenizer: VideoTokenizer) -> None:
        """UserError for what cannot be encoded."""
        step, stride = tokenizer.temporal_compression, tokenizer.spatial_compression
        for name in ("num_frames", "min_frames"):
            value = getattr(self, name)
            if value is not None and (value < 1 or (value - 1) % step):
                raise UserError(f"{name} {value} is not allowed; it must be 1 + a multiple of {step}")
        if self.min_frames is not None and self.min_frames > self.num_frames:
            raise UserError(f"min_frames {self.min_frames} is above num_frames {self.num_frames}")
        if self.clips_per_video < 1:
            raise UserError(f"clips_per_video {self.clips_per_video} is not allowed; give at least 1")
        if not 1 <= self.fps <= 1000:
            raise UserError(f"fps {self.fps} is not allowed; it must be 1 to 1000")
        height, width = self.target(1, 1)
        if height % stride or width % stride or not height or not width:
            raise UserError(f"size {self.size}: height and width must be multiples of {stride}")
        if tokenizer.num_codes > 1 << 16:
            raise UserError(f"the tokenizer has {tokenizer.num_codes} codes; shards hold at most {1 << 16}")

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which a picture of this size is fitted."""
        if self.size in TARGET_SIZES:
            return bucket_for(height, width, TARGET_SIZES[self.size])
        if not re.fullmatch(r"\d{1,5}x\d{1,5}", self.size):
            raise UserError(f"size {self.size!r} is unknown; allowed: {', '.join(TARGET_SIZES)} or HEIGHTxWIDTH, for example 64x64")
        down, across = self.size.split("x")
        return int(down), int(across)


class Skip(Exception):
    """An item that gives no clip: `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


Result = list[dict[str, Any]] | Skip
"""The rows of an item's clips, or why there are none."""


@torch.no_grad()
def ingest_item(item: Item, settings: ClipSettings, tokenizer: VideoTokenizer) -> Result:
    """Decode, fit to the bucket and encode one item: what every engine maps over the items."""
    try:
        if item.problem:
            raise Skip(*item.problem)
        if not Path(item.path).is_file():
            raise Skip(MISSING, f"there is no file {item.path}")
        with as_file(item) as file:
            clips = _clips(item, file, settings, tokenizer.temporal_compression)
    except Skip as skip:
        return skip
    except (UserError, OSError) as error:
        return Skip(UNREADABLE, str(error))
    weight = next(tokenizer.parameters())
    video = from_uint8(np.stack([frames for _, frames in clips])).to(weight)  # [B, 3, T, H, W]
    rows = []
    for number, ((start, frames), codes) in enumerate(zip(clips, tokenizer.encode(video).cpu().numpy(), strict=True)):
        codes = codes.astype(np.uint16)  # [t, h, w]
        count, height, width = frames.shape[:3]
        row = {
            "id": item.id, "clip": number, "codes": codes, "num_frames": count, "height": height, "width": width,
            "fps": settings.fps if count > 1 else 1, "caption": item.caption,
            "source": f"{item.path}/{item.member}" if item.member else item.path, "start": start,
            "checksum": shards.checksum(codes, item.caption),
        }  # fmt: skip
        rows.append(row)
    return rows


def _clips(item: Item, file: Path, settings: ClipSettings, step: int) -> list[tuple[float, np.ndarray]]:
    """(start in s, frames uint8 [T, H, W, 3]) of each clip; all of one item have one size."""
    total = 1 if item.is_picture else count_frames(file, settings.fps)
    if item.is_picture and file.suffix.lower() in (".png", ".webp"):  # may be animated
        total = count_frames(file, settings.fps)
    if item.is_picture and total == 1:
        frames = read_image(file)[None]
        return [(0.0, fit(frames, *settings.target(*frames.shape[1:3])))]
    available = total - item.start * settings.fps
    if item.end is not None:
        available = min(available, (item.end - item.start) * settings.fps)
    available = int(available + 1e-3)
    count = settings.num_frames
    if available < count:
        count = (available - 1) // step * step + 1
        least = settings.min_frames or settings.num_frames
        if count < max(least, 1):
            read_video(file, max_seconds=60, size=settings.target(1, 1))  # a file that was cut off says so here
            name = item.member or item.path
            raise Skip(TOO_SHORT, f"{name}: {max(available, 0)} frames at {settings.fps} fps, {least} are needed")
    size = settings.target(*read_video(file, num_frames=1)[0].shape[1:3])
    starts = [item.start + first / settings.fps for first in clip_starts(available, count, settings.clips_per_video)]
    return [(s, read_video(file, fps=settings.fps, num_frames=count, start=s, size=size)[0]) for s in starts]


def clip_starts(available: int, num_frames: int, clips: int) -> list[int]:
    """First frames of up to `clips` clips that do not overlap, with even gaps: one clip is the middle of the video."""
    clips = min(clips, available // num_frames)
    spare = available - clips * num_frames
    return [spare * (i + 1) // (clips + 1) + i * num_frames for i in range(clips)]


@dataclass(frozen=True)
class Work:
    """What a worker needs to know to do :func:`ingest_item`."""

    tokenizer: str
    settings: ClipSettings
    device: str
    threads: int


_worker: Callable[[Item], Result]


def _start_worker(work: Work) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(work.threads)
    tokenizer = VideoTokenizer.from_pretrained(work.tokenizer, device=work.device)
    _worker = lambda item: ingest_item(item, work.settings, tokenizer)  # noqa: E731


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot stop its workers: they wait for work for ever, and hold memory."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _do_in_worker(item: Item) -> Result:
    return _worker(item)


def local_engine(work: Work, tokenizer: VideoTokenizer, todo: Iterator[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Results in the order of `todo`: of this process with one worker, else of so many processes."""
    if workers == 1:
        for item in todo:
            yield item, ingest_item(item, work.settings, tokenizer)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(work,))
    waiting: deque = deque()
    try:
        for item in todo:
            waiting.append((item, pool.submit(_do_in_worker, item)))
            if len(waiting) >= 4 * workers:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    except BrokenProcessPool as error:
        near = waiting[0][0].id if waiting else "the last item"
        raise RunError(
            f"a worker process ended unexpectedly near {near} (out of memory?); run the same command again, or with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


ENGINES = {"local": local_engine}


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
    model = VideoTokenizer.from_pretrained(tokenizer, device=str(pick_device(device)))
    settings.check(model)
    work = Work(str(tokenizer), settings, str(pick_device(device)), max(1, (os.cpu_count() or 1) // workers))
    with _only_writer(out):
        _claim(out, settings, model, tokenizer)
        state = _State(out, retry_skipped)
        earlier = len(state.done) + len(state.skipped)
        fresh = (item for item in todo if item.id not in state.done and item.id not in state.skipped)
        rows: list[dict[str, Any]] = []
        with closing(ENGINES[engine](work, model, fresh, workers)) as results:
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


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Keeps a second ingest out of the folder; the lock goes with the process, however that ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another folder") from error
    with lock:
        try:
            import fcntl
        except ImportError:  # Windows: no lock
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another ingest is writing into {out}; wait for it, or use another folder") from error
        yield
