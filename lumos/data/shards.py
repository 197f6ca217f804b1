"""The form of ingested data: a folder of Parquet shards, `dataset.json` and the journal of what was skipped.

One row is one clip: its codes (uint16, row-major), the grid [t, h, w], size, rate, caption, where it came from and a
checksum. Shards appear whole or not at all, so the rows that can be read are the state of an ingest. A shard's footer says
how large its clips are and what they are in sum, so that training knows both without reading them.

Folders and shards are paths (`pathlib.Path`), or for reading also URLs (`storage.Remote`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from lumos.data.storage import Remote
from lumos.errors import RunError, UserError
from lumos.files import parse_json, replacing

FORMAT = 2
DESCRIPTION, REPORT = "dataset.json", "report.json"
SHEET = "sheet.png"
"""What `inspect` draws beside the shards; no data."""
FACTS = "lumos.facts"
"""The footer's key of what :class:`ShardFacts` holds, as JSON."""
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


def checksum(codes: np.ndarray, caption: str) -> str:
    """Of codes [t, h, w], their shape and the caption."""
    codes = np.ascontiguousarray(codes, dtype="<u2")
    head = json.dumps([*codes.shape, caption]).encode()
    return hashlib.blake2b(head + codes.tobytes(), digest_size=16).hexdigest()


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
    """What a shard of these rows is in sum; :class:`ShardFacts` has it."""
    content = json.dumps([[row["id"], row["clip"], row["checksum"]] for row in rows])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows (codes as arrays [t, h, w]) as one shard, whole or not at all."""
    import pyarrow as pa

    plain = [{**row, "codes": row["codes"].reshape(-1), "grid": list(row["codes"].shape)} for row in rows]
    facts = {
        "digest": content_digest(rows),
        **{name: [row[name] for row in rows] for name in ("num_frames", "height", "width")},
        "item": [item_number(row["id"]) for row in rows],
    }
    options = {"compression": "zstd", "use_dictionary": False}  # codes hardly repeat; split bytes are 2 a code instead of 2.8
    with replacing(path) as temporary:
        table = pa.Table.from_pylist(plain, schema=schema())
        split = {"codes.list.element": "BYTE_STREAM_SPLIT"}
        with parquet().ParquetWriter(temporary, table.schema, column_encoding=split, **options) as writer:
            writer.write_table(table, row_group_size=ROWS_IN_GROUP)
            writer.add_key_value_metadata({FACTS: json.dumps(facts)})


def open_shard(path: Path | Remote, file: BinaryIO | None = None) -> Any:
    """pyarrow's ParquetFile, of `file` if it is given; RunError if the shard is cut off or has other columns."""
    import pyarrow as pa

    try:
        source = file or (pa.BufferReader(path.read_bytes()) if isinstance(path, Remote) else path)
        opened = parquet().ParquetFile(source)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    missing = [name for name in schema().names if name not in opened.schema_arrow.names]
    if missing:
        raise damaged(path, f"it has no column {missing[0]}")
    return opened


def read_facts(path: Path | Remote) -> ShardFacts:
    """From the shard's footer alone; RunError if it is cut off or has none."""
    try:
        metadata = parquet().read_metadata(_footer(path) if isinstance(path, Remote) else path)
        fields = json.loads(metadata.metadata[FACTS.encode()])
        digest = fields.pop("digest")
        columns = {name: np.array(values, dtype=np.int64) for name, values in fields.items()}
        rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        if short := [name for name, values in columns.items() if len(values) != sum(rows)]:
            raise ValueError(f"its footer tells {short[0]} of {len(columns[short[0]])} clips, it holds {sum(rows)}")
        return ShardFacts(digest=digest, rows=rows, **columns)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    except (KeyError, TypeError) as error:
        raise RunError(f"the shard {path} was written by another program (no {FACTS} in its footer); ingest again") from error


def _footer(path: Remote) -> Any:
    """The end of the file, from where its footer begins or before."""
    import pyarrow as pa

    end = path.read_bytes(last=FOOTER_BYTES)
    needed = int.from_bytes(end[-8:-4], "little") + 8  # Parquet ends on the footer's length and four letters
    if len(end) == FOOTER_BYTES < needed and end.endswith(b"PAR1"):
        end = path.read_bytes(last=needed)
    return pa.BufferReader(end)


def read_columns(path: Path, columns: list[str]) -> dict[str, np.ndarray]:
    """Columns of a shard; RunError as in :func:`open_shard`."""
    try:
        table = open_shard(path).read(columns=columns)
        return {name: table.column(name).to_numpy() for name in columns}
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def read_group(path: Path | Remote, group: int, opened: Any = None) -> list[dict[str, Any]]:
    """The clips of a row group with codes as uint16 [t, h, w], each checked against its checksum; RunError if one differs.

    `opened` is what :func:`open_shard` gave for the path, if it is at hand.
    """
    try:
        table = (opened or open_shard(path)).read_row_group(group)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    codes = table.column("codes").combine_chunks()
    offsets, values = codes.offsets.to_numpy(), codes.values.to_numpy()
    rows = table.drop(["codes"]).to_pylist()
    for i, row in enumerate(rows):
        flat = values[offsets[i] : offsets[i + 1]]
        if flat.size != np.prod(row["grid"]):
            raise damaged(path, f"{row['id']} has {flat.size} codes for the grid {row['grid']}")
        row["codes"] = flat.reshape(row["grid"])
        if checksum(row["codes"], row["caption"]) != row["checksum"]:
            raise damaged(path, f"the checksum of {row['id']} is wrong")
    return rows


def read_shards(folder: Path | Remote) -> Iterator[dict[str, Any]]:
    """All clips of a folder, in order."""
    for path in shard_paths(folder):
        opened = open_shard(path)
        for group in range(opened.num_row_groups):
            yield from read_group(path, group, opened)


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
        description = json.loads(text)
        description["tokenizer"]["fingerprint"], description["settings"]["fps"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); copy it again from a backup, or ingest into a new folder") from error
    if description.get("format") != FORMAT:
        raise UserError(f"{path} has format {description.get('format')}, this version reads {FORMAT}; ingest again")
    return description


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What decides whether codes fit a video tokenizer.

    The fingerprint is of the weights rounded to half precision: an export in float16 is the same tokenizer. A window of
    attention belongs to it, because it changes the codes of long clips.
    """
    digest = hashlib.blake2b(digest_size=16)
    if tokenizer.config.attention_window is not None:
        digest.update(f"attention_window {tokenizer.config.attention_window}".encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return {
        "fingerprint": digest.hexdigest(),
        "num_codes": tokenizer.num_codes,
        "spatial_compression": tokenizer.spatial_compression,
        "temporal_compression": tokenizer.temporal_compression,
    }


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
