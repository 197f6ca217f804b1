"""Reuse between neighbouring sampling steps: some calls of the transformer skip its middle blocks."""

from __future__ import annotations

from torch import Tensor


class BlockReuse:
    """The memory of reuse between neighbouring sampling steps: what the middle blocks added to the tokens.

    Every `every`-th call computes all blocks. In the calls between, the middle blocks are skipped and what they added
    in the last full call is added again. A call of another batch shape computes all blocks. Use one object a clip.

    every   calls from one full call to the next; 1 reuses nothing
    first   blocks at the start that always run
    last    blocks at the end that always run
    """

    def __init__(self, every: int = 2, first: int = 1, last: int = 1):
        if every < 1 or first < 0 or last < 0:
            raise ValueError(f"every {every}, first {first}, last {last}: every is at least 1, the others at least 0")
        self.every, self.first, self.last = every, first, last
        self.calls, self.added = 0, None

    def may_skip(self, x: Tensor) -> bool:
        """Return whether this call may skip the middle blocks, and count the call."""
        full = self.calls % self.every == 0 or self.added is None or self.added.shape != x.shape
        self.calls = 1 if full else self.calls + 1
        return not full
