"""The count of ingest: every item of the sources must end in a shard or in the journal of skipped items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lumos.data.ingest.item import Item
from lumos.data.ingest.state import JOURNAL, State
from lumos.errors import RunError, shown

REMEDY = "run the same command again: it does what is missing"


class Tally:
    """Gives the items of `sources` to an engine, without those that `knows` says are done, and takes note of what comes back.

    `seen` counts all items of the sources so far.
    """

    def __init__(self, sources: Iterable[Item], knows: Callable[[Item], bool]):
        self.seen = 0
        self._sources, self._knows = iter(sources), knows
        self._out: deque[Item] = deque()

    def todo(self) -> Iterator[Item]:
        """The items to do that nobody has taken yet."""
        for item in self._sources:
            self.seen += 1
            if not self._knows(item):
                self._out.append(item)
                yield item

    def back(self, item: Item) -> None:
        """Take note of an item's result. RunError unless it is the result of the oldest item that was taken."""
        if not self._out or self._out[0] != item:
            expected = shown(self._out[0].id) if self._out else "none"
            raise RunError(f"the engine gave a result for {shown(item.id)}, but {expected} was next; {REMEDY}")
        self._out.popleft()

    def lost(self) -> str | None:
        """Says which items have no result, None if all have one. Call it when the engine has ended: the sources are read out."""
        deque(self.todo(), maxlen=0)
        if not self._out:
            return None
        return f"{len(self._out)} of {self.seen} items in the sources were not done, {shown(self._out[0].id)} first; {REMEDY}"


def missing_in_folder(state: State) -> str | None:
    """Says which items of `state`, a finished one, its folder's files do not hold; None if they hold all, and nothing else."""
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
