"""Which frame leaves a bounded history that is thinned by age. Frames are numbered from 0, the clip's first one, which stays."""

from __future__ import annotations

from collections.abc import Sequence


def leaving(kept: Sequence[int], new: int) -> int:
    """The frame that leaves when frame `new` comes: one of `kept`, the rising numbers of those behind frame 0.

    Distances between neighbours, from `new` back to frame 0, that do not shrink with age before do not after: a frame may leave
    if the gap that it opens is no larger than the one behind it. The oldest, with nothing but frame 0 behind it, always may. Of
    those that may it is the one whose gap is smallest for its age, as the frame after `new` sees it, and of equals the newest. So
    distances grow about geometrically, and reach over the whole clip, however long it is.
    """
    at = [0, *kept, new]

    def gap(i: int) -> int:
        return at[i + 1] - at[i - 1]

    free = [i for i in range(1, len(kept) + 1) if i == 1 or gap(i) <= at[i - 1] - at[i - 2]]
    return at[min(free, key=lambda i: (gap(i) / (new + 1 - at[i]), -i))]


def thins(frames: int, history: int) -> bool:
    """Whether in a clip of so many latent frames, `history` of them kept, one sees others than those right before it.

    The first to leave is frame 1, as it does from a sliding window; the next is frame 3, not 2, and frame history + 3 sees that.
    """
    return history > 1 and frames > history + 3
