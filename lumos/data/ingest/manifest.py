"""The items of the sources: folders, manifests, webdataset tars and single files, in a fixed order.

A manifest is a table with a row for each item. The `id` of an item does not depend on the folder of
its source or on earlier items, so a second ingest of the same source, or of a longer one, knows which
items are done. If an item has a problem, for example no caption or an invalid row, its field `problem`
says so. Such an item does not stop the stream.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from lumos.data.ingest.item import (
    BAD_CAPTION,
    BAD_ROW,
    BROKEN_TABLE,
    DUPLICATE,
    LONG_CAPTION,
    MEDIA,
    NOT_A_FILE,
    NOT_MEDIA,
    OTHER_MEDIA,
    UNREADABLE,
    Item,
    as_text,
    problem_of,
    problem_of_caption,
    problem_of_file,
    row_name,
)
from lumos.data.ingest.tables import CAPTION_KEYS, MAX_ROW_LENGTH, PATH_KEYS, TABLES, TableRow, first, not_text, rows
from lumos.data.ingest.tars import tar_items
from lumos.data.shards.description import DESCRIPTION, SHEET
from lumos.errors import RunError, UserError, shown
from lumos.files import existing_path, open_regular
from lumos.video.reading import can_read
from lumos.wording import one_line, text_of

MAX_PATH_LENGTH = 4096
"""Largest number of characters of a path in a table; no operating system opens a longer one."""
ARCHIVE = re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4?|lzma|z|br))?|tgz|tbz2?|txz|tzst|zip|rar|7z)$", re.IGNORECASE)
"""The end of the names of archives, which may hold media."""
NO_PATH = f"no path; columns for it: {', '.join(PATH_KEYS)}"
OF_CAPTIONS = "--captions"
"""First part of the ids of bad rows of the captions table, where other ids have the name of their source.
A table cannot have this name."""


def items(
    sources: Sequence[str | Path],
    captions: str | Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
    caption: str | None = None,
) -> Iterator[Item]:
    """Return an iterator over the items of all sources, in order.

    `captions` is a table with columns path and caption. Its captions take precedence over those beside
    the files. `warn` is called at the end if it has captions for files that are in no source. `caption` is
    that of all items instead. Raise UserError before the first item if a source is missing or of an unknown kind, if
    two sources have the same name, or if both captions and a caption are given.
    """
    paths = [Path(source) for source in sources]
    if not paths:
        raise UserError("no source given; give a folder, a manifest (csv, jsonl, parquet), a tar or a media file")
    for path in paths:
        _check_source(path)
    names = Counter(path.resolve().name for path in paths)
    for name, count in names.items():
        if count > 1:
            raise UserError(f"two sources are named {name}, so their items would have the same names; rename one of them")
    table = Path(captions) if captions else None
    if table and (table.suffix.lower() not in TABLES or problem_of_file(table)):
        raise UserError(f"--captions {table} must be a file with columns path and caption; allowed: {' '.join(TABLES)}")
    if caption is not None:
        if table:
            raise UserError("--captions and --caption both say what the clips show; leave one of them out")
        if problem := problem_of_caption(one_line(caption)):
            raise UserError(f"--caption {shown(caption)} cannot be used: {problem[1]}")
    return _checked(paths, table, warn, caption)


def _check_source(path: Path) -> None:
    try:
        found = path.exists()
    except OSError as error:
        raise UserError(f"cannot read the source {path}: {error.strerror}") from error
    if not found:
        raise UserError(f"there is no source {path}; give a folder, a manifest (csv, jsonl, parquet), a tar or a media file")
    if path.is_dir():
        return
    if problem := problem_of_file(path):
        raise UserError(f"cannot read the source: {problem[1]}")
    if path.suffix.lower() == ".tar":
        return
    if ARCHIVE.search(path.name):
        raise UserError(f"{path} is an archive; unpack it, and name the folder, or a .tar in it, as the source")
    if path.suffix.lower() not in (*TABLES, *MEDIA) and not can_read(path):
        raise UserError(f"{path} is not a known kind of source; allowed: a folder, {' '.join(TABLES)}, .tar, {' '.join(MEDIA)}")


def _checked(paths: list[Path], table: Path | None, warn: Callable[[str], None], caption: str | None) -> Iterator[Item]:
    """Yield all items with their captions, or with `caption`; an item whose id came before is a duplicate."""
    captions: dict[str, str] = {}
    used: dict[str, str] = {}
    shared: dict[str, None] = {}
    seen: Counter[bytes] = Counter()
    for item in _all_items(paths, table, captions, warn):
        item = _with_caption(item, captions, used, shared, caption)
        key = hashlib.blake2b(item.id.encode(), digest_size=16).digest()  # needs less memory than the id
        seen[key] += 1
        if seen[key] > 1:
            item = replace(item, id=f"{item.id} (again {seen[key] - 1})", problem=(DUPLICATE, f"{item.id} came before"))
        yield item
    if unused := [name for name in captions if name not in used]:
        warn(
            f"{len(unused):,} of {len(captions):,} captions of {table} are for files that are in no source; the first is for "
            f"{shown(unused[0])}"
        )
    if shared:
        warn(
            f"{len(shared):,} captions of {table} count for files in several folders, as no folder is named; the first is for "
            f"{shown(next(iter(shared)))}"
        )


def _all_items(paths: list[Path], table: Path | None, captions: dict[str, str], warn: Callable[[str], None]) -> Iterator[Item]:
    """Yield the items of all sources; first fill `captions` from the table and yield its bad rows."""
    if table is not None:
        yield from _read_captions(table, captions)
    for path in paths:
        is_empty = True
        for item in _items_of(path, warn):
            is_empty = False
            yield item
        if is_empty and len(paths) > 1:
            warn(f"the source {path} has no media file and no row")


def _with_caption(
    item: Item, captions: dict[str, str], used: dict[str, str], shared: dict[str, None], of_all: str | None
) -> Item:  # fmt: skip
    """Return the item with its caption as one line, or with a problem if it has no valid caption.

    `of_all` is the caption of any item. `used` gets the folder of the first item that takes a caption from `captions`, by the
    name of the caption, and `shared` the names of captions that items of several folders take.
    """
    name = PurePosixPath(_matching(item.id.partition("/")[2] or item.id))
    key = next((key for key in (str(name), name.name, name.stem) if key in captions and not _is_of_another(key, name, item)), None)
    own = item.caption if key is None else captions[key]
    caption = one_line(own if of_all is None else of_all)
    problem = item.problem
    if key is not None and used.setdefault(key, str(name.parent)) != str(name.parent):
        shared[key] = None
    if (key is not None or of_all is not None) and problem and problem[0] in (BAD_CAPTION, LONG_CAPTION):
        problem = None
    return replace(item, caption=caption, problem=problem or problem_of_caption(caption))


def _is_of_another(key: str, name: PurePosixPath, item: Item) -> bool:
    """Return whether a name in a table of captions is the path of another file of the item's folder."""
    if key == str(name) or item.member is not None:
        return False
    root = Path(item.path).parents[len(name.parts) - 1] if len(Path(item.path).parts) > len(name.parts) else None
    return root is not None and existing_path(root, key).is_file()


def _matching(name: str) -> str:
    """Return the form of a name in which names of tables and of files are compared.

    Windows writes backslashes, and macOS writes accents as characters of their own.
    """
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def _items_of(path: Path, warn: Callable[[str], None]) -> Iterator[Item]:
    name, suffix = as_text(path.resolve().name), path.suffix.lower()
    if path.is_dir():
        yield from folder_items(path, name, warn)
    elif suffix == ".tar":
        yield from tar_items(path, name, warn)
    elif suffix in TABLES:
        try:
            for number, row in rows(path):
                id_ = f"{name}/row {number}"
                yield _guarded(id_, str(path), lambda id_=id_, row=row: _row_item(path, name, id_, row))
        except RunError as error:
            yield Item(name, str(path), problem=(BROKEN_TABLE, str(error)))
    else:
        yield _guarded(name, str(path), lambda: _file_item(name, path))


def _guarded(id_: str, path: str, make: Callable[[], Item]) -> Item:
    """Return the result of `make`, or an item with a problem if bad data made `make` fail."""
    try:
        return make()
    except Exception as error:
        problem = problem_of(error)
        if problem is None:
            raise
        return Item(id_, path, problem=problem)


def folder_items(root: Path, name: str, warn: Callable[[str], None] = lambda text: None) -> Iterator[Item]:
    """Yield the media files in a folder and its subfolders, the entries of each folder sorted by name.

    Hidden files and folders are left out. A link to a folder is followed, but no folder is read twice. `warn` is called at the
    end if there are captions without media.
    """
    alone, first_alone = 0, ""
    # A list as the stack instead of recursion, because folders can be nested deeper than Python's stack allows.
    # (path relative to the root, whether it is a folder, whether a folder above it is a link); the last element is the next one
    todo = [("", True, False)]
    linked: set[tuple[int, int]] = set()  # folders outside of the root that were read
    while todo:
        below, is_folder, is_linked = todo.pop()
        path, id_ = root / below, as_text(f"{name}/{below}" if below else name)
        if is_folder:
            try:
                is_linked = is_linked or (bool(below) and path.is_symlink())
                if is_linked and not _is_new(path, root, linked):
                    yield Item(id_, str(path), problem=(DUPLICATE, f"{path} is a folder that is read under another name"))
                    continue
                with os.scandir(path) as entries:
                    inside = sorted((entry.name, _leads_to_folder(entry)) for entry in entries if not entry.name.startswith("."))
            except OSError as error:
                yield Item(id_, str(path), problem=(UNREADABLE, f"cannot list the folder {path}: {error.strerror}"))
                continue
            todo += [(f"{below}/{entry}" if below else entry, is_dir, is_linked) for entry, is_dir in reversed(inside)]
            texts = _texts_alone([entry for entry, is_dir in inside if not is_dir])
            first_alone = first_alone or (f"{below}/{texts[0]}" if below and texts else next(iter(texts), ""))
            alone += len(texts)
            continue
        drawn = path.name == SHEET and (path.parent / DESCRIPTION).exists()  # the preview of a folder of shards
        if ARCHIVE.search(path.name):
            yield Item(id_, str(path), problem=(NOT_A_FILE, f"{path} is an archive; name a .tar as a source, or unpack it"))
        elif not drawn and _is_media(path):
            yield _guarded(id_, str(path), lambda id_=id_, path=path: _file_item(id_, path))
    if alone:
        warn(f"{root} has {alone:,} texts beside no picture or clip; the first is {shown(first_alone)}")


def _texts_alone(files: Sequence[str]) -> list[str]:
    """Return the texts among the names of files of a folder that can be the caption of none of the others."""
    names = [PurePosixPath(_matching(name)) for name in files]
    media = {called for name in names if name.suffix.lower() not in NOT_MEDIA for called in (name.name, name.stem)}
    return [file for file, name in zip(files, names, strict=True) if name.suffix.lower() == ".txt" and name.stem not in media]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; False for a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_new(folder: Path, root: Path, linked: set[tuple[int, int]]) -> bool:
    """Return whether a link, or a folder behind one, is a folder that is not read without it and not in `linked` yet; add it there.

    Folders in the root are read without a link, except hidden ones.
    """
    target, status, top = folder.resolve(), folder.stat(), root.resolve()
    is_read = target.is_relative_to(top) and not any(part.startswith(".") for part in target.relative_to(top).parts)
    if is_read or top.is_relative_to(target) or (status.st_dev, status.st_ino) in linked:
        return False
    linked.add((status.st_dev, status.st_ino))
    return True


def _is_media(path: Path) -> bool:
    """Return whether an entry of a folder is taken for a picture or a clip: by its suffix, or by its content if it is unknown.

    It is also taken if it cannot be known, as for a link that leads nowhere and for a pipe, and if a caption lies beside it.
    Reading it then says what is wrong.
    """
    suffix = path.suffix.lower()
    if suffix in MEDIA or suffix in OTHER_MEDIA:
        return True
    if suffix in NOT_MEDIA:
        return False
    return not path.is_file() or not os.access(path, os.R_OK) or can_read(path) or os.path.lexists(_text_beside(path))


def _text_beside(file: Path) -> Path:
    """Return the path of the caption beside a file, in the Unicode form and case in which it exists.

    It has the name of the file with the suffix .txt behind it, or in place of the file's suffix.
    """
    names = [unicodedata.normalize(form, name) if form else name for name in (file.name, file.stem) for form in ("", "NFC", "NFD")]
    found = [file.with_name(name + suffix) for name in names for suffix in (".txt", ".TXT")]
    return next((text for text in found if os.path.lexists(text)), file.with_name(f"{file.stem}.txt"))


def _file_item(id_: str, file: Path) -> Item:
    if problem := problem_of_file(file):
        return Item(id_, str(file), problem=problem)
    text = _text_beside(file)
    try:
        with open_regular(text) as opened:
            data = opened.read(MAX_ROW_LENGTH + 1)
    except FileNotFoundError:
        if text.is_symlink():
            return Item(id_, str(file), problem=(BAD_CAPTION, f"{text} is a link that leads nowhere"))
        return Item(id_, str(file))
    except (OSError, ValueError) as error:
        return Item(id_, str(file), problem=(BAD_CAPTION, f"cannot read {text}: {getattr(error, 'strerror', None) or error}"))
    if len(data) > MAX_ROW_LENGTH:
        return Item(id_, str(file), problem=(LONG_CAPTION, f"{text} has more than {MAX_ROW_LENGTH:,} bytes"))
    return Item(id_, str(file), text_of(data, "surrogateescape"))


def _row_item(manifest: Path, name: str, id_: str, row: TableRow) -> Item:
    if isinstance(row, str):
        return Item(id_, str(manifest), problem=(BAD_ROW, row))
    written, caption = first(row, PATH_KEYS), first(row, CAPTION_KEYS)
    if not written:
        return Item(id_, str(manifest), problem=(BAD_ROW, not_text(row, PATH_KEYS) or NO_PATH))
    if len(written) > MAX_PATH_LENGTH:
        why = f"its path has {len(written):,} characters; at most {MAX_PATH_LENGTH:,} are allowed"
        return Item(id_, str(manifest), problem=(BAD_ROW, why))
    path = str(existing_path(manifest.parent, written))
    try:
        start, end = _seconds(row.get("start")) or 0.0, _seconds(row.get("end"))
        if not 0 <= start < (math.inf if end is None else end) or end == math.inf:
            raise ValueError("start must be at least 0 and below end")
    except (TypeError, ValueError, OverflowError) as error:
        why = f"start {shown(row.get('start'))}, end {shown(row.get('end'))}: {error}"
        return Item(id_, path, caption, problem=(BAD_ROW, why))
    part = "" if start == 0 and end is None else f"@{start!r}-{'' if end is None else repr(end)}"
    wrong = None if caption else not_text(row, CAPTION_KEYS)
    problem = wrong and (BAD_CAPTION, f"the column {wrong}")
    return Item(f"{name}/{row_name(Path(written).as_posix())}{part}", path, caption, start, end, problem=problem)


def _seconds(value: Any) -> float | None:
    """Return a time of a row in seconds; None for an empty cell and for NaN, which tables use for one.

    Raise TypeError, ValueError or OverflowError for other values.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        raise TypeError("a time is a number of seconds")
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise TypeError("a time is a number of seconds, for example 62.5") from None
    return None if math.isnan(seconds) else seconds


def _read_captions(table: Path, captions: dict[str, str]) -> Iterator[Item]:
    """Fill `captions` (name -> caption) from a table; yield an item with a problem for each bad row.

    A row with another caption for the file of an earlier row is bad too.
    """
    for number, row in rows(table):
        path = "" if isinstance(row, str) else first(row, PATH_KEYS)
        if not path:
            why = row if isinstance(row, str) else not_text(row, PATH_KEYS) or NO_PATH
            yield Item(f"{OF_CAPTIONS}/row {number}", str(table), problem=(BAD_ROW, why))
            continue
        name, caption = _matching(as_text(PurePosixPath(path).as_posix())), first(row, CAPTION_KEYS)
        if not caption and (wrong := not_text(row, CAPTION_KEYS)):
            yield Item(f"{OF_CAPTIONS}/row {number}", str(table), problem=(BAD_ROW, f"the column {wrong}"))
            continue
        if captions.setdefault(name, caption) != caption:
            why = f"an earlier row has another caption for {shown(path)}, which is the one that counts"
            yield Item(f"{OF_CAPTIONS}/row {number}", str(table), problem=(DUPLICATE, why))


@contextmanager
def as_file(item: Item) -> Iterator[Path]:
    """Context manager that gives the path of the item's media file.

    A member of a tar is copied into a temporary file, which is deleted at the end of the block.
    """
    if item.member is None:
        yield Path(item.path)
        return
    with tempfile.TemporaryDirectory(prefix="lumos-") as folder:
        file = Path(folder) / f"member{PurePosixPath(item.member).suffix.lower()}"
        with open_regular(item.path) as tar, file.open("wb") as out:
            tar.seek(item.offset)
            _copy(tar, out, item.size)
        yield file


def _copy(source: Any, target: Any, size: int) -> None:
    while size > 0 and (block := source.read(min(size, 1 << 24))):
        target.write(block)
        size -= len(block)
