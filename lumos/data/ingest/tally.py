"""Checks that ingest loses no item: each item of the sources must be in a shard or in the journal of skipped items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lumos.data.ingest.item import Item
from lumos.data.ingest.state import JOURNAL, State
from lumos.errors import RunError, shown

REMEDY = "run the same command again: it encodes the missing items"


class Tally:
    """Gives the items of `sources` to an executor and checks that each of them gets its result.

    Items for which `knows` returns true are done, and are left out. `seen` is the number of items read
    from the sources so far.
    """

    def __init__(self, sources: Iterable[Item], knows: Callable[[Item], bool]):
        self.seen = 0
        self._sources, self._knows = iter(sources), knows
        self._out: deque[Item] = deque()

    def todo(self) -> Iterator[Item]:
        """Yield the items to encode that were not yet taken."""
        for item in self._sources:
            self.seen += 1
            if not self._knows(item):
                self._out.append(item)
                yield item

    def back(self, item: Item) -> None:
        """Record that the result of `item` arrived; raise RunError unless it is the oldest item without a result."""
        if not self._out or self._out[0] != item:
            expected = shown(self._out[0].id) if self._out else "none"
            raise RunError(f"the executor gave a result for {shown(item.id)}, but {expected} was next; {REMEDY}")
        self._out.popleft()

    def lost(self) -> str | None:
        """Return a message about items without a result, or None if all items have one.

        Call this method when the executor has finished. It reads the sources to their end.
        """
        deque(self.todo(), maxlen=0)
        if not self._out:
            return None
        return f"{len(self._out)} of {self.seen} items in the sources were not done, {shown(self._out[0].id)} first; {REMEDY}"


def missing_in_folder(state: State) -> str | None:
    """Compare a finished `state` with the files of its folder.

    Return a message about the difference, or None if the files have exactly the items and clips of `state`.
    """
    found = State(state.out, shard_clips=state.shard_clips, retry_skipped=False)
    for where, kept, read in (
        ("the shards", state.done, found.done),
        (JOURNAL, state.skipped.keys(), found.skipped.keys()),
    ):
        if different := kept ^ read:
            first = shown(min(different))
            return f"{where} of {state.out} should hold {len(kept)} items and hold {len(read)}, {first} differs; {REMEDY}"
    if state.clips != found.clips:
        return f"{state.clips} clips were encoded, but the shards of {state.out} hold {found.clips}; use a new --out"
    return None
