"""The order in which training passes over stored clips: a function of (seed, stage, kind, epoch), entered anywhere at once.

In an epoch each clip comes once. The shards are shuffled and taken in blocks, and the clips of a block are shuffled together:
only one block's shards are in use at a time, which is what remote shards and their local copies need. Epoch follows epoch
without a gap, and a step takes its part of this endless row of clips: so many clips, or so many codes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lumos.data.curriculum import StepShape


class EpochOrder:
    """Of N clips, `shards` [N] says in which shard each is, `codes` [N] how many codes it has."""

    def __init__(self, shards: np.ndarray, codes: np.ndarray, *, shuffle_shards: int, seed: int):
        self.shards, self.codes, self.seed = shards, codes, seed
        _, self.shard = np.unique(shards, return_inverse=True)
        self.shuffle_shards = shuffle_shards
        self.total_codes = int(codes.sum())
        self.epoch = lru_cache(maxsize=3)(self._epoch)  # a step can touch two, and batches are made ahead

    def clips(self, shape: StepShape) -> np.ndarray:
        """The clips of a step, long ones first, so that neighbours, which are padded together, have like lengths.

        A step by `tokens` has the clips whose first code lies in its stretch of so many codes: it has more or fewer than
        that by less than a clip, and steps have that many on average.
        """
        size, _ = self._measure(shape)
        chosen = self._stretch(shape, shape.number * size, (shape.number + 1) * size)
        return chosen[np.argsort(-self.codes[chosen], kind="stable")]

    def next_shards(self, shape: StepShape) -> list[int]:
        """Shards in use soon after a step, about a block of them, at least those of the next step, in the order of their use."""
        size, total = self._measure(shape)
        block = min(total, max(size, -(-total * self.shuffle_shards // (int(self.shard.max()) + 1))))
        first = (shape.number + 1) * size
        coming = self.shards[self._stretch(shape, first, first + block)]
        return [int(coming[i]) for i in np.sort(np.unique(coming, return_index=True)[1])]

    def _measure(self, shape: StepShape) -> tuple[int, int]:
        """How much a step takes and an epoch has, both in clips, or in codes if the step goes by them."""
        if shape.batch_size is None:
            return shape.tokens, self.total_codes
        return shape.batch_size, len(self.codes)

    def _stretch(self, shape: StepShape, first: int, last: int) -> np.ndarray:
        """Clips that begin from `first` up to before `last`, counted from the stage's beginning."""
        _, total = self._measure(shape)
        parts = []
        for epoch in range(first // total, (last - 1) // total + 1):
            order, starts = self.epoch(shape.stage, shape.kind, epoch)
            here = np.clip([first - epoch * total, last - epoch * total], 0, total)
            low, high = np.searchsorted(starts, here) if shape.batch_size is None else here
            parts.append(order[low:high])
        return np.concatenate(parts)

    def _epoch(self, stage: int, kind: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the clips of an epoch in their order [N], codes before each [N])."""
        random = np.random.default_rng((self.seed, stage, 0 if kind == "image" else 1, epoch))
        blocks = random.permutation(int(self.shard.max()) + 1)[self.shard] // self.shuffle_shards
        order = np.lexsort((random.random(len(blocks)), blocks))
        ends = np.cumsum(self.codes[order])
        return order, ends - self.codes[order]
