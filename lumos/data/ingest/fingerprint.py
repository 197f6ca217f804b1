"""What an item was when it was ingested, in a short text, so that a later run sees that it is another one by now."""

from __future__ import annotations

import hashlib
import os

from lumos.data.ingest.item import BAD_ROW, Item
from lumos.files import open_regular

SAMPLE_BYTES = 1 << 16
SAME, CHANGED, OTHER = "same", "changed", "other"


def fingerprint(item: Item) -> str:
    """Digest of its place, size, time of the last change, digest of its first and last bytes, digest of its caption."""
    size, changed = _size_and_time(item)
    return f"{_digest(_place(item))} {size} {changed} {_sample(item, size)} {_digest(_bytes(item.caption))}"


def compare(item: Item, old: str) -> str:
    """SAME as when it was marked, CHANGED in its place (file or caption), or OTHER: another file in another place.

    A copy of the same file in another place is the same.
    """
    parts = str(old).split(" ")
    if len(parts) != 5:
        return CHANGED
    place, size, changed, sample, caption = parts
    here = place == _digest(_place(item))
    size_now, changed_now = _size_and_time(item)
    same_file = size == size_now and ((here and changed == changed_now) or sample == _sample(item, size_now))
    if not same_file:
        return CHANGED if here else OTHER
    return SAME if caption == _digest(_bytes(item.caption)) else CHANGED


def _place(item: Item) -> bytes:
    return _bytes(os.path.abspath(item.path))


def _bytes(text: str) -> bytes:
    """Of any text, lone surrogates too: a mark is taken of items that are skipped for them."""
    return text.encode("utf-8", "surrogatepass")


def _size_and_time(item: Item) -> tuple[str, str]:
    """Bytes, ns; "-" for what is no file."""
    if item.problem and item.problem[0] == BAD_ROW:  # its path may be the whole manifest's
        return "-", "-"
    try:
        found = os.stat(item.path)
    except (OSError, ValueError):
        return "-", "-"
    return str(found.st_size if item.member is None else item.size), str(found.st_mtime_ns)


def _sample(item: Item, size: str) -> str:
    if size == "-":
        return "-"
    try:
        with open_regular(item.path) as file:
            file.seek(item.offset)
            data = file.read(min(SAMPLE_BYTES, int(size)))
            file.seek(item.offset + max(int(size) - SAMPLE_BYTES, 0))
            return _digest(data + file.read(min(SAMPLE_BYTES, int(size))))
    except (OSError, ValueError, OverflowError):  # no regular file, or an offset that no file has
        return "-"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
