"""What to ingest: folders, manifests, webdataset tars and single files as one stream of items in a fixed order.

An item's `id` does not depend on where its source lies or what stands before it, so that a second run over the same
(or a longer) source knows which items it has done. What is wrong with an item (no caption, a row that makes no sense)
is written on it; the stream never stops for one.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lumos.data.shards import DESCRIPTION, SHEET, parquet
from lumos.errors import RunError, UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CLIPS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".gif", ".apng")
MEDIA = PICTURES + CLIPS
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
PATH_KEYS = ("path", "file", "file_name", "filename", "video", "image")
CAPTION_KEYS = ("caption", "text", "prompt")

BAD_ROW, DUPLICATE, NO_CAPTION = "bad row", "duplicate", "no caption"
BROKEN_TAR, NO_END = "broken tar", "tar without an end"


@dataclass(frozen=True)
class Item:
    """A clip or picture to ingest: `path` is a file, or a tar of which bytes offset .. offset + size are the file `member`.

    `start`, `end` are seconds (end None: to the end). `problem` is (reason, detail) if it cannot be used.
    """

    id: str
    path: str
    caption: str = ""
    start: float = 0.0
    end: float | None = None
    member: str | None = None
    offset: int = 0
    size: int = 0
    problem: tuple[str, str] | None = None

    @property
    def is_picture(self) -> bool:
        """By its name; an animated webp or png is found out when it is read."""
        return PurePosixPath(self.member or self.path).suffix.lower() in PICTURES


def items(sources: Sequence[str | Path], captions: str | Path | None = None) -> Iterator[Item]:
    """The items of all sources, in order; `captions` is a table of path and caption that goes before captions found beside
    the files.

    UserError at once for a source that is missing or of an unknown kind, and for two of the same name.
    """
    paths = [Path(source) for source in sources]
    names = Counter(path.resolve().name for path in paths)
    if not paths:
        raise UserError("no source given; give a folder, a manifest (csv, jsonl, parquet), a tar or a media file")
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no source {path}; give a folder, a manifest (csv, jsonl, parquet), a tar or a media file")
        if not path.is_dir() and path.suffix.lower() not in (*TABLES, *MEDIA, ".tar"):
            raise UserError(f"{path} is no known kind of source; allowed: a folder, {' '.join(TABLES)}, .tar, {' '.join(MEDIA)}")
        if names[path.resolve().name] > 1:
            raise UserError(f"two sources are named {path.resolve().name}, which names their clips; rename one of them")
    return _checked(paths, _read_captions(Path(captions)) if captions else {})


def _checked(paths: list[Path], captions: dict[str, str]) -> Iterator[Item]:
    seen: Counter[int] = Counter()
    for path in paths:
        for item in _items_of(path):
            name = PurePosixPath(item.id.partition("/")[2] or item.id)
            given = next((captions[k] for k in (str(name), name.name, name.stem) if k in captions), item.caption)
            item = replace(item, caption=" ".join(given.split()))
            if not item.caption and item.problem is None:
                item = replace(item, problem=(NO_CAPTION, "no caption in the source, beside the file or in --captions"))
            key = hash(item.id)  # 8 bytes an item instead of the text; of one process only
            seen[key] += 1
            if seen[key] > 1:
                item = replace(item, id=f"{item.id} (again {seen[key] - 1})", problem=(DUPLICATE, f"{item.id} came before"))
            yield item


def _items_of(path: Path) -> Iterator[Item]:
    name, suffix = path.resolve().name, path.suffix.lower()
    if path.is_dir():
        for file in sorted((f for f in path.rglob("*") if f.suffix.lower() in MEDIA), key=lambda f: f.relative_to(path).parts):
            drawn = file.name == SHEET and (file.parent / DESCRIPTION).exists()  # of shards that lie in the source
            if not file.name.startswith(".") and file.is_file() and not drawn:
                yield Item(f"{name}/{file.relative_to(path).as_posix()}", str(file), _text_beside(file))
    elif suffix == ".tar":
        yield from _tar_items(path, name)
    elif suffix in TABLES:
        for number, row in _rows(path):
            yield _row_item(path, name, number, row)
    else:
        yield Item(name, str(path), _text_beside(path))


def _text_beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""


def _row_item(manifest: Path, name: str, number: int, row: dict[str, Any] | str) -> Item:
    if isinstance(row, str):
        return Item(f"{name}/row {number}", str(manifest), problem=(BAD_ROW, row))
    written, caption = _first(row, PATH_KEYS), _first(row, CAPTION_KEYS)
    if not written:
        return Item(f"{name}/row {number}", str(manifest), problem=(BAD_ROW, f"no path; columns for it: {', '.join(PATH_KEYS)}"))
    path = str(manifest.parent / written)
    try:
        start, end = float(row.get("start") or 0), float(row["end"]) if row.get("end") not in (None, "") else None
        if end is not None and math.isnan(end):  # how tables say that there is none
            end = None
        if not 0 <= start < (math.inf if end is None else end) or end == math.inf:
            raise ValueError("start must be at least 0 and below end")
    except (TypeError, ValueError) as error:
        why = f"start {row.get('start')}, end {row.get('end')}: {error}"
        return Item(f"{name}/row {number}", path, caption, problem=(BAD_ROW, why))
    part = "" if start == 0 and end is None else f"@{start!r}-{'' if end is None else repr(end)}"
    return Item(f"{name}/{PurePosixPath(written.replace(chr(92), '/'))}{part}", path, caption, start, end)


def _first(row: dict[str, Any], keys: Iterable[str]) -> str:
    value = next((row[key] for key in keys if row.get(key) not in (None, "")), "")
    return value.strip() if isinstance(value, str) else ""


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(row number from 1, columns or what is wrong with the row). RunError for a table that cannot be read at all."""
    suffix = table.suffix.lower()
    try:
        if suffix == ".parquet":
            number = 0
            for batch in parquet().ParquetFile(table).iter_batches(1024):
                for row in batch.to_pylist():
                    yield (number := number + 1), row
            return
        with table.open(encoding="utf-8-sig", errors="replace", newline="" if suffix in (".csv", ".tsv") else None) as lines:
            if suffix in (".csv", ".tsv"):
                csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
                yield from enumerate(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","), 1)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_row(line)
    except (OSError, csv.Error, ValueError) as error:
        raise RunError(f"cannot read {table}: {error}; check that it is a whole {suffix[1:]} file") from error


def _json_row(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else "not a JSON object"


def _read_captions(table: Path) -> dict[str, str]:
    if not table.is_file() or table.suffix.lower() not in TABLES:
        raise UserError(f"--captions {table} must be a file with columns path and caption; allowed: {' '.join(TABLES)}")
    captions = {}
    for number, row in _rows(table):
        if isinstance(row, str) or not _first(row, PATH_KEYS):
            raise UserError(f"{table}, row {number}: {row if isinstance(row, str) else 'no path'}; each row needs path and caption")
        captions[PurePosixPath(_first(row, PATH_KEYS)).as_posix()] = _first(row, CAPTION_KEYS)
    return captions


def _tar_items(tar: Path, name: str) -> Iterator[Item]:
    """Members that share what stands before the first dot of their name are one sample: media, .txt and .json.

    Of a tar that is cut off come the samples whose members are all whole, and an item that says what is wrong.
    """
    groups: dict[str, list[tarfile.TarInfo]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            problem = _read_members(archive, tar.stat().st_size, groups)
            for members in groups.values():
                caption = _tar_caption(archive, members)
                for member in members:
                    if PurePosixPath(member.name).suffix.lower() in MEDIA:
                        place = {"member": member.name, "offset": member.offset_data, "size": member.size}
                        yield Item(f"{name}/{member.name}", str(tar), caption, **place)
    except (OSError, tarfile.TarError) as error:
        problem = BROKEN_TAR, f"{error}; it must be a whole, uncompressed tar"
    if problem:
        yield Item(name, str(tar), problem=(problem[0], f"{tar}: {problem[1]}"))


def _read_members(archive: tarfile.TarFile, size: int, groups: dict[str, list[tarfile.TarInfo]]) -> tuple[str, str] | None:
    """Sort the files of a tar of `size` bytes into `groups` by sample; returns what is wrong with it.

    tarfile takes a tar that stops after any member, or goes on with something that is no header, for a whole one.
    """
    try:
        for member in archive:
            if not member.isfile():
                continue
            inner = PurePosixPath(member.name)
            sample = str(inner.with_name(inner.name.split(".", 1)[0] or inner.name))
            if member.offset_data + member.size > size:
                groups.pop(sample, None)
                return BROKEN_TAR, f"it is cut off in {member.name}; the samples before are used"
            groups.setdefault(sample, []).append(member)
        archive.fileobj.seek(archive.offset)
        header = archive.fileobj.read(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        return BROKEN_TAR, f"{error} after {sum(map(len, groups.values()))} files; the samples before are used"
    if not header:
        return NO_END, "it ends without the blocks that end a tar, so files may be missing; what is there is used"
    if header.strip(b"\0"):
        return BROKEN_TAR, f"no tar header at byte {archive.offset}; the samples before are used"
    return None


def _tar_caption(archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> str:
    for member in members:
        kind = PurePosixPath(member.name).suffix.lower()
        if kind in (".txt", ".json"):
            text = archive.extractfile(member).read().decode("utf-8", "replace")
            row = _json_row(text) if kind == ".json" else {"caption": text}
            if isinstance(row, dict) and _first(row, CAPTION_KEYS):
                return _first(row, CAPTION_KEYS)
    return ""


@contextmanager
def as_file(item: Item) -> Iterator[Path]:
    """The item's media as a file; a member of a tar is copied out for the time of the block."""
    if item.member is None:
        yield Path(item.path)
        return
    with tempfile.TemporaryDirectory(prefix="lumos-") as folder:
        file = Path(folder) / f"member{PurePosixPath(item.member).suffix.lower()}"
        with open(item.path, "rb") as tar, file.open("wb") as out:
            tar.seek(item.offset)
            _copy(tar, out, item.size)
        yield file


def _copy(source: Any, target: Any, size: int) -> None:
    while size > 0 and (block := source.read(min(size, 1 << 24))):
        target.write(block)
        size -= len(block)
