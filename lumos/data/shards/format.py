"""The form of ingested data: a folder of Parquet shards, `dataset.json` and the journal of what was skipped.

One row is one clip: its codes (uint16, row-major), the grid [t, h, w], size, rate, caption, where it came from and a
checksum. Shards appear whole or not at all, so the rows that can be read are the state of an ingest. A shard's footer says
how large its clips are and what they are in sum, so that training knows both without reading them.

Folders and shards are paths (`pathlib.Path`), or for reading also URLs (`storage.Remote`).
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

from lumos.data.shards.remote import Remote
from lumos.errors import RunError, UserError, shown
from lumos.files import parse_json, replacing
from tokenizer.fingerprint import tokenizer_facts

FORMAT = 2
DESCRIPTION, REPORT = "dataset.json", "report.json"
SHEET = "sheet.png"
"""What `inspect` draws beside the shards; no data."""
FACTS = "lumos.facts"
"""The footer's key of what :class:`ShardFacts` holds, as JSON."""
VERSION_KEY, VERSION = "lumos.version", 2
"""The footer's key of the version of a shard, and the one that is written. In version 1, which has no such key, a checksum
covers codes and caption; in version 2 all columns, and FACTS have a checksum of their own."""
FOOTER_BYTES = 1 << 18
"""Read from the end of a remote shard at once; a thousand clips have a footer of about 160 kB."""
ROWS_IN_GROUP = 16
"""What is read from disk for one clip: small, because training asks for clips in random order."""


@lru_cache
def parquet() -> ModuleType:
    """pyarrow.parquet, or UserError if it is not installed."""
    try:
        import pyarrow.parquet as module
    except ImportError as error:
        raise UserError("Parquet files need pyarrow, which is not installed; pip install 'lumos-video[data]'") from error
    return module


def schema() -> Any:
    parquet()
    import pyarrow as pa

    fields = {
        "id": pa.string(),  # of the item; its clips share it
        "clip": pa.int32(),  # number of the clip in its item
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
    return pa.schema(fields)


def checksum(row: dict[str, Any]) -> str:
    """Of all columns of a row with codes [t, h, w]."""
    names = ("id", "clip", "num_frames", "height", "width", "fps", "caption", "source")
    head = json.dumps([*(row[name] for name in names), float(row["start"]), *row["codes"].shape])
    return _digest(head.encode() + np.ascontiguousarray(row["codes"], dtype="<u2").tobytes())


def content_checksum(row: dict[str, Any]) -> str:
    """Of codes [t, h, w], their shape and the caption of a row: what training sees of a clip."""
    head = json.dumps([*row["codes"].shape, row["caption"]])
    return _digest(head.encode() + np.ascontiguousarray(row["codes"], dtype="<u2").tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class ShardFacts:
    """What is known of a shard's clips without reading them. `digest` is of their ids and checksums, in their order."""

    digest: str
    num_frames: np.ndarray  # [N], as are the next three
    height: np.ndarray
    width: np.ndarray
    item: np.ndarray  # `item_number` of its id
    rows: tuple[int, ...]  # of each row group


def item_number(id_: str) -> int:
    """A number for an item's id, evenly spread, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest(), "little") >> 1


def shard_paths(folder: Path | Remote) -> list[Path] | list[Remote]:
    return sorted(folder.glob("shard-*.parquet"))


def check_count(folder: Path | Remote, clips: int) -> None:
    """RunError if a folder's shards hold fewer clips than its last ingest counted; a folder without a report has no count."""
    path = folder / REPORT
    try:
        report = parse_json(path.read_bytes().decode("utf-8", "replace"), str(path))
    except FileNotFoundError:
        return
    counted = report.get("clips") if isinstance(report, dict) else None
    if not isinstance(counted, int):
        raise RunError(f"{path} is damaged (it has no count of clips); run the same ingest again, which writes it anew")
    if clips < counted:
        raise RunError(
            f"the shards of {folder} hold {clips} of the {counted} clips that its {REPORT} counts; run the same ingest again, "
            f"which fills the gap, or delete {REPORT} if you took some shards away"
        )


def next_shard(folder: Path, reserved: Collection[str] = ()) -> Path:
    """The first free name, without the `reserved` ones."""
    taken = {path.name for path in shard_paths(folder)} | set(reserved)
    return folder / next(name for number in count() if (name := f"shard-{number:06d}.parquet") not in taken)


def content_digest(rows: list[dict[str, Any]]) -> str:
    """What a shard of these rows is in sum; :class:`ShardFacts` has it. The same in all versions, so that runs can be resumed."""
    return _digest(json.dumps([[row["id"], row["clip"], content_checksum(row)] for row in rows]).encode())


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows (codes as arrays [t, h, w], with their `checksum`) as one shard, whole or not at all."""
    import pyarrow as pa

    plain = [{**row, "codes": row["codes"].reshape(-1), "grid": list(row["codes"].shape)} for row in rows]
    facts = {
        "digest": content_digest(rows),
        **{name: [row[name] for row in rows] for name in ("num_frames", "height", "width")},
        "item": [item_number(row["id"]) for row in rows],
    }
    metadata = {FACTS: json.dumps(facts | {"checksum": _facts_checksum(facts)}), VERSION_KEY: str(VERSION)}
    options = {"compression": "zstd", "use_dictionary": False}  # codes hardly repeat; split bytes are 2 a code instead of 2.8
    with replacing(path) as temporary:
        table = pa.Table.from_pylist(plain, schema=schema())
        split = {"codes.list.element": "BYTE_STREAM_SPLIT"}
        with parquet().ParquetWriter(temporary, table.schema, column_encoding=split, **options) as writer:
            writer.write_table(table, row_group_size=ROWS_IN_GROUP)
            writer.add_key_value_metadata(metadata)


def _facts_checksum(facts: dict[str, Any]) -> str:
    return _digest(json.dumps(facts).encode())


def open_shard(path: Path | Remote, file: BinaryIO | None = None) -> Any:
    """pyarrow's ParquetFile, of `file` if it is given; RunError if the shard is cut off or has other columns."""
    import pyarrow as pa

    try:
        source = file or (pa.BufferReader(path.read_bytes()) if isinstance(path, Remote) else path)
        opened = parquet().ParquetFile(source)
        columns = opened.schema_arrow
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    for field in schema():
        if field.name not in columns.names or columns.field(field.name).type != field.type:
            raise damaged(path, f"it has no column {field.name} of {field.type}")
    _version(path, opened.metadata.metadata)
    return opened


def _version(path: Path | Remote, metadata: dict[bytes, bytes] | None) -> int:
    """Of a shard with this metadata; UserError for one that a later version of this program wrote."""
    given = (metadata or {}).get(VERSION_KEY.encode(), b"1")
    if given not in (b"1", b"2"):
        raise UserError(f"the shard {path} has version {shown(given)}, this program reads up to {VERSION}; use a later one")
    return int(given)


def read_facts(path: Path | Remote) -> ShardFacts:
    """From the shard's footer alone; RunError if it is cut off, has none, or says what cannot be."""
    import pyarrow as pa

    try:
        metadata = parquet().read_metadata(_footer(path) if isinstance(path, Remote) else path)
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
            raise ValueError(f"its footer tells {short[0]} of {len(columns[short[0]])} clips, it holds {sum(rows)}")
        if any((columns[name] < 1).any() for name in ("num_frames", "height", "width")):
            raise ValueError(f"{FACTS} has frames, a height or a width below 1")
        return ShardFacts(digest=str(fields["digest"]), rows=rows, **columns)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error) from error


def _footer(path: Remote) -> Any:
    """The end of the file, from where its footer begins or before."""
    import pyarrow as pa

    end = path.read_bytes(last=FOOTER_BYTES)
    needed = int.from_bytes(end[-8:-4], "little") + 8  # Parquet ends on the footer's length and four letters
    if len(end) == FOOTER_BYTES < needed and end.endswith(b"PAR1"):
        end = path.read_bytes(last=needed)
    return pa.BufferReader(end)


def read_ids(path: Path) -> list[str]:
    """The item of each clip of a shard; RunError as in :func:`open_shard`."""
    import pyarrow as pa

    opened = open_shard(path)
    try:
        ids = opened.read(columns=["id"]).column("id").to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    if None in ids:
        raise damaged(path, "a clip has no id")
    return ids


def read_group(
    path: Path | Remote, group: int, opened: Any = None, made_by: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The clips of a row group with codes as uint16 [t, h, w]; RunError for one with a wrong checksum or impossible values.

    `opened` is what :func:`open_shard` gave for the path, if it is at hand. `made_by` is what :func:`tokenizer_facts` says of
    the tokenizer; with it sizes must fit the grid exactly.
    """
    import pyarrow as pa

    opened = opened or open_shard(path)
    check = checksum if _version(path, opened.metadata.metadata) > 1 else content_checksum
    try:
        table = opened.read_row_group(group)
        codes = table.column("codes").combine_chunks()
        offsets, values = codes.offsets.to_numpy(), codes.values.to_numpy()
        rows = table.drop(["codes"]).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from error
    for i, row in enumerate(rows):
        row["codes"] = values[offsets[i] : offsets[i + 1]]
        if problem := _impossible(row, made_by):
            raise damaged(path, f"{shown(row['id'])} has {problem}")
        row["codes"] = row["codes"].reshape(row["grid"])
        if check(row) != row["checksum"]:
            raise damaged(path, f"the checksum of {row['id']} is wrong")
    return rows


def _impossible(row: dict[str, Any], made_by: dict[str, Any] | None) -> str | None:
    """What no clip has, if a row with flat codes [t * h * w] has it."""
    for name, value in row.items():
        if value is None or (isinstance(value, list) and None in value):
            return f"no {name}"
    codes, grid = row["codes"], row["grid"]
    if len(grid) != 3 or min(grid) < 1 or len(codes) != math.prod(grid):
        return f"{len(codes)} codes for the grid {grid}"
    for name, least in (("num_frames", 1), ("height", 1), ("width", 1), ("fps", 1), ("clip", 0), ("start", 0)):
        if not least <= row[name] < math.inf:
            return f"the {name} {row[name]}"
    frames, height, width = row["num_frames"], row["height"], row["width"]
    if made_by:
        time, space = made_by["temporal_compression"], made_by["spatial_compression"]
        if codes.max() >= made_by["num_codes"]:
            return f"the code {codes.max()}, where the tokenizer has {made_by['num_codes']}"
    else:  # of the sizes themselves
        time, space = max(frames - 1, 1) // max(grid[0] - 1, 1), max(height // grid[1], 1)
    if [(grid[0] - 1) * time + 1, grid[1] * space, grid[2] * space] != [frames, height, width]:
        return f"{frames} frames of {width}x{height} pixels, which do not fit the grid {grid}"
    return None


def read_shards(folder: Path | Remote) -> Iterator[dict[str, Any]]:
    """All clips of a folder, in order."""
    made_by = read_description(folder)["tokenizer"] if (paths := shard_paths(folder)) else None
    for path in paths:
        opened = open_shard(path)
        for group in range(opened.num_row_groups):
            yield from read_group(path, group, opened, made_by)


def damaged(path: Path | Remote, why: object) -> RunError:
    reason = (str(why).splitlines() or ["unreadable"])[0]
    remedy = "delete it and run the same ingest again: it fills the gap"
    if isinstance(path, Remote):
        remedy = "copy it there again from where it was ingested"
    return RunError(f"the shard {path} is damaged or cut off ({reason}); {remedy}")


def read_description(folder: Path | Remote) -> dict[str, Any]:
    """dataset.json: what made the codes. UserError if the folder holds no ingested data."""
    path = folder / DESCRIPTION
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} holds no ingested clips (no {DESCRIPTION}); make them with `python -m lumos ingest`"
        ) from error
    try:
        description = parse_json(text.decode("utf-8"), str(path))
        facts, format_ = description["tokenizer"], description.get("format")
        facts["fingerprint"], description["settings"]["fps"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); copy it again from a backup, or ingest into a new folder") from error
    if format_ != FORMAT:
        raise UserError(f"{path} has format {shown(format_)}, this version reads {FORMAT}; ingest again")
    for name in ("num_codes", "spatial_compression", "temporal_compression"):
        if not isinstance(value := facts.get(name), int) or value < 1:
            raise RunError(
                f"{path} is damaged ({name} {shown(value)}); copy it again from a backup, or ingest into a new folder"
            )
    return description


def check_tokenizer(description: dict[str, Any], tokenizer: Any, what: str) -> None:
    """UserError unless the codes were made with this video tokenizer; `what` names the setting that gave it."""
    made, given = description["tokenizer"], tokenizer_facts(tokenizer)
    if made["fingerprint"] != given["fingerprint"]:
        raise UserError(
            f"{what} is another video tokenizer than the one that made the shards ({made.get('folder')}, "
            f"{made['num_codes']} codes; this one has {given['num_codes']}): give that one, or ingest again with this one"
        )


def check_size(description: dict[str, Any], size: str | None, path: str | Path) -> None:
    """UserError unless the shards were ingested with this --size; None: any is right."""
    made = description["settings"].get("size")
    if size is not None and size != made:
        raise UserError(f"data.size is {size}, but {path} was ingested with --size {made}; give others or leave data.size out")
