"""High dynamic range: which transfer function a picture file states, and the refusal of PQ and HLG by name.

Pixels of PQ and HLG that are taken for sRGB are grey and dull, which a model would learn and a user would not expect. Mapping them
to sRGB is a matter of taste with many parameters, so such files are refused instead. The boxes of AVIF and HEIF are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from lumos.errors import UserError
from lumos.video.boxes import MAX_BOX_BYTES, SAMPLE_ENTRY_BYTES, boxes, inside, top_boxes

TRANSFERS = {16: "PQ", 18: "HLG"}
"""Names of transfer functions of high dynamic range (ITU-T H.273, table 3)."""
DOLBY_VISION = ("dvh1", "dvhe", "dav1")
"""Codec tags of streams that have no form which other decoders show."""
PQ_PROFILE = "ITUR_2100_PQ_FULL"
MAX_PROFILE_TAGS = 200
"""Largest number of tags of an ICC profile that are read. Profiles have about ten."""


Codes = tuple[int, int]
"""Codes of primaries and of a transfer function (ITU-T H.273, tables 2 and 3)."""


class HighDynamicRange(UserError):
    """A picture or video has a transfer function of high dynamic range."""


def check_transfer(path: str | Path, transfer: int | None, what: str) -> None:
    """Raise HighDynamicRange if a code of ITU-T H.273 is that of PQ or HLG. what: "picture" or "video"."""
    if (name := TRANSFERS.get(int(transfer or 0))) is not None:
        raise HighDynamicRange(
            f"{path} is an HDR {what} ({name}), whose colours would come out wrong; convert it to SDR (BT.709 or sRGB) first"
        )


def check_codec_tag(path: str | Path, tag: str) -> None:
    """Raise HighDynamicRange for video whose colours only a decoder of Dolby Vision understands. It states no transfer function."""
    if tag in DOLBY_VISION:
        raise HighDynamicRange(
            f"{path} is an HDR video (Dolby Vision), whose colours would come out wrong; convert it to SDR (BT.709 or sRGB) first"
        )


def check_profile(path: str | Path, profile: bytes | None) -> None:
    """Raise HighDynamicRange if an ICC profile states PQ or HLG: by its tag "cicp" (ICC.1:2022, 9.2.17), or by its name.

    The name is that of a profile which browsers take for PQ (W3C, "Using the ITU BT.2100 PQ EOTF with the PNG Format").
    """
    profile = profile or b""
    check_transfer(path, next((code for code in _of_profile(profile) if code in TRANSFERS), None), "picture")
    if PQ_PROFILE.encode() in profile or PQ_PROFILE.encode("utf-16-be") in profile:
        check_transfer(path, 16, "picture")


def _of_profile(profile: bytes) -> Iterator[int]:
    for number in range(min(int.from_bytes(profile[128:132]), MAX_PROFILE_TAGS)):
        name, at = profile[132 + 12 * number :][:4], int.from_bytes(profile[136 + 12 * number :][:4])
        if name == b"cicp":
            yield from profile[at + 9 : at + 10]


def picture_transfer(path: str | Path, kind: str) -> int | None:
    """Return the code in TRANSFERS that a picture states, or None.

    kind: the format as Pillow names it. PNG states it in the chunk cICP, AVIF in the property "colr" of its primary item and in the
    sample entry of a sequence.
    """
    return next((transfer for _, transfer in picture_codes(path, kind) if transfer in TRANSFERS), None)


def picture_codes(path: str | Path, kind: str) -> list[Codes]:
    """Return the codes of primaries and transfer function that a picture states (ITU-T H.273), see `picture_transfer`."""
    return list({"PNG": _of_png, "AVIF": _of_avif}.get(kind, lambda path: ())(path))


def _of_png(path: str | Path) -> Iterator[Codes]:
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"cICP":
                if len(codes := file.read(2)) == 2:
                    yield codes[0], codes[1]
                return
            if name in (b"IDAT", b"IEND"):
                return
            file.seek(length + 4, 1)


def _of_avif(path: str | Path) -> Iterator[Codes]:
    with open(path, "rb") as file:
        found = {name: file.read(min(size, MAX_BOX_BYTES)) for name, size in top_boxes(file) if name in (b"meta", b"moov")}
    yield from _of_primary_item(found.get(b"meta", b"")[4:])
    yield from _of_tracks(found.get(b"moov", b""))


def is_heif_picture(path: str | Path) -> bool:
    """Return whether a file is a still picture in the container of HEIF: it has an item, but no track (ISO/IEC 23008-12)."""
    with open(path, "rb") as file:
        if file.read(8)[4:] != b"ftyp":
            return False
        file.seek(0)
        names = {name for name, _ in top_boxes(file)}
    return b"meta" in names and b"moov" not in names and b"moof" not in names


def _of_colour_box(content: bytes) -> Iterator[Codes]:
    if content[:4] == b"nclx" and len(content) >= 8:
        yield int.from_bytes(content[4:6]), int.from_bytes(content[6:8])


def _of_primary_item(meta: bytes) -> Iterator[Codes]:
    """Yield the codes of the primary item of a meta box. Other items may be an HDR rendition of the same picture."""
    primary = next(inside(meta, b"pitm"), b"")
    item = int.from_bytes(primary[4:6] if primary[:1] == b"\0" else primary[4:8])
    properties = [box for content in inside(meta, b"iprp", b"ipco") for box in boxes(content)]
    for content in inside(meta, b"iprp", b"ipma"):
        for index in _associations(content).get(item, ()):
            name, box = properties[index - 1] if 0 < index <= len(properties) else (b"", b"")
            if name == b"colr":
                yield from _of_colour_box(box)


def _associations(content: bytes) -> dict[int, list[int]]:
    """Return the numbers of the properties of each item, from 1, as a box "ipma" lists them (ISO/IEC 23008-12, 9.3.1)."""
    wide_ids, wide_numbers = content[:1] != b"\0", bool(content[3:4] and content[3] & 1)
    found: dict[int, list[int]] = {}
    at, of_id, of_number = 8, 4 if wide_ids else 2, 2 if wide_numbers else 1
    for _ in range(int.from_bytes(content[4:8])):
        if at >= len(content):
            break
        item, count = int.from_bytes(content[at : at + of_id]), (content[at + of_id : at + of_id + 1] or b"\0")[0]
        at += of_id + 1
        numbers = (int.from_bytes(content[at + n * of_number : at + (n + 1) * of_number]) for n in range(count))
        found[item] = [number & (0x7FFF if wide_numbers else 0x7F) for number in numbers]
        at += count * of_number
    return found


def _of_tracks(moov: bytes) -> Iterator[Codes]:
    for table in inside(moov, b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        for _, entry in boxes(table[8:]):
            for content in inside(entry[SAMPLE_ENTRY_BYTES :], b"colr"):
                yield from _of_colour_box(content)
