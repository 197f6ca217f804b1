"""A look at sources before an ingest: how many items they have, why items cannot be used, and some of their clips."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lumos.data.ingest.encode import ClipSettings, Skip, begin
from lumos.data.ingest.fingerprint import fingerprint
from lumos.data.ingest.item import TOO_SHORT, Item
from lumos.data.ingest.manifest import items


@dataclass(frozen=True)
class Listing:
    """The items of sources.

    digest    identifies names, files and captions of the items, also after the sources were moved
    """

    items: list[Item]
    digest: str

    @property
    def usable(self) -> list[Item]:
        """The items without a problem that is known before their files are opened."""
        return [item for item in self.items if item.problem is None]

    @property
    def reasons(self) -> Counter[str]:
        """For each reason, the number of items that cannot be used because of it."""
        return Counter(item.problem[0] for item in self.items if item.problem)


def list_items(sources: Sequence[str | Path], captions: str | Path | None = None, caption: str | None = None) -> Listing:
    """Return the items of the sources; see `items` for the arguments and errors."""
    found, digest = list(items(sources, captions, caption=caption)), hashlib.blake2b(digest_size=8)
    for item in found:
        _, size, _, sample, of_caption = fingerprint(item).split(" ")
        digest.update(" ".join((item.id, size, sample, of_caption)).encode("utf-8", "surrogatepass"))
    return Listing(found, digest.hexdigest())


def some_clips(
    found: Sequence[Item], settings: ClipSettings, step: int, count: int
) -> tuple[list[tuple[str, np.ndarray]], list[Skip]]:
    """Return up to `count` whole clips as (caption, frames uint8 [T, H, W, 3]), and why items that were tried have none.

    Evenly spaced items are tried, `count` of them, and then further ones until one of them has a clip. `step` is the
    temporal compression of the tokenizer.
    """
    first = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)).tolist()
    clips, skipped = [], []
    for number in [*first, *sorted(set(range(len(found))) - set(first))]:
        if clips and len(clips) + len(skipped) >= len(first):
            break
        item = found[number]
        begun = begin(item, settings, step)
        if isinstance(begun, Skip):
            skipped.append(begun)
            continue
        with closing(begun.clips()) as clips_of_item:
            _, frames, _ = next(clips_of_item)
        if len(frames) < settings.num_frames:
            skipped.append(Skip(TOO_SHORT, f"{item.member or item.path}: 1 frame, {settings.num_frames} are needed"))
        else:
            clips.append((item.caption, frames))
    return clips, skipped
