"""Items of a webdataset tar: its complete samples, and a problem if a part of the tar is damaged."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from lumos.data.ingest.item import (
    BAD_CAPTION,
    BROKEN_TAR,
    LONG_CAPTION,
    MEDIA,
    NO_END,
    NOT_A_FILE,
    NOT_MEDIA,
    OTHER_MEDIA,
    UNREADABLE,
    Item,
    as_text,
)
from lumos.data.ingest.tables import CAPTION_KEYS, MAX_ROW_LENGTH, first, json_row, not_text
from lumos.errors import shown
from lumos.files import open_regular
from lumos.video.reading import can_read
from lumos.wording import text_of

TEXTS = (".txt", ".json")
"""Suffixes of the captions of samples."""


def tar_items(tar: Path, name: str, warn: Callable[[str], None] = lambda text: None) -> Iterator[Item]:
    """Yield the items of a tar.

    Members with the same name up to the first dot of the file name form a sample: media, .txt and .json. Media with dots in
    their names have the caption with the same name up to the last dot, or with their whole name. If there is none, they have
    that of the sample, unless it is the own caption of media without dots.
    If the tar is cut off, the samples with complete members come first, and then an item whose problem
    says what is wrong. Nothing is unpacked under the names of members, and links are not followed.
    `warn` is called at the end if there are captions without media.
    """
    groups: dict[str, list[tarfile.TarInfo]] = {}
    alone, first_alone = 0, ""
    try:
        with open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            problem = _read_members(archive, tar.stat().st_size, groups)
            for members in groups.values():
                found = list(_sample_items(tar, name, archive, members))
                yield from found
                if not found and (texts := [member.name for member in members if _suffix(member) in TEXTS]):
                    alone, first_alone = alone + 1, first_alone or texts[0]
    except Exception as error:  # whatever tarfile raises for a foreign file
        problem = BROKEN_TAR, f"{_line(error)}; it must be a whole, uncompressed tar"
    if problem:
        yield Item(name, str(tar), problem=(problem[0], f"{tar}: {problem[1]}"))
    if alone:
        warn(f"{tar} has {alone:,} captions without a picture or clip; the first is {shown(first_alone)}")


def _read_members(archive: tarfile.TarFile, size: int, groups: dict[str, list[tarfile.TarInfo]]) -> tuple[str, str] | None:
    """Sort the members of a tar of `size` bytes into `groups` by sample.

    Return (reason, detail) if the tar is damaged, else None. The module tarfile does not report a tar
    that ends after some member or continues with bytes that are not a header, and it reads a member of
    negative size forever. This function checks for these cases.
    """
    end = 0
    try:
        for member in archive:
            if archive.offset <= end or member.size < 0:
                return BROKEN_TAR, f"{member.name} has an impossible size; the samples before are used"
            end = archive.offset
            path = PurePosixPath(member.name)
            sample = str(path.parent / (path.name.split(".", 1)[0] or path.name))
            if member.isfile() and member.offset_data + (0 if member.issparse() else member.size) > size:
                groups.pop(unicodedata.normalize("NFC", sample), None)
                return BROKEN_TAR, f"it is cut off in {member.name}; the samples before are used"
            if not member.isdir() and not _is_hidden(member):
                groups.setdefault(unicodedata.normalize("NFC", sample), []).append(member)
        archive.fileobj.seek(archive.offset)
        header = archive.fileobj.read(tarfile.BLOCKSIZE)
        behind = iter(lambda: archive.fileobj.read(1 << 20), b"")
        is_joined = not header.strip(b"\0") and any(block.strip(b"\0") for block in behind)
    except Exception as error:  # whatever tarfile raises for an invalid header
        return BROKEN_TAR, f"{_line(error)} after {sum(map(len, groups.values()))} files; the samples before are used"
    if not header:
        return NO_END, "it ends without the end marker of a tar, so files may be missing; the files before are used"
    if header.strip(b"\0"):
        return BROKEN_TAR, f"no tar header at byte {archive.offset}; the samples before are used"
    if is_joined:
        return BROKEN_TAR, "more follows behind its end marker, as in tars that were joined; name each as a source"
    return None


def _sample_items(tar: Path, name: str, archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Iterator[Item]:
    media = [member for member in members if _is_media(archive, member)]
    if not media and any(_suffix(member) in TEXTS for member in members):
        unknown = [member for member in members if _suffix(member) not in NOT_MEDIA]
        for member in unknown[:1]:
            why = f"{member.name} has a caption, but cannot be read as a picture or a video"
            yield Item(as_text(f"{name}/{member.name}"), str(tar), problem=(UNREADABLE, why))
    captions: dict[str, tuple[str, tuple[str, str] | None]] = {}
    is_shared = all("." in PurePosixPath(_stem(member)).name for member in media)
    for member in media:
        texts = [other for other in members if _suffix(other) in TEXTS]
        own = [other for other in texts if _stem(other) == _name(member)]
        own = own or [other for other in texts if _stem(other) == _stem(member)]
        whole = [other for other in texts if "." not in PurePosixPath(_stem(other)).name]
        key = _stem(own[0]) if own else ""
        if key not in captions:
            captions[key] = _caption(archive, own or (whole if is_shared else []))
        caption, problem = captions[key]
        id_, place = as_text(f"{name}/{member.name}"), {"member": member.name, "offset": member.offset_data, "size": member.size}
        if not member.isfile() or member.issparse():
            kind = "a sparse file" if member.isfile() else "a link" if member.issym() or member.islnk() else "a device or pipe"
            yield Item(id_, str(tar), problem=(NOT_A_FILE, f"{member.name} is {kind} in the tar; only plain files are read"))
        else:
            yield Item(id_, str(tar), caption, problem=problem, **place)


def _caption(archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> tuple[str, tuple[str, str] | None]:
    """Return (caption, None) with the first caption that can be read, or ("", problem); problem None: no caption.

    A .txt comes before a .json, wherever they stand in the tar: a record often holds the words from which a caption was made.
    """
    problem, found = None, {}
    for member in sorted(members, key=lambda member: TEXTS.index(_suffix(member))):
        kind = _suffix(member)
        if not member.isfile():
            problem = BAD_CAPTION, f"{member.name} is not a file in the tar"
            continue
        if member.size > MAX_ROW_LENGTH:
            problem = LONG_CAPTION, f"{member.name} has {member.size:,} bytes; at most {MAX_ROW_LENGTH:,} are read"
            continue
        try:
            text = text_of(archive.extractfile(member).read(), "surrogateescape")
        except Exception as error:  # whatever tarfile raises for an invalid member
            problem = BAD_CAPTION, f"cannot read {member.name}: {_line(error)}"
            continue
        row = json_row(text) if kind == ".json" else {"caption": text}
        if isinstance(row, str):
            problem = BAD_CAPTION, f"{member.name}: {row}"
        elif caption := first(row, CAPTION_KEYS):
            if found.setdefault(member.name, caption) != caption:
                return "", (BAD_CAPTION, f"{member.name} is in the tar twice, with other words; remove one of them")
        elif wrong := not_text(row, CAPTION_KEYS):
            problem = BAD_CAPTION, f"{member.name}: {wrong}"
    return next(iter(found.values()), ""), None if found else problem


def _is_hidden(member: tarfile.TarInfo) -> bool:
    """Return whether a member or its folder is hidden, such as the `._*` files of macOS."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(member.name).parts)


def _is_media(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    """Return whether a member is a picture or a clip: by its suffix, or by its content if the suffix is unknown."""
    suffix = _suffix(member)
    if suffix in MEDIA or suffix in OTHER_MEDIA:
        return True
    if suffix in NOT_MEDIA or not member.isfile() or member.issparse():
        return False
    with tempfile.TemporaryDirectory(prefix="lumos-") as folder:
        file = Path(folder) / "member"
        with file.open("wb") as out:
            shutil.copyfileobj(archive.extractfile(member), out)
        return can_read(file)


def _name(member: tarfile.TarInfo) -> str:
    return unicodedata.normalize("NFC", str(PurePosixPath(member.name)))


def _stem(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    return unicodedata.normalize("NFC", str(path.parent / path.stem))  # with_suffix refuses the name "."


def _suffix(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).suffix.lower()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
