"""What to draw of a prompt list, with which seeds, batch by batch; `lumos.prompt_lists.results` makes the files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from lumos.evaluation.prompt_lists import Entry


@dataclass(frozen=True)
class Sample:
    """One file to draw. Its seed follows from its name alone: the same file of another list has the same one."""

    file: str
    caption: str
    image: str | None
    seed: int


def batches_of(entries: Sequence[Entry], seed: int, size: int) -> list[list[Sample]]:
    """All samples in order, `size` at a time. Entries with a picture never share a batch: pictures may differ in size."""
    groups = [[Sample(file, e.caption, e.image, seed_of(seed, file)) for file in e.files] for e in entries]
    if not any(entry.image for entry in entries):
        groups = [[sample for group in groups for sample in group]]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def seed_of(seed: int, file: str) -> int:
    """53 bits, which every reader of JSON keeps whole."""
    digest = hashlib.blake2b(f"{seed}/{file}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 11
