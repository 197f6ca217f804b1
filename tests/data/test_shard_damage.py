"""A shard's checksum covers every column, impossible values are damage, and shards of the first version are still read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from lumos.data.shards import format as shards
from lumos.data.shards.description import check_count, read_description
from lumos.errors import RunError, UserError

MADE_BY = {"num_codes": 64, "spatial_compression": 8, "temporal_compression": 4}


def rewritten(path: Path, to: Path, version: int | None = 4, **cells: object) -> Path:
    """Write a copy of a shard with other values in its first row, in the format of `version` if it is given."""
    opened = pq.ParquetFile(path)
    table = opened.read().replace_schema_metadata()
    metadata = {key: opened.metadata.metadata[key.encode()].decode() for key in (shards.FACTS, shards.VERSION_KEY)}
    rows = shards.read_group(path, 0)
    facts = json.loads(metadata[shards.FACTS])
    columns = {name: table.column(name).to_pylist() for name in table.schema.names}
    if version is None:
        del metadata[shards.VERSION_KEY], facts["checksum"]
        columns["checksum"] = [shards.content_checksum(row) for row in rows]
    else:
        metadata[shards.VERSION_KEY] = str(version)
    for name, value in cells.items():
        columns[name][0] = value
    with pq.ParquetWriter(to, table.schema) as writer:
        writer.write_table(pa.Table.from_pydict(columns, schema=table.schema))
        writer.add_key_value_metadata(metadata | {shards.FACTS: json.dumps(facts)})
    return to


@pytest.fixture
def shard(ingested) -> Path:
    return shards.shard_paths(ingested)[0]


OTHER = {"id": "other", "clip": 1, "num_frames": 1, "height": 8, "width": 8, "fps": 13, "caption": "other", "source": "other",
    "start": 0.5,
         "codes": [1] * 12, "grid": [2, 3, 2], "checksum": "other",
         "original_height": 1, "original_width": 1, "stride": 0.7}  # fmt: skip


@pytest.mark.parametrize("name", shards.schema().names)
def test_another_value_in_any_column_is_damage(shard, tmp_path, name):
    path = rewritten(shard, tmp_path / "s.parquet", **{name: OTHER[name]})
    with pytest.raises(RunError, match="is damaged or cut off"):
        shards.read_group(path, 0)


IMPOSSIBLE = [("num_frames", -5), ("num_frames", 0), ("height", 0), ("height", 24), ("width", -24), ("fps",
    0), ("fps", -1),
              ("start", float("nan")), ("start", float("inf")), ("start", -1.0), ("clip", -1), ("grid", [2, 2, -3]), ("grid", [2,
              6]),
              ("grid", []), ("grid", [2, None, 3]), ("id", None), ("codes", None), ("codes", [1]), ("height", None)]  # fmt: skip
IMPOSSIBLE_ORIGIN = [("original_height", 0), ("original_width", -1), ("original_height", None), ("stride", 0.0),
                     ("stride", float("nan")), ("stride", float("inf"))]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_values_are_damage_in_old_shards(shard, tmp_path, name, value):
    path = rewritten(shard, tmp_path / "s.parquet", None, **{name: value})
    for made_by in (None, MADE_BY):
        with pytest.raises(RunError, match=r"is damaged or cut off \(.* has "):
            shards.read_group(path, 0, made_by=made_by)


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE_ORIGIN)
def test_impossible_origins_are_damage(shard, tmp_path, name, value):
    with pytest.raises(RunError, match=r"is damaged or cut off \(.* has "):
        shards.read_group(rewritten(shard, tmp_path / "s.parquet", **{name: value}), 0)


def test_sizes_in_proportion_are_damage_for_another_tokenizer(shard, tmp_path):
    path = rewritten(shard, tmp_path / "s.parquet", None, num_frames=6)
    with pytest.raises(RunError, match=r"6 frames of 24x16 pixels, which do not fit the grid \[2, 2, 3\]"):
        shards.read_group(path, 0, made_by=MADE_BY)
    path = rewritten(shard, tmp_path / "s.parquet", None, height=32, width=48)
    with pytest.raises(RunError, match=r"5 frames of 48x32 pixels, which do not fit the grid \[2, 2, 3\]"):
        shards.read_group(path, 0, made_by=MADE_BY)
    with pytest.raises(RunError, match=r"the code \d+, where the tokenizer has 4"):
        shards.read_group(shard, 0, made_by=MADE_BY | {"num_codes": 4})


def test_shards_of_the_first_version_are_read(shard, tmp_path):
    old = rewritten(shard, tmp_path / "s.parquet", None)
    without = lambda rows: [{k: v for k, v in row.items() if k not in ("codes", "checksum", *shards.ORIGIN)} for row in rows]  # noqa: E731
    assert without(shards.read_group(old, 0, made_by=MADE_BY)) == without(shards.read_group(shard, 0))
    assert shards.read_facts(old).digest == shards.read_facts(shard).digest == shards.content_digest(shards.read_group(old, 0))
    other = rewritten(shard, tmp_path / "t.parquet", None, caption="other")
    with pytest.raises(RunError, match=r"the checksum of clips/0\.mp4 is wrong"):
        shards.read_group(other, 0)


def test_a_shard_of_a_later_version_is_refused(shard, tmp_path):
    later = rewritten(shard, tmp_path / "s.parquet", 5)
    for read in (shards.read_facts, shards.read_ids, lambda path: shards.read_group(path, 0)):
        with pytest.raises(UserError, match="reads up to 4; use a newer version"):
            read(later)


@pytest.mark.parametrize("facts", ["[", "3", "{}", "[" * 100_000, '{"digest": "x", "num_frames": [1e999]}', "changed"])
@pytest.mark.parametrize("version", [None, 2])
def test_footers_that_make_no_sense_are_damage(shard, tmp_path, facts, version):
    old = pq.ParquetFile(shard)
    metadata = {shards.FACTS: facts} | ({shards.VERSION_KEY: "2"} if version else {})
    if facts == "changed":
        known = json.loads(old.metadata.metadata[shards.FACTS.encode()])
        metadata[shards.FACTS] = json.dumps(known | {"num_frames": [*known["num_frames"][1:], 9 if version else -9]})
    with pq.ParquetWriter(tmp_path / "s.parquet", shards.schema()) as writer:
        writer.write_table(old.read().replace_schema_metadata())
        writer.add_key_value_metadata(metadata)
    with pytest.raises(RunError, match="is damaged or cut off"):
        shards.read_facts(tmp_path / "s.parquet")


def test_columns_of_other_types_are_damage(shard, tmp_path):
    table = pq.read_table(shard)
    for name, type_ in (("height", pa.float32()), ("id", pa.binary()), ("codes", pa.list_(pa.int64()))):
        index = table.schema.names.index(name)
        pq.write_table(table.set_column(index, name, table.column(name).cast(type_)), tmp_path / "s.parquet")
        with pytest.raises(RunError, match=f"it has no column {name} of "):
            shards.read_group(tmp_path / "s.parquet", 0)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[]", '{"tokenizer": 3}', "\udcff",
    '{"format": 2, "settings": {"fps": 1}, "tokenizer": {"fingerprint": "x", "num_codes": -1}}',
    '{"format": 2, "settings": {"fps": "x"}, "tokenizer": {"fingerprint": "x", "num_codes": 1}}'],
)
def test_a_description_that_makes_no_sense_is_damage(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"dataset.json is damaged"):
        read_description(tmp_path)


def test_pipes_and_folders_in_place_of_files_are_damage(ingested, tmp_path):
    folder = shutil.copytree(ingested, tmp_path / "shards")
    shard = shards.shard_paths(folder)[0]
    for name, read in (
        ("dataset.json", lambda: read_description(folder)),
        ("report.json", lambda: check_count(folder, 10**6)),
        (shard.name, lambda: shards.open_shard(shard)),
        (shard.name, lambda: shards.read_facts(shard)),
    ):
        for make in (os.mkfifo, os.mkdir):
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            with pytest.raises(RunError, match="damaged"):  # it must not wait for a writer
                read()
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
