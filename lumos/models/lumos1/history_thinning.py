"""Eviction of frames from a bounded history: old frames become sparser with age, and frame 0 always stays.

Frames are numbered from 0, the first latent frame of the clip.
"""

from __future__ import annotations

from collections.abc import Sequence


def leaving(kept: Sequence[int], new: int) -> int:
    """Return the number of the frame to evict when frame `new` is added.

    kept: the numbers of the frames in the history, ascending, without frame 0.

    If a frame is evicted, the two distances to its neighbours merge into one gap. The rule keeps the
    distances between neighbours from shrinking with age:

    - A frame may be evicted if its gap is not larger than the distance between the two frames that are
      next older. The oldest frame in `kept` may always be evicted, as only frame 0 is older.
    - Of these frames, the one with the smallest ratio of gap to age is evicted, with the age measured
      from frame `new + 1`; of several with the same ratio, the newest.

    Distances then grow about geometrically with age, and the history spans the whole clip however long
    it is.
    """
    at = [0, *kept, new]

    def gap(i: int) -> int:
        return at[i + 1] - at[i - 1]

    free = [i for i in range(1, len(kept) + 1) if i == 1 or gap(i) <= at[i - 1] - at[i - 2]]
    return at[min(free, key=lambda i: (gap(i) / (new + 1 - at[i]), -i))]


def thins(frames: int, history: int) -> bool:
    """Return whether thinning changes a clip of `frames` latent frames, compared with a sliding window.

    history: the number of frames in the history besides frame 0. Both methods evict frame 1 first. Then
    thinning evicts frame 3 and the window frame 2, and frame history + 3 is the first to see a difference.
    """
    return history > 1 and frames > history + 3
