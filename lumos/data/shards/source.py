"""Training clips from ingested shards, local or behind a URL: codes straight from Parquet, in the order of `order`."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_STEP
from lumos.data.shards import format as shards
from lumos.data.shards.order import EpochOrder
from lumos.data.shards.reader import ShardReader
from lumos.data.shards.remote import LocalCopies, Remote, location
from lumos.data.source import Clip
from lumos.errors import UserError

FOOTERS_AT_ONCE = 16
BYTES_PER_CODE = 2.1
"""Of a shard, with all that is not codes."""


@dataclass(frozen=True)
class ClipPool:
    """The clips that steps of a kind draw from and those kept out for validation, as rows of the index."""

    rows: np.ndarray
    order: EpochOrder
    validation: np.ndarray


class ShardSource:
    """Clips of a folder of shards.

    A video step takes clips of at least `min_frames` frames, cut to their first `num_frames` if they have more, which is
    exact because the tokenizer is causal; shorter ones are not used. A picture step takes the one-frame clips, or if there
    are none the first frames of all clips. Clips of all sizes come together, in the order of :class:`EpochOrder`.

    `held_out` clips of each kind, and whatever else comes from the same items, are never trained on. Shards behind a URL are
    read from `copies`, which they need and others have not. UserError if the tokenizer differs, if the shards were ingested
    with another `size`, if a kind has no clip left, for sizes that are no multiples of `size_unit`, and for copies that cannot
    hold what is in use at a time.
    """

    def __init__(
        self, path: str | Path, tokenizer: Any, *, kinds: list[str], num_frames: int, min_frames: int | None = None, size_unit: int,
        seed: int, held_out: int, shuffle_shards: int = 16, copies: LocalCopies | None = None, size: str | None = None,
    ):  # fmt: skip
        self.folder, min_frames = location(path), min_frames or num_frames
        description = shards.read_description(self.folder)
        shards.check_tokenizer(description, tokenizer, "tokenizer.video")
        shards.check_size(description, size, self.folder)
        self.index = ShardIndex(self.folder)
        self.latent_frames = {"image": 1, "video": (num_frames - 1) // tokenizer.temporal_compression + 1}
        usable = {kind: self.index.usable(min_frames if kind == "video" else 1) for kind in kinds}
        validation = {kind: self.index.first_by_hash(rows, held_out) for kind, rows in usable.items()}
        held = self.index.same_items(np.concatenate([*validation.values()]))
        self.pools = {}
        for kind in kinds:
            rows = np.setdiff1d(usable[kind], held)
            if not len(rows) or len(validation[kind]) < held_out:
                raise self._too_few(kind, len(usable[kind]), num_frames, min_frames, held_out)
            codes = self.index.codes(rows, tokenizer, self.latent_frames[kind])
            order = EpochOrder(self.index.places[rows, 0], codes, shuffle_shards=shuffle_shards, seed=seed)
            self.pools[kind] = ClipPool(rows, order, validation[kind])
        self.most_codes = {kind: int(pool.order.codes.max()) for kind, pool in self.pools.items()}
        self.identity = {
            "the content of data.path": self.index.content,
            "the number of clips held out for validation": held_out,
            "data.shuffle_shards": shuffle_shards,
        }
        height, width = self._usual_size(size_unit)
        fps = int(description["settings"]["fps"])
        self.usual_shape = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        if copies:
            self._check_room(tokenizer, shuffle_shards, copies.limit)
        self.reader = ShardReader(self.index.paths, self.index.digests, copies, description["tokenizer"])

    def clips_in(self, shape: StepShape) -> int:
        return len(self.pools[shape.kind].order.clips(shape))

    def clips(self, step: int, shape: StepShape, positions: range) -> list[Clip]:
        pool = self.pools[shape.kind]
        if step >= VALIDATION_STEP:
            rows = pool.validation[list(positions)]
        else:
            rows = pool.rows[pool.order.clips(shape)[list(positions)]]
            if self.reader.copies:
                self.reader.ask_for(pool.order.next_shards(shape), shape.kind)
        return [self._clip(int(row), shape.kind) for row in rows]

    def _clip(self, row: int, kind: str) -> Clip:
        found = self.reader.read(*self.index.place_of(row))
        codes = found["codes"][: self.latent_frames[kind]]
        return Clip(None, found["caption"], found["fps"], f"{found['id']}#{found['clip']}", codes)

    def _too_few(self, kind: str, found: int, num_frames: int, min_frames: int, held_out: int) -> UserError:
        frames = self.index.num_frames
        what = "clips to take pictures from" if kind == "image" or num_frames == 1 else f"clips of at least {min_frames} frames"
        longest = int(frames.max()) if len(frames) else 0
        return UserError(
            f"{self.folder} has {found} {what} (the longest of its {len(frames)} has {longest}), too few for training with "
            f"{held_out} kept for validation; ingest more, or lower data.num_frames, data.min_frames or data.validation_clips"
        )

    def _usual_size(self, unit: int) -> tuple[int, int]:
        """The most frequent (height, width); UserError if a size does not fit the model."""
        rows = np.concatenate([pool.rows for pool in self.pools.values()])
        sizes, counts = np.unique(np.stack([self.index.height[rows], self.index.width[rows]]), axis=1, return_counts=True)
        for height, width in sizes.T.tolist():
            if height % unit or width % unit:
                raise UserError(f"{self.folder} has clips of {width}x{height} pixels; the model needs multiples of {unit}")
        height, width = sizes[:, counts.argmax()].tolist()
        return height, width

    def _check_room(self, tokenizer: Any, shuffle_shards: int, limit: int) -> None:
        codes = np.bincount(self.index.places[:, 0], self.index.codes(np.arange(len(self.index.places)), tokenizer))
        largest = np.sort(codes)[::-1] * BYTES_PER_CODE
        needed = int(largest[: 2 * shuffle_shards * len(self.pools)].sum())  # in use, and next
        if limit < needed:
            raise UserError(
                f"data.cache_gb {limit / 1e9:g} is too little for {self.folder}: with data.shuffle_shards {shuffle_shards}, "
                f"{needed / 1e9:.3g} GB of it are in use at a time; raise the one or lower the other"
            )


class ShardIndex:
    """Where each clip is and how large, for all shards of a folder: a few numbers a clip, read from the shards' footers.

    RunError if there are fewer clips than the folder's last ingest counted.
    """

    def __init__(self, folder: Path | Remote):
        self.paths = shards.shard_paths(folder)
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            found = list(pool.map(shards.read_facts, self.paths))
        self.digests = [facts.digest for facts in found]
        places = [
            np.stack([np.full(n, shard), np.full(n, group), np.arange(n)], axis=1)
            for shard, facts in enumerate(found)
            for group, n in enumerate(facts.rows)
        ]
        self.places = np.concatenate([np.zeros((0, 3), np.int32), *places], dtype=np.int32)  # [N, 3] shard, row group, row in it
        self.num_frames, self.height, self.width, self.item = (
            np.concatenate([np.zeros(0, np.int64), *(getattr(facts, name) for facts in found)])
            for name in ("num_frames", "height", "width", "item")
        )
        shards.check_count(folder, len(self.places))
        names = [[path.name, digest] for path, digest in zip(self.paths, self.digests, strict=True)]
        total = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
        self.content = f"{len(names)} shards with {len(self.places)} clips (digest {total})"

    def place_of(self, row: int) -> tuple[int, int, int]:
        """(shard, row group, row in it)."""
        return tuple(map(int, self.places[row]))

    def usable(self, num_frames: int) -> np.ndarray:
        """Rows of at least so many frames. For 1, a picture, the one-frame clips; if there are none, all."""
        rows = np.flatnonzero(self.num_frames >= num_frames if num_frames > 1 else self.num_frames == 1)
        return rows if len(rows) or num_frames > 1 else np.arange(len(self.num_frames))

    def codes(self, rows: np.ndarray, tokenizer: Any, most_frames: int | None = None) -> np.ndarray:
        """How many codes each row has, in its first `most_frames` latent frames if that is given."""
        latent = (self.num_frames[rows] - 1) // tokenizer.temporal_compression + 1
        latent = latent if most_frames is None else np.minimum(latent, most_frames)
        return latent * (self.height[rows] // tokenizer.spatial_compression) * (self.width[rows] // tokenizer.spatial_compression)

    def first_by_hash(self, rows: np.ndarray, count: int) -> np.ndarray:
        """`count` rows that neither the seed nor the order of the shards decides: runs on one data set can be compared."""
        return rows[np.argsort(self.item[rows], kind="stable")][:count]

    def same_items(self, rows: np.ndarray) -> np.ndarray:
        """All rows that come from the items of these."""
        return np.flatnonzero(np.isin(self.item, self.item[rows]))
