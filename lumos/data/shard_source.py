"""Training clips from ingested shards: codes straight from Parquet, in an order that is a function of the step alone."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lumos.data import shards
from lumos.data.loader import VALIDATION_STEP, Clip, StepShape
from lumos.errors import UserError

CYCLE = 1024
"""Steps after which the sizes come in the same order again; a size's share of them is its share of the clips."""
GROUPS_KEPT = 64


@dataclass(frozen=True)
class Pool:
    """The clips that steps of a kind draw from: rows of each size, and those kept out for validation."""

    sizes: list[np.ndarray]
    validation: np.ndarray


class ShardSource:
    """Clips of a folder of shards.

    A video step takes clips of at least `num_frames` frames, cut to their first `num_frames`, which is exact because the
    tokenizer is causal; shorter ones are not used. A picture step takes the one-frame clips, or if there are none the
    first frames of all clips. All clips of a step have one size; the sizes take turns by how many clips they have. Within
    a stage each clip of a size comes once before any comes again, in another order each time.

    `held_out` clips of each kind, and whatever else comes from the same items, are never trained on. UserError if the
    tokenizer differs, if the shards were ingested with another `size`, if a kind has no clip left, and for sizes that are
    no multiples of `size_unit`.
    """

    def __init__(
        self, path: str | Path, tokenizer: Any, *, kinds: list[str], num_frames: int, size_unit: int, seed: int, held_out: int,
        size: str | None = None,
    ):  # fmt: skip
        self.folder, self.seed = Path(path), seed
        description = shards.read_description(path)
        shards.check_tokenizer(description, tokenizer, "tokenizer.video")
        shards.check_size(description, size, path)
        self.latent_frames = {"image": 1, "video": (num_frames - 1) // tokenizer.temporal_compression + 1}
        self.index = ShardIndex(self.folder)
        self.pools = {kind: self._pool(kind, num_frames, held_out) for kind in kinds}
        used = [rows for pool in self.pools.values() for rows in pool.sizes]
        for rows in used:
            height, width = self.index.size_of(rows[0])
            if height % size_unit or width % size_unit:
                raise UserError(f"{path} has clips of {width}x{height} pixels; the model needs multiples of {size_unit}")
        height, width = self.index.size_of(max(used, key=len)[0])
        fps = int(description["settings"]["fps"])
        self.usual_shape = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        self.groups: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()
        self.lock = threading.Lock()  # batches are made by threads

    def clips(self, step: int, shape: StepShape, positions: range) -> list[Clip]:
        pool = self.pools[shape.kind]
        if step >= VALIDATION_STEP:
            rows = pool.validation[positions.start : positions.stop]
        else:
            rows = self._rows(pool, shape, positions)
        return [self._clip(int(row), shape.kind) for row in rows]

    def _rows(self, pool: Pool, shape: StepShape, positions: range) -> list[int]:
        place = (self.seed, shape.stage, 0 if shape.kind == "image" else 1)
        order, before = size_order(tuple(map(len, pool.sizes)), place)
        cycle, inside = divmod(shape.number, CYCLE)
        size = int(order[inside])
        earlier = int(cycle * before[-1, size] + before[inside, size]) * shape.batch_size  # clips of this size so far
        rows = pool.sizes[size]
        chosen = []
        for position in positions:
            epoch, i = divmod(earlier + position, len(rows))
            chosen.append(int(rows[permutation(len(rows), (*place, size, epoch))[i]]))
        return chosen

    def _clip(self, row: int, kind: str) -> Clip:
        found = self._read(*self.index.place_of(row))
        codes = found["codes"][: self.latent_frames[kind]]
        return Clip(None, found["caption"], found["fps"], f"{found['id']}#{found['clip']}", codes)

    def _read(self, shard: int, group: int, row: int) -> dict[str, Any]:
        with self.lock:
            if (shard, group) not in self.groups:
                self.groups[shard, group] = shards.read_group(self.index.paths[shard], group)
                if len(self.groups) > GROUPS_KEPT:
                    self.groups.popitem(last=False)
            self.groups.move_to_end((shard, group))
            return self.groups[shard, group][row]

    def _pool(self, kind: str, num_frames: int, held_out: int) -> Pool:
        rows = self.index.usable(num_frames if kind == "video" else 1)
        validation = self.index.first_by_hash(rows, held_out) if held_out else rows[:0]
        held = self.index.same_items(validation)
        training = np.setdiff1d(rows, held)
        if not len(training) or len(validation) < held_out:
            what = "one-frame clips" if kind == "image" or num_frames == 1 else f"clips of at least {num_frames} frames"
            frames = self.index.num_frames
            longest = int(frames.max()) if len(frames) else 0
            raise UserError(
                f"{self.folder} has {len(rows)} {what} (the longest of its {len(frames)} has {longest}), too few for training with "
                f"{held_out} kept for validation; ingest more, or lower data.num_frames or data.validation_clips"
            )
        sizes = self.index.size[training]
        return Pool([training[sizes == size] for size in np.unique(sizes)], validation)


class ShardIndex:
    """Where each clip is and how large, for all shards of a folder: a few numbers a clip, no codes."""

    def __init__(self, folder: Path):
        self.paths = shards.shard_paths(folder)
        names = ("shard", "group", "row", "frames", "size", "item")
        columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name in names}
        for number, path in enumerate(self.paths):
            metadata = shards.open_shard(path).metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            found = shards.read_columns(path, ["id", "num_frames", "height", "width"])
            columns["shard"].append(np.full(sum(counts), number))
            columns["group"].append(np.repeat(np.arange(len(counts)), counts))
            columns["row"].append(np.concatenate([np.arange(0), *map(np.arange, counts)]))
            columns["frames"].append(found["num_frames"])
            columns["size"].append(found["height"].astype(np.int64) << 32 | found["width"])
            columns["item"].append(np.array([item_number(id_) for id_ in found["id"]], dtype=np.int64))
        joined = {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}
        self.places = np.stack([joined["shard"], joined["group"], joined["row"]], axis=1).astype(np.int32)
        self.num_frames, self.size, self.item = joined["frames"], joined["size"], joined["item"]

    def place_of(self, row: int) -> tuple[int, int, int]:
        """(shard, row group, row in it)."""
        return tuple(map(int, self.places[row]))

    def size_of(self, row: int) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = int(self.size[row])
        return size >> 32, size & 0xFFFFFFFF

    def usable(self, num_frames: int) -> np.ndarray:
        """Rows of at least so many frames. For 1, a picture, the one-frame clips; if there are none, all."""
        rows = np.flatnonzero(self.num_frames >= num_frames if num_frames > 1 else self.num_frames == 1)
        return rows if len(rows) or num_frames > 1 else np.arange(len(self.num_frames))

    def first_by_hash(self, rows: np.ndarray, count: int) -> np.ndarray:
        """`count` rows that neither the seed nor the order of the shards decides: runs on one data set can be compared."""
        return rows[np.argsort(self.item[rows], kind="stable")][:count]

    def same_items(self, rows: np.ndarray) -> np.ndarray:
        """All rows that come from the items of these."""
        return np.flatnonzero(np.isin(self.item, self.item[rows]))


def item_number(id_: str) -> int:
    """A number for an item's id, evenly spread, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=64)
def size_order(counts: tuple[int, ...], place: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(size of each step of a cycle [CYCLE], how often each size comes before a step [CYCLE + 1, sizes]).

    Each size at least once, else in proportion to its count, in an order drawn from `place`.
    """
    if len(counts) > CYCLE:
        raise UserError(f"the shards have {len(counts)} different sizes; at most {CYCLE} are possible: ingest with buckets")
    spare = CYCLE - len(counts)
    wanted = np.array(counts) / sum(counts) * spare
    turns = np.floor(wanted).astype(int)
    turns[np.argsort(turns - wanted, kind="stable")[: spare - turns.sum()]] += 1
    order = np.random.default_rng(place).permutation(np.repeat(np.arange(len(counts)), turns + 1))
    before = np.concatenate([np.zeros((1, len(counts)), int), np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)])
    return order, before


@lru_cache(maxsize=16)
def permutation(length: int, place: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(place).permutation(length)
