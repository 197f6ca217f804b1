"""The format of a shard, a Parquet file of clips: its columns and its footer, and how both are written, read and checked.

A row of a shard is a clip: its codes (uint16, row-major), their grid [t, h, w], the size and frame rate
of the clip, its caption, its source and a checksum. If the ingest was asked for them, a row also has
the codes of each frame, encoded as a picture (uint16 [T, h, w], row-major). A shard is written completely or not at all, so the
rows of the shards are the state of an ingest. The footer of a shard has the sizes of its clips and a
digest of their content, so that training knows both without reading the rows. The other files of a
folder of shards are read in `description.py`, except for the journals, which belong to the ingest.

Folders and shards are paths (`pathlib.Path`). For reading they can also be URLs (`remote.Remote`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from lumos.data.shards.description import read_description
from lumos.data.shards.remote import Remote
from lumos.errors import RunError, UserError, shown
from lumos.files import open_regular, replacing

FACTS = "lumos.facts"
"""Key in the footer of a shard for the fields of :class:`ShardFacts` as JSON."""
VERSION_KEY, VERSION = "lumos.version", 4
"""Key in the footer for the version of a shard, and the version of shards whose rows have the columns ORIGIN. Version 1 has no
such key, and its checksum of a row covers codes and caption. In version 2 it covers all columns, and FACTS has its own
checksum. Version 3 has the column FRAME_CODES too. In version 4 FRAME_CODES is optional."""
ORIGIN = ("original_height", "original_width", "stride")
"""Columns with the size of the frames that a clip was scaled and cropped from, and the number of frames of the source from one
of its frames to the next. Either all rows of a shard have them, or none."""
FRAME_CODES = "frame_codes"
"""Column of the codes of single frames, and key of a row for them, uint16 [T, h, w]."""
FOOTER_BYTES = 1 << 18
"""Bytes read at the end of a remote shard in the first request. The footer of a thousand clips has about 160 kB."""
ROWS_IN_GROUP = 16
"""Rows of a row group, which is read from disk for each clip. It is small because training reads clips in random order."""


@lru_cache
def parquet() -> ModuleType:
    """Return the module pyarrow.parquet; raise UserError if it is not installed."""
    try:
        import pyarrow.parquet as module
    except ImportError as error:
        raise UserError("Parquet files need pyarrow, which is not installed; pip install 'lumos-video[data]'") from error
    return module


def schema(per_frame: bool = False, origin: bool = True) -> Any:
    """Return the columns of a shard as a pyarrow schema, with or without codes of single frames and the columns ORIGIN."""
    parquet()
    import pyarrow as pa

    fields = {
        "id": pa.string(),  # of the item; all clips of an item have the same id
        "clip": pa.int32(),  # index of the clip in its item
        "codes": pa.list_(pa.uint16()),
        "grid": pa.list_(pa.int32()),
        "num_frames": pa.int32(),
        "height": pa.int32(),
        "width": pa.int32(),
        "fps": pa.int32(),
        "caption": pa.string(),
        "source": pa.string(),
        "start": pa.float64(),
        "checksum": pa.string(),
    }
    if origin:
        fields |= dict(zip(ORIGIN, (pa.int32(), pa.int32(), pa.float64()), strict=True))
    return pa.schema(fields | ({FRAME_CODES: pa.list_(pa.uint16())} if per_frame else {}))


def checksum(row: dict[str, Any]) -> str:
    """Return the checksum of all columns of a row with codes [t, h, w] and, if it has them, frame codes [T, h, w]."""
    names = ("id", "clip", "num_frames", "height", "width", "fps", "caption", "source")
    origin = [row[name] for name in ORIGIN if name in row]
    head = json.dumps([*(row[name] for name in names), float(row["start"]), *row["codes"].shape, *origin])
    return _digest(head.encode() + _code_bytes(row))


def content_checksum(row: dict[str, Any]) -> str:
    """Return the checksum of all codes, their shape and the caption of a row, which are what training uses."""
    head = json.dumps([*row["codes"].shape, row["caption"]])
    return _digest(head.encode() + _code_bytes(row))


def _code_bytes(row: dict[str, Any]) -> bytes:
    """Return the codes of a row, and behind them those of single frames if it has them."""
    return b"".join(np.ascontiguousarray(row[name], dtype="<u2").tobytes() for name in ("codes", FRAME_CODES) if name in row)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class ShardFacts:
    """The facts about the N clips of a shard that its footer has."""

    digest: str  # of the ids and content checksums of the clips, in order
    num_frames: np.ndarray  # [N]
    height: np.ndarray  # [N]
    width: np.ndarray  # [N]
    item: np.ndarray  # [N], `item_number` of the id
    rows: tuple[int, ...]  # number of rows of each row group


def item_number(id_: str) -> int:
    """Return a 63-bit hash of the id of an item, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest(), "little") >> 1


def shard_paths(folder: Path | Remote) -> list[Path] | list[Remote]:
    """Return the paths of all shards of a folder, sorted by name."""
    return sorted(folder.glob("shard-*.parquet"))


def next_shard(folder: Path, reserved: Collection[str] = ()) -> Path:
    """Return the path of a new shard: the first name that is neither in the folder nor in `reserved`."""
    taken = {path.name for path in shard_paths(folder)} | set(reserved)
    return folder / next(name for number in count() if (name := f"shard-{number:06d}.parquet") not in taken)


def content_digest(rows: list[dict[str, Any]]) -> str:
    """Return the digest of a shard with these rows, which :class:`ShardFacts` has.

    It is the same in all versions of shards, so that training runs can be resumed.
    """
    return _digest(json.dumps([[row["id"], row["clip"], content_checksum(row)] for row in rows]).encode())


def _regular(path: Path) -> Path:
    """Return the path of a regular file; raise OSError for a pipe, a folder or a device, which pyarrow would wait for."""
    open_regular(path).close()
    return path


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with codes [t, h, w] and checksums as a shard, which appears completely or not at all.

    Either all rows have codes of single frames, or none; likewise for the columns ORIGIN.
    """
    import pyarrow as pa

    per_frame, origin = (bool(rows) and name in rows[0] for name in (FRAME_CODES, ORIGIN[0]))
    columns = ["codes", FRAME_CODES] if per_frame else ["codes"]
    plain = [{**row, **{name: row[name].reshape(-1) for name in columns}, "grid": list(row["codes"].shape)} for row in rows]
    facts = {
        "digest": content_digest(rows),
        **{name: [row[name] for row in rows] for name in ("num_frames", "height", "width")},
        "item": [item_number(row["id"]) for row in rows],
    }
    version = VERSION if origin else 3 if per_frame else 2
    metadata = {FACTS: json.dumps(facts | {"checksum": _facts_checksum(facts)}), VERSION_KEY: str(version)}
    # Codes hardly repeat, so a dictionary does not help. Splitting their bytes needs 2 bytes per code instead of 2.8.
    options = {"compression": "zstd", "use_dictionary": False}
    with replacing(path) as temporary:
        table = pa.Table.from_pylist(plain, schema=schema(per_frame, origin))
        split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in columns}
        with parquet().ParquetWriter(temporary, table.schema, column_encoding=split, **options) as writer:
            writer.write_table(table, row_group_size=ROWS_IN_GROUP)
            writer.add_key_value_metadata(metadata)


def _facts_checksum(facts: dict[str, Any]) -> str:
    return _digest(json.dumps(facts).encode())


def open_shard(path: Path | Remote, file: BinaryIO | None = None) -> Any:
    """Open a shard as a ParquetFile of pyarrow, from `file` or, if it is None, from `path`.

    Raise RunError if the shard is damaged or has other columns, and UserError if its version is unknown.
    """
    import pyarrow as pa

    try:
        source = file or (pa.BufferReader(path.read_bytes()) if isinstance(path, Remote) else _regular(path))
        opened = parquet().ParquetFile(source)
        columns = opened.schema_arrow
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    for field in _schema_of(path, opened):
        if field.name not in columns.names or columns.field(field.name).type != field.type:
            raise damaged(path, f"it has no column {field.name} of {field.type}")
    return opened


def _schema_of(path: Path | Remote, opened: Any) -> Any:
    """Return the columns that an open shard must have, by its version."""
    version = _version(path, opened.metadata.metadata)
    return schema(version == 3 or (version == VERSION and FRAME_CODES in opened.schema_arrow.names), version == VERSION)


def _version(path: Path | Remote, metadata: dict[bytes, bytes] | None) -> int:
    """Return the version of a shard with this metadata; raise UserError if a later program wrote the shard."""
    given = (metadata or {}).get(VERSION_KEY.encode(), b"1")
    if given not in (b"1", b"2", b"3", b"4"):
        raise UserError(f"the shard {path} has version {shown(given)}, this program reads up to {VERSION}; use a newer version")
    return int(given)


def read_facts(path: Path | Remote) -> ShardFacts:
    """Return the facts of a shard; only its footer is read.

    Raise RunError if the shard is damaged, has no facts or has impossible facts.
    """
    import pyarrow as pa

    try:
        metadata = parquet().read_metadata(_footer(path) if isinstance(path, Remote) else _regular(path))
        rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    version = _version(path, metadata.metadata)
    if FACTS.encode() not in (metadata.metadata or {}):
        raise RunError(f"the shard {path} was written by another program (no {FACTS} in its footer); ingest again")
    try:
        fields = json.loads(metadata.metadata[FACTS.encode()])
        if version > 1 and fields.pop("checksum") != _facts_checksum(fields):
            raise ValueError(f"the checksum of {FACTS} is wrong")
        columns = {name: np.array(fields[name], dtype=np.int64) for name in ("num_frames", "height", "width", "item")}
        if short := [name for name, values in columns.items() if values.shape != (sum(rows),)]:
            raise ValueError(f"its footer has the {short[0]} of {len(columns[short[0]])} clips, it holds {sum(rows)} clips")
        if any((columns[name] < 1).any() for name in ("num_frames", "height", "width")):
            raise ValueError(f"{FACTS} has frames, a height or a width below 1")
        return ShardFacts(digest=str(fields["digest"]), rows=rows, **columns)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error) from error


def _footer(path: Remote) -> Any:
    """Return the end of a remote file as a pyarrow buffer that contains at least the whole footer."""
    import pyarrow as pa

    end = path.read_bytes(last=FOOTER_BYTES)
    needed = int.from_bytes(end[-8:-4], "little") + 8  # a Parquet file ends with the length of the footer and "PAR1"
    if len(end) == FOOTER_BYTES < needed and end.endswith(b"PAR1"):
        end = path.read_bytes(last=needed)
    return pa.BufferReader(end)


def read_ids(path: Path) -> list[str]:
    """Return the item id of each clip of a shard; raise the errors of :func:`open_shard`."""
    return read_texts(path, "id")


def read_texts(path: Path, column: str) -> list[str]:
    """Return the values of a column of texts of a shard; raise the errors of :func:`open_shard`."""
    import pyarrow as pa

    opened = open_shard(path)
    try:
        values = opened.read(columns=[column]).column(column).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    if None in values:
        raise damaged(path, f"a clip has no {column}")
    return values


def read_group(
    path: Path | Remote, group: int, opened: Any = None, made_by: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the clips of a row group, with codes uint16 [t, h, w] and, if the shard has them, frame codes [T, h, w].

    `opened` is the result of :func:`open_shard` for the path, if the shard is already open. `made_by` is
    the result of :func:`tokenizer.fingerprint.tokenizer_facts` for the tokenizer that made the codes. If it is given, codes
    and sizes are checked against it. Raise RunError if a clip has a wrong checksum or impossible values.
    """
    import pyarrow as pa

    opened = opened or open_shard(path)
    version = _version(path, opened.metadata.metadata)
    check = checksum if version > 1 else content_checksum
    stored = _schema_of(path, opened).names
    names = [name for name in ("codes", FRAME_CODES) if name in stored]
    try:
        table = opened.read_row_group(group, columns=stored)
        columns = {name: table.column(name).combine_chunks() for name in names}
        parts = {name: (column.offsets.to_numpy(), column.values.to_numpy()) for name, column in columns.items()}
        rows = table.drop(names).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    for i, row in enumerate(rows):
        row |= {name: values[offsets[i] : offsets[i + 1]] for name, (offsets, values) in parts.items()}
        if problem := _impossible(row, made_by):
            raise damaged(path, f"{shown(row['id'])} has {problem}")
        row["codes"] = row["codes"].reshape(row["grid"])
        if FRAME_CODES in row:
            row[FRAME_CODES] = row[FRAME_CODES].reshape(-1, *row["grid"][1:])
        if check(row) != row["checksum"]:
            raise damaged(path, f"the checksum of {row['id']} is wrong")
    return rows


def _impossible(row: dict[str, Any], made_by: dict[str, Any] | None) -> str | None:
    """Return a description of an impossible value of a row with flat codes [t * h * w], or None if there is none."""
    for name, value in row.items():
        if value is None or (isinstance(value, list) and None in value):
            return f"no {name}"
    codes, grid = row["codes"], row["grid"]
    if len(grid) != 3 or min(grid) < 1 or len(codes) != math.prod(grid):
        return f"{len(codes)} codes for the grid {grid}"
    least = {"num_frames": 1, "height": 1, "width": 1, "fps": 1, "clip": 0, "start": 0} | dict.fromkeys(ORIGIN[:2], 1)
    for name, lowest in least.items():
        if name in row and not lowest <= row[name] < math.inf:
            return f"the {name} {row[name]}"
    if "stride" in row and not 0 < row["stride"] < math.inf:
        return f"the stride {row['stride']}"
    frames, height, width = row["num_frames"], row["height"], row["width"]
    of_frames = row.get(FRAME_CODES)
    if of_frames is not None and len(of_frames) != frames * grid[1] * grid[2]:
        return f"{len(of_frames)} codes of single frames for {frames} frames of {grid[1]} x {grid[2]} codes"
    if made_by:
        time, space = made_by["temporal_compression"], made_by["spatial_compression"]
        if codes.max() >= made_by["num_codes"]:
            return f"the code {codes.max()}, where the tokenizer has {made_by['num_codes']}"
        if of_frames is not None and of_frames.max() >= made_by["num_codes"]:
            return f"the code {of_frames.max()}, where the tokenizer has {made_by['num_codes']}"
    else:  # any tokenizer; the compression follows from the sizes
        time, space = max(frames - 1, 1) // max(grid[0] - 1, 1), max(height // grid[1], 1)
    if [(grid[0] - 1) * time + 1, grid[1] * space, grid[2] * space] != [frames, height, width]:
        return f"{frames} frames of {width}x{height} pixels, which do not fit the grid {grid}"
    return None


def read_shards(folder: Path | Remote) -> Iterator[dict[str, Any]]:
    """Yield all clips of a folder, in order; raise the errors of :func:`read_group`."""
    made_by = read_description(folder)["tokenizer"] if (paths := shard_paths(folder)) else None
    for path in paths:
        opened = open_shard(path)
        for group in range(opened.num_row_groups):
            yield from read_group(path, group, opened, made_by)


def damaged(path: Path | Remote, why: object) -> RunError:
    """Return the error for a damaged shard."""
    reason = (str(why).splitlines() or ["unreadable"])[0]
    remedy = "delete it and run the same ingest again: it fills the gap"
    if isinstance(path, Remote):
        remedy = "copy it again from the machine where it was ingested"
    return RunError(f"the shard {path} is damaged or cut off ({reason}); {remedy}")
