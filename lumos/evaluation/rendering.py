"""The samples of a benchmark's prompt list, with their seeds, in batches.

`lumos.prompt_lists.results` makes their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from lumos.evaluation.prompt_lists import Entry


@dataclass(frozen=True)
class RenderedSample:
    """One clip or picture to make.

    Its seed depends only on the seed of the whole list and on its file name, so the same file in
    another list has the same seed.
    """

    file: str
    caption: str
    image: str | None
    seed: int


def batches_of(entries: Sequence[Entry], seed: int, size: int) -> list[list[RenderedSample]]:
    """Return all samples in order, in batches of at most `size`.

    Samples of different entries never share a batch if entries have pictures, because the pictures
    may differ in size.
    """
    groups = [[RenderedSample(file, e.caption, e.image, seed_of(seed, file)) for file in e.files] for e in entries]
    if not any(entry.image for entry in entries):
        groups = [[sample for group in groups for sample in group]]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def seed_of(seed: int, file: str) -> int:
    """Return the seed of a file: a hash with 53 bits, because many JSON readers cannot hold larger integers exactly."""
    digest = hashlib.blake2b(f"{seed}/{file}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 11
