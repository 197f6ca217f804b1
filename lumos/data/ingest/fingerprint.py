"""Fingerprints of items: a later ingest compares them to find items that changed since they were ingested."""

from __future__ import annotations

import hashlib
import os

from lumos.data.ingest.item import BAD_ROW, Item
from lumos.files import open_regular

SAMPLE_BYTES = 1 << 16
"""Bytes at the beginning and at the end of a file that its fingerprint covers."""
SAME, CHANGED, OTHER = "same", "changed", "other"


def fingerprint(item: Item) -> str:
    """Return a text of five parts that identifies the content of an item.

    The parts, separated by spaces, are: digest of the path, size in bytes, time of the last change in
    ns, digest of the first and last SAMPLE_BYTES bytes, digest of the caption. If there is no file,
    size, time and the digest of the bytes are "-".
    """
    size, changed = _size_and_time(item)
    return f"{_digest(_place(item))} {size} {changed} {_sample(item, size)} {_digest(_bytes(item.caption))}"


def compare(item: Item, old: str) -> str:
    """Compare an item with the fingerprint `old` of an earlier ingest.

    Return SAME if file and caption are the same, also if the file is a copy at another path. Return
    CHANGED if the caption changed, or the file at the same path. Return OTHER if it is another file at
    another path.
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
    """Return any text as bytes, also text with lone surrogates: items that are skipped for them have fingerprints too."""
    return text.encode("utf-8", "surrogatepass")


def _size_and_time(item: Item) -> tuple[str, str]:
    """Return size in bytes and time of the last change in ns; both are "-" if there is no file."""
    if item.problem and item.problem[0] == BAD_ROW:  # its path may be that of the manifest
        return "-", "-"
    try:
        found = os.stat(item.path)
    except (OSError, ValueError):
        return "-", "-"
    return str(found.st_size if item.member is None else item.size), str(found.st_mtime_ns)


def _sample(item: Item, size: str) -> str:
    """Return the digest of the first and last bytes of an item of `size` bytes, or "-" if it cannot be read."""
    if size == "-":
        return "-"
    try:
        with open_regular(item.path) as file:
            file.seek(item.offset)
            data = file.read(min(SAMPLE_BYTES, int(size)))
            file.seek(item.offset + max(int(size) - SAMPLE_BYTES, 0))
            return _digest(data + file.read(min(SAMPLE_BYTES, int(size))))
    except (OSError, ValueError, OverflowError):  # not a regular file, or an impossible offset
        return "-"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
