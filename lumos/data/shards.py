"""The form of ingested data: a folder of Parquet shards, `dataset.json` and the journal of what was skipped.

One row is one clip: its codes (uint16, row-major), the grid [t, h, w], size, rate, caption, where it came from and a
checksum. Shards appear whole or not at all, so the rows that can be read are the state of an ingest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lumos.errors import RunError, UserError
from lumos.files import replacing

FORMAT = 1
DESCRIPTION = "dataset.json"
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


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.parquet"))


def next_shard(folder: Path) -> Path:
    paths = shard_paths(folder)
    number = int(paths[-1].stem.split("-")[1]) + 1 if paths else 0
    return folder / f"shard-{number:06d}.parquet"


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows (codes as arrays [t, h, w]) as one shard, whole or not at all."""
    import pyarrow as pa

    plain = [{**row, "codes": row["codes"].reshape(-1), "grid": list(row["codes"].shape)} for row in rows]
    with replacing(path) as temporary:
        table = pa.Table.from_pylist(plain, schema=schema())
        parquet().write_table(table, temporary, row_group_size=ROWS_IN_GROUP, compression="zstd")


def open_shard(path: Path) -> Any:
    """pyarrow's ParquetFile; RunError if the shard is cut off or has other columns."""
    try:
        file = parquet().ParquetFile(path)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    missing = [name for name in schema().names if name not in file.schema_arrow.names]
    if missing:
        raise damaged(path, f"it has no column {missing[0]}")
    return file


def read_columns(path: Path, columns: list[str]) -> dict[str, np.ndarray]:
    """Columns of a shard; RunError as in :func:`open_shard`."""
    try:
        table = open_shard(path).read(columns=columns)
        return {name: table.column(name).to_numpy() for name in columns}
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def read_group(path: Path, group: int) -> list[dict[str, Any]]:
    """The clips of a row group with codes as uint16 [t, h, w], each checked against its checksum; RunError if one differs."""
    try:
        table = open_shard(path).read_row_group(group)
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


def read_shards(folder: Path) -> Iterator[dict[str, Any]]:
    """All clips of a folder, in order."""
    for path in shard_paths(folder):
        for group in range(open_shard(path).num_row_groups):
            yield from read_group(path, group)


def damaged(path: Path, why: object) -> RunError:
    reason = (str(why).splitlines() or ["unreadable"])[0]
    return RunError(f"the shard {path} is damaged or cut off ({reason}); delete it and run the same ingest again: it fills the gap")


def read_description(folder: str | Path) -> dict[str, Any]:
    """dataset.json: what made the codes. UserError if the folder holds no ingested data."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} holds no ingested clips (no {DESCRIPTION}); make them with `python -m lumos ingest`")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
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
