"""The order of stored clips against a plain walk over them."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from lumos.data.curriculum import StepShape
from lumos.data.shards.order import EpochOrder

data = st.tuples(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=40),  # shard, codes of each clip
    st.integers(1, 4),
    st.integers(0, 3),
)


def make(clips: list[tuple[int, int]], block: int, seed: int) -> EpochOrder:
    shards, codes = (np.array(column) for column in zip(*sorted(clips), strict=True))
    return EpochOrder(shards, codes, shuffle_shards=block, seed=seed)


def walk(order: EpochOrder, stage: int, kind: str, epochs: int) -> list[int]:
    return [int(clip) for epoch in range(epochs) for clip in order.epoch(stage, kind, epoch)[0]]


@given(data, st.integers(0, 3))
def test_an_epoch_has_each_clip_once_and_few_shards_at_a_time(made, epoch: int):
    order = make(*made)
    clips = walk(order, 0, "video", epoch + 1)[-len(order.codes) :]
    assert sorted(clips) == list(range(len(order.codes)))
    first, last = {}, {}
    for at, clip in enumerate(clips):
        first.setdefault(order.shards[clip], at)
        last[order.shards[clip]] = at
    for at in range(len(clips)):
        assert sum(first[shard] <= at <= last[shard] for shard in first) <= order.shuffle_shards


def test_blocks_are_mixed_and_every_epoch_has_its_own_order():
    clips = [(n // 50, 1) for n in range(400)]
    order = make(clips, 4, 0)
    runs = [len(list(run)) for _, run in groupby(order.shards[walk(order, 0, "video", 1)])]
    assert max(runs) < 12  # 200 draws of 4 shards; a longer run has a chance below 1e-4
    walks = [walk(o, stage, kind, 2) for o in (order, make(clips, 4, 1)) for stage in (0, 1) for kind in ("image", "video")]
    halves = [tuple(half) for one in walks for half in (one[:400], one[400:])]
    assert len(set(halves)) == 16
    assert halves[0] == tuple(walk(make(clips, 4, 0), 0, "image", 1))
    blocks = Counter(frozenset(order.shards[list(half[:200])].tolist()) for half in halves)
    assert len(blocks) > 5  # the blocks are others each time


@given(data, st.integers(1, 12))
def test_steps_by_clips_are_parts_of_the_walk(made, batch_size: int):
    order = make(*made)
    clips = walk(order, 1, "image", 12 * 5 // len(order.codes) + 1)
    for number in range(5):
        chosen = order.clips(StepShape("image", batch_size, 1, number)).tolist()
        assert sorted(chosen) == sorted(clips[number * batch_size : (number + 1) * batch_size])
        assert sorted(order.codes[chosen], reverse=True) == order.codes[chosen].tolist()


@given(data, st.integers(0, 60))
def test_steps_by_tokens_are_parts_of_the_walk(made, extra: int):
    order = make(*made)
    tokens = int(order.codes.max()) + extra
    clips = walk(order, 0, "video", 6 * tokens // order.total_codes + 1)
    steps, done = [[] for _ in range(6)], 0
    for clip in clips:
        if done < 6 * tokens:
            steps[done // tokens].append(clip)  # where its first code lies
        done += int(order.codes[clip])
    for number in reversed(range(6)):  # any step can be the first to be asked for
        chosen = make(*made).clips(StepShape("video", None, 0, number, tokens)).tolist()
        assert sorted(chosen) == sorted(steps[number])
        assert abs(order.codes[chosen].sum() - tokens) < order.codes.max()


@given(data, st.booleans())
@example(([(0, 3), (1, 3), (2, 5)], 1, 1), True)  # a clip is longer than a block
def test_next_shards_are_those_of_the_steps_that_follow(made, by_tokens: bool):
    order = make(*made)
    shape = (None, int(order.codes.max())) if by_tokens else (1, None)
    coming = order.next_shards(StepShape("video", shape[0], 0, 2, shape[1]))
    assert len(set(coming)) == len(coming)
    following = [order.clips(StepShape("video", shape[0], 0, number, shape[1])) for number in range(3, 50)]
    used = [list(map(int, order.shards[clips])) for clips in following]
    assert coming[0] in used[0]
    if not by_tokens:  # a clip a step
        assert coming == list(dict.fromkeys(shard for (shard,) in used))[: len(coming)]
