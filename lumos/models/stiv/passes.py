"""The runs of the sampler that make a clip: pure functions of its length and its given frames.

A clip that is no longer than the clips of the training is made in one pass. A longer one is made in several:

    keyframes     frames at a fixed stride, as many as a clip of the training has; a later pass of keyframes begins with the
                  last keyframe of the one before, which is given
    fill-in       the frames between two keyframes, with both given
    upsampling    stretches of a clip whose every second frame is given; neighbours share a given frame

Each frame is sampled once. A pass needs only a few frames of earlier passes. So frames can be written when they are
done, and memory does not grow with the length of the clip.

Frames are latent frames here; in a clip of several passes each is a frame of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from lumos.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class SamplingPass:
    """A run of the sampler.

    frames   the numbers of its frames in the clip; the last ones may be beyond its end, and are then dropped
    given    those of `frames` that are given
    spare    the number of frames at its end that only fill up the last token and are dropped
    pace     the time from one of its frames to the next, in frames of a usual clip
    """

    frames: range
    given: frozenset[int]
    pace: int = 1
    spare: int = 0

    @property
    def made(self) -> list[int]:
        """The numbers of the frames that the pass makes."""
        kept = self.frames[: len(self.frames) - self.spare]
        return [frame for frame in kept if frame not in self.given]

    @property
    def places(self) -> frozenset[int]:
        """The places of the given frames in the pass."""
        return frozenset(self.frames.index(frame) for frame in self.given)


def passes_of(
    frames: int, given: Collection[int], longest: int, stride: int | None = None, unit: int = 1
) -> Iterator[SamplingPass]:
    """Yield the passes of a clip.

    Args:
        frames: latent frames of the clip.
        given: the numbers of given frames; in a clip of several passes the first one, the first ones, the first and
            the last one, or every second one.
        longest: the most frames of a pass.
        stride: frames from one keyframe to the next; None: longest - 1.
        unit: latent frames of a token. A pass has whole tokens; a stretch of upsampling is extended to whole ones.

    Raises UserError for a stride over longest - 1, and for a long clip whose given frames do not allow several passes.
    """
    given = frozenset(given)
    if len(given) > 1 and given == frozenset(range(0, frames, 2)) and longest >= 3:
        yield from upsampling(frames, longest, unit)
        return
    if frames <= longest:
        yield SamplingPass(range(frames), given)
        return
    if longest < 3:
        raise UserError(
            f"a clip of {frames} frames is too long for this model, which makes {longest} at once; longer clips take 3"
        )
    stride = longest - 1 if stride is None else stride
    if stride > longest - 1:
        raise UserError(f"keyframe_stride {stride} is too large; this model fills at most {longest - 1} frames")
    last, begin = frames - 1, 0
    if given == {0, last}:
        yield from between(last, longest, stride)
        return
    if given - {0}:
        if max(given) >= longest - 1 or given != frozenset(range(len(given))):
            raise UserError(
                f"{frames} frames are more than the {longest} that this model makes at once; longer clips can have the first "
                "frames, the first and the last frame or every second frame given"
            )
        yield SamplingPass(range(longest), given)
        begin = longest - 1
    while begin < last:
        keys = range(begin, begin + stride * (longest - 1) + 1, stride)
        yield SamplingPass(keys, frozenset({begin} if begin else given), stride)
        yield from filled(keys, last)
        begin = keys[-1]


def between(last: int, longest: int, stride: int) -> Iterator[SamplingPass]:
    """Yield the passes of a clip of which frame 0 and frame `last` are given. UserError if no keyframe is frame `last`."""
    if last % stride or last // stride >= longest:
        most = (longest - 1) * stride + 1
        raise UserError(
            f"a clip of {last + 1} frames that ends with a given frame cannot be made from keyframes; give num_frames 1 + a "
            f"multiple of {stride}, at most {most}, or another keyframe_stride"
        )
    keys = range(0, last + 1, stride)
    if len(keys) > 2:
        yield SamplingPass(keys, frozenset({0, last}), stride)
    yield from filled(keys, last)


def filled(keys: range, last: int) -> Iterator[SamplingPass]:
    """Yield a pass for each gap between keyframes that begins before frame `last`."""
    for key in keys[:-1]:
        if key < last:
            yield SamplingPass(range(key, key + keys.step + 1), frozenset({key, key + keys.step}))


def upsampling(frames: int, longest: int, unit: int) -> Iterator[SamplingPass]:
    """Yield the passes of a clip of which every second frame is given."""
    step = (longest - 1) // 2 * 2
    for begin in range(0, frames - 1, step):
        end = min(begin + step + 1, frames)
        spare = -(end - begin) % unit
        stretch = range(begin, end + spare)
        yield SamplingPass(stretch, frozenset(range(begin, end, 2)), spare=spare)


class InOrder(Generic[T]):
    """The frames that are known while a clip is made, by number; `take` returns those that are done, in order.

    frames: latent frames of the clip. known: the given frames.
    """

    def __init__(self, frames: int, known: Mapping[int, T]):
        self.frames, self.next = frames, 0
        self.known: dict[int, T] = dict(known)

    def take(self, made: Mapping[int, T]) -> list[T]:
        """Add the frames of a pass, and return the frames that follow the last one returned, as far as they are known.

        Of the frames that were returned only the last one stays known, because a later pass may begin with it.
        """
        self.known |= made
        ready = []
        while self.next < self.frames and self.next in self.known:
            ready.append(self.known[self.next])
            self.next += 1
        self.known = {number: value for number, value in self.known.items() if number >= self.next - 1}
        return ready
