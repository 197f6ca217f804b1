"""A source of training clips that reads codes from ingested shards, local or behind a URL."""

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
from lumos.data.shards.cache import ShardReader
from lumos.data.shards.description import check_count, check_frame_codes, check_size, check_tokenizer, read_description
from lumos.data.shards.order import EpochOrder
from lumos.data.shards.remote import LocalCopies, Remote, location
from lumos.data.source import TrainingClip
from lumos.data.trained_on import MAX_WORDS, TrainedOn, words_of
from lumos.errors import RunError, UserError

FOOTERS_AT_ONCE = 16
MAX_CAPTIONS = 200_000
"""The most captions whose words are collected."""
BYTES_PER_CODE = 2.1
"""Bytes of a shard per code, including the other columns."""


@dataclass(frozen=True)
class ClipPool:
    """The clips of a kind ("image" or "video"), as rows of the `ShardIndex`."""

    rows: np.ndarray  # clips for training
    order: EpochOrder  # order of `rows`
    validation: np.ndarray  # clips held out for validation


class ShardSource:
    """A source of the clips of a folder of shards.

    A video step uses clips of at least `min_frames` frames. Of a longer clip it uses the codes of the
    first `num_frames` frames, which are exactly the codes of the cut clip because the tokenizer is
    causal. With `per_frame` it uses the codes of single frames instead. With `last_frame` each clip has the
    codes of its last frame as a picture too. A picture step uses the clips of
    one frame or, if there are none, the first frames of all clips. Clips of different sizes are mixed,
    in the order of :class:`EpochOrder`.

    `held_out` clips of each kind are for validation. Training uses neither these clips nor others of the
    same items. Shards behind a URL need `copies`; for local shards it is None.

    Raise UserError if another tokenizer made the shards, if they lack the codes of single frames that
    `per_frame` and `last_frame` need, if they were ingested with another `size`, if too few clips of a kind are left, if
    a height or width is not a multiple of `size_unit`, or if the limit of `copies` is too small for the
    shards that are in use at a time.
    """

    def __init__(
        self, path: str | Path, tokenizer: Any, *, kinds: list[str], num_frames: int, min_frames: int | None = None, size_unit: int,
        seed: int, held_out: int, shuffle_shards: int = 16, copies: LocalCopies | None = None, size: str | None = None,
        per_frame: bool = False, last_frame: bool = False,
    ):  # fmt: skip
        self.folder, min_frames = location(path), min_frames or num_frames
        description = read_description(self.folder)
        check_tokenizer(description, tokenizer, "tokenizer.video")
        check_size(description, size, self.folder)
        if per_frame or last_frame:
            check_frame_codes(description, self.folder, "patterns.ends" if last_frame else "latents per_frame")
        self.last_frame = last_frame
        self.column, self.step = (shards.FRAME_CODES, 1) if per_frame else ("codes", tokenizer.temporal_compression)
        self.stride = tokenizer.spatial_compression
        self.index = ShardIndex(self.folder)
        self.latent_frames = {"image": 1, "video": (num_frames - 1) // self.step + 1}
        usable = {kind: self.index.usable(min_frames if kind == "video" else 1) for kind in kinds}
        validation = {kind: self.index.first_by_hash(rows, held_out) for kind, rows in usable.items()}
        held = self.index.same_items(np.concatenate([*validation.values()]))
        self.pools = {}
        for kind in kinds:
            rows = np.setdiff1d(usable[kind], held)
            if not len(rows) or len(validation[kind]) < held_out:
                raise self._too_few(kind, len(usable[kind]), num_frames, min_frames, held_out)
            codes = self.index.codes(rows, self.step, self.stride, self.latent_frames[kind])
            if last_frame and kind == "video":
                codes = codes + self.index.codes(rows, self.step, self.stride, 1)
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
            steps = {tokenizer.temporal_compression, self.step} | ({1} if last_frame else set())
            self._check_room(steps, shuffle_shards, copies.limit)
        self.reader = ShardReader(self.index.paths, self.index.digests, copies, description["tokenizer"])

    def clips_in(self, shape: StepShape) -> int:
        return len(self.pools[shape.kind].order.clips(shape))

    def clips(self, step: int, shape: StepShape, positions: range) -> list[TrainingClip]:
        pool = self.pools[shape.kind]
        if step >= VALIDATION_STEP:
            rows = pool.validation[list(positions)]
        else:
            rows = pool.rows[pool.order.clips(shape)[list(positions)]]
            if self.reader.copies:
                self.reader.ask_for(pool.order.next_shards(shape), shape.kind)
        return [self._clip(int(row), shape.kind) for row in rows]

    def trained_on(self) -> TrainedOn:
        """Return the words of the captions.

        They are not complete if the shards have more than MAX_CAPTIONS captions, if a shard cannot be read, and for shards
        behind a URL, of which none is read.
        """
        words: dict[str, None] = {}
        left, is_complete = MAX_CAPTIONS, not self.reader.copies
        for path in self.index.paths if is_complete else ():
            try:
                captions = shards.read_texts(path, "caption")
            except RunError:  # training tells it when it reads the shard
                is_complete = False
                continue
            words |= dict.fromkeys(word for caption in dict.fromkeys(captions[:left]) for word in words_of(caption))
            is_complete &= len(captions) <= left and len(words) <= MAX_WORDS
            left -= len(captions)
            if left <= 0 or len(words) > MAX_WORDS:
                is_complete &= path == self.index.paths[-1]
                break
        return TrainedOn(frozenset(list(words)[:MAX_WORDS]), is_complete)

    def _clip(self, row: int, kind: str) -> TrainingClip:
        found = self.reader.read(*self.index.place_of(row))
        codes = found[self.column][: self.latent_frames[kind]]
        height, width, stride = (found.get(name) for name in shards.ORIGIN)
        last = found[shards.FRAME_CODES][(len(codes) - 1) * self.step] if self.last_frame else None
        return TrainingClip(
            None, found["caption"], found["fps"], f"{found['id']}#{found['clip']}", codes,
            original_size=height and (height, width), stride=stride, last=last,
        )  # fmt: skip

    def _too_few(self, kind: str, found: int, num_frames: int, min_frames: int, held_out: int) -> UserError:
        frames = self.index.num_frames
        what = "clips to take pictures from" if kind == "image" or num_frames == 1 else f"clips of at least {min_frames} frames"
        longest = int(frames.max()) if len(frames) else 0
        return UserError(
            f"{self.folder} has {found} {what} (the longest of its {len(frames)} has {longest}), too few for training with "
            f"{held_out} kept for validation; ingest more, or lower data.num_frames, data.min_frames or data.validation_clips"
        )

    def _usual_size(self, unit: int) -> tuple[int, int]:
        """Return the most frequent (height, width); raise UserError if a size is not a multiple of `unit`."""
        rows = np.concatenate([pool.rows for pool in self.pools.values()])
        sizes, counts = np.unique(np.stack([self.index.height[rows], self.index.width[rows]]), axis=1, return_counts=True)
        for height, width in sizes.T.tolist():
            if height % unit or width % unit:
                raise UserError(f"{self.folder} has clips of {width}x{height} pixels; the model needs multiples of {unit}")
        height, width = sizes[:, counts.argmax()].tolist()
        return height, width

    def _check_room(self, steps: set[int], shuffle_shards: int, limit: int) -> None:
        """Raise UserError if the largest shards that can be in use at a time have more than `limit` bytes.

        A clip has codes for each of the temporal compressions `steps`.
        """
        rows = np.arange(len(self.index.places))
        of_clips = np.sum([self.index.codes(rows, step, self.stride) for step in steps], axis=0)
        codes = np.bincount(self.index.places[:, 0], of_clips)
        largest = np.sort(codes)[::-1] * BYTES_PER_CODE
        needed = int(largest[: 2 * shuffle_shards * len(self.pools)].sum())  # the shards of this block and the next
        if limit < needed:
            raise UserError(
                f"data.cache_gb {limit / 1e9:g} is too little for {self.folder}: with data.shuffle_shards {shuffle_shards}, "
                f"{needed / 1e9:.3g} GB of it are in use at a time; raise data.cache_gb or lower data.shuffle_shards"
            )


class ShardIndex:
    """The place and size of each clip of a folder, read from the footers of its shards.

    Raise RunError if the shards have fewer clips than the last ingest of the folder counted.
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
        self.places = np.concatenate([np.zeros((0, 3), np.int32), *places], dtype=np.int32)  # [N, 3] shard, row group, row
        self.num_frames, self.height, self.width, self.item = (
            np.concatenate([np.zeros(0, np.int64), *(getattr(facts, name) for facts in found)])
            for name in ("num_frames", "height", "width", "item")
        )
        check_count(folder, len(self.places))
        names = [[path.name, digest] for path, digest in zip(self.paths, self.digests, strict=True)]
        total = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
        self.content = f"{len(names)} shards with {len(self.places)} clips (digest {total})"

    def place_of(self, row: int) -> tuple[int, int, int]:
        """Return (shard, row group, row in the row group) of a clip."""
        return tuple(map(int, self.places[row]))

    def usable(self, num_frames: int) -> np.ndarray:
        """Return the clips with at least `num_frames` frames.

        For `num_frames` 1, which means pictures, return the clips of one frame or, if there are none, all clips.
        """
        rows = np.flatnonzero(self.num_frames >= num_frames if num_frames > 1 else self.num_frames == 1)
        return rows if len(rows) or num_frames > 1 else np.arange(len(self.num_frames))

    def codes(self, rows: np.ndarray, step: int, stride: int, most_frames: int | None = None) -> np.ndarray:
        """Return the number of codes of each clip, or of its first `most_frames` latent frames.

        A latent frame stands for `step` frames, a code for `stride` x `stride` pixels.
        """
        latent = (self.num_frames[rows] - 1) // step + 1
        latent = latent if most_frames is None else np.minimum(latent, most_frames)
        return latent * (self.height[rows] // stride) * (self.width[rows] // stride)

    def first_by_hash(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Return `count` of the clips, chosen by a hash of their ids.

        The choice does not depend on the seed or on the order of the shards, so that runs on the same
        data set can be compared.
        """
        return rows[np.argsort(self.item[rows], kind="stable")][:count]

    def same_items(self, rows: np.ndarray) -> np.ndarray:
        """Return all clips of the items to which the clips `rows` belong."""
        return np.flatnonzero(np.isin(self.item, self.item[rows]))
