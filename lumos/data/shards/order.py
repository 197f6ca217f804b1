"""The order in which training uses stored clips.

The order of an epoch is a pure function of (seed, stage, kind, epoch), so a resumed run finds its
place at once. An epoch has each clip once. Its shards are shuffled and divided into blocks, and the
clips of a block are shuffled together. Only the shards of one block are in use at a time, so few
local copies of remote shards are needed. The epochs form one sequence of clips without end, and each
step takes the next part of it: a number of clips, or a number of codes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lumos.data.curriculum import StepShape


class EpochOrder:
    """The order of N clips; `shards` [N] is the shard of each clip, `codes` [N] its number of codes.

    `shuffle_shards` is the number of shards in a block.
    """

    def __init__(self, shards: np.ndarray, codes: np.ndarray, *, shuffle_shards: int, seed: int):
        self.shards, self.codes, self.seed = shards, codes, seed
        _, self.shard = np.unique(shards, return_inverse=True)
        self.shuffle_shards = shuffle_shards
        self.total_codes = int(codes.sum())
        self.epoch = lru_cache(maxsize=3)(self._epoch)  # a step can need two epochs, and prefetching a third

    def clips(self, shape: StepShape) -> np.ndarray:
        """Return the clips of a step, the longest clip first.

        Neighbours then have similar lengths, so a micro-batch needs little padding. The codes of an epoch
        are numbered in order, and step n by `tokens` has the clips whose first code is among the codes
        n * tokens to (n + 1) * tokens. Its number of codes differs from `tokens` by less than a clip, and
        steps have `tokens` codes on average.
        """
        size, _ = self._measure(shape)
        chosen = self._stretch(shape, shape.number * size, (shape.number + 1) * size)
        return chosen[np.argsort(-self.codes[chosen], kind="stable")]

    def next_shards(self, shape: StepShape) -> list[int]:
        """Return the shards that are needed after this step, in the order of their use.

        These are about as many shards as a block has, and at least those of the next step.
        """
        size, total = self._measure(shape)
        block = min(total, max(size, -(-total * self.shuffle_shards // (int(self.shard.max()) + 1))))
        first = (shape.number + 1) * size
        coming = self.shards[self._stretch(shape, first, first + block)]
        return [int(coming[i]) for i in np.sort(np.unique(coming, return_index=True)[1])]

    def _measure(self, shape: StepShape) -> tuple[int, int]:
        """Return the size of a step and of an epoch, both in clips, or in codes for a step by `tokens`."""
        if shape.batch_size is None:
            return shape.tokens, self.total_codes
        return shape.batch_size, len(self.codes)

    def _stretch(self, shape: StepShape, first: int, last: int) -> np.ndarray:
        """Return the clips whose position is at least `first` and below `last`.

        Positions count clips, or codes for a step by `tokens`, from the beginning of the stage.
        """
        _, total = self._measure(shape)
        parts = []
        for epoch in range(first // total, (last - 1) // total + 1):
            order, starts = self.epoch(shape.stage, shape.kind, epoch)
            here = np.clip([first - epoch * total, last - epoch * total], 0, total)
            low, high = np.searchsorted(starts, here) if shape.batch_size is None else here
            parts.append(order[low:high])
        return np.concatenate(parts)

    def _epoch(self, stage: int, kind: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the clips of an epoch in order [N], and the number of codes before each clip [N]."""
        random = np.random.default_rng((self.seed, stage, 0 if kind == "image" else 1, epoch))
        blocks = random.permutation(int(self.shard.max()) + 1)[self.shard] // self.shuffle_shards
        order = np.lexsort((random.random(len(blocks)), blocks))
        ends = np.cumsum(self.codes[order])
        return order, ends - self.codes[order]
