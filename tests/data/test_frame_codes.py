"""Codes of single frames: an ingest stores them if asked, shards and training give them, older shards stay as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from ingest_helpers import SETTINGS

from lumos.cli import main
from lumos.data.curriculum import StepShape
from lumos.data.ingest.encode import ClipSettings
from lumos.data.ingest.ingest import ingest
from lumos.data.ingest.ray_executor import from_text, to_text
from lumos.data.shards import format as shards
from lumos.data.shards.description import DESCRIPTION, read_description
from lumos.data.shards.source import ShardSource
from lumos.errors import RunError, UserError
from lumos.files import write_json
from lumos.video.frames import from_uint8
from lumos.video.io import read_video
from tokenizer import VideoTokenizer

WITH_FRAMES = ClipSettings(fps=12, size="16x24", num_frames=5, per_frame_codes=True)


@pytest.fixture(scope="module")
def with_frames(clips, tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("frames") / "shards"
    ingest([clips], out, tokenizer, WITH_FRAMES, shard_clips=3, max_failure_rate=0.5)
    return out


@pytest.fixture(scope="module")
def model(tokenizer) -> VideoTokenizer:
    return VideoTokenizer.from_pretrained(tokenizer)


def source(folder: Path, model: VideoTokenizer, **options) -> ShardSource:
    return ShardSource(folder, model, kinds=["image", "video"], num_frames=5, size_unit=8, seed=0, held_out=0, **options)


@pytest.mark.slow
def test_rows_hold_the_codes_of_each_frame_as_a_picture(with_frames, ingested, clips, model):
    rows, without = list(shards.read_shards(with_frames)), list(shards.read_shards(ingested))
    assert [row["id"] for row in rows] == [row["id"] for row in without]
    for row, other in zip(rows, without, strict=True):
        assert np.array_equal(row["codes"], other["codes"])
        assert row[shards.FRAME_CODES].shape == (row["num_frames"], 2, 3)
        assert np.array_equal(row[shards.FRAME_CODES][:1], row["codes"][:1])
        assert shards.FRAME_CODES not in other
    row = rows[3]
    frames, _ = read_video(clips / "4.mp4", fps=12, num_frames=5, start=row["start"], size=(16, 24))
    for t in range(5):
        assert np.array_equal(row[shards.FRAME_CODES][t : t + 1], model.encode(from_uint8(frames[None, t : t + 1]))[0].numpy())


def test_dataset_json_says_that_frames_have_codes(with_frames, ingested):
    assert read_description(with_frames)["settings"]["per_frame_codes"] is True
    assert read_description(ingested)["settings"]["per_frame_codes"] is False


def test_earlier_versions_are_read_without_the_origin(with_frames, ingested, tmp_path):
    for number, (folder, per_frame) in enumerate(((ingested, False), (with_frames, True))):
        path = shards.shard_paths(folder)[0]
        assert pq.read_metadata(path).metadata[shards.VERSION_KEY.encode()] == b"4"
        assert pq.read_schema(path).names == shards.schema(per_frame).names
        rows = shards.read_group(path, 0)
        old = [{name: value for name, value in row.items() if name not in shards.ORIGIN} for row in rows]
        old = [row | {"checksum": shards.checksum(row)} for row in old]
        earlier = tmp_path / f"{number}.parquet"
        shards.write_shard(earlier, old)
        assert pq.read_metadata(earlier).metadata[shards.VERSION_KEY.encode()] == (b"3" if per_frame else b"2")
        assert pq.read_schema(earlier).names == shards.schema(per_frame, origin=False).names
        for row, back in zip(old, shards.read_group(earlier, 0), strict=True):
            assert row.keys() == back.keys()
            assert row["checksum"] == back["checksum"]
        assert shards.read_facts(earlier).digest == shards.read_facts(path).digest


def test_training_gets_the_codes_that_it_asks_for(with_frames, model):
    rows = {f"{row['id']}#{row['clip']}": row for row in shards.read_shards(with_frames)}
    of_clips, of_frames = source(with_frames, model), source(with_frames, model, per_frame=True)
    for kind, per_clip, per_frame in (("video", 2, 5), ("image", 1, 1)):
        for found, column, count in ((of_clips, "codes", per_clip), (of_frames, shards.FRAME_CODES, per_frame)):
            for clip in found.clips(0, StepShape(kind, 1), range(1)):
                assert np.array_equal(clip.codes, rows[clip.name][column][:count])
            assert found.most_codes[kind] == count * 6


def test_training_gets_the_last_frame_as_a_picture(with_frames, ingested, model):
    """The codes of the picture are stored beside the codes of the clip, and both are counted."""
    rows = {f"{row['id']}#{row['clip']}": row for row in shards.read_shards(with_frames)}
    found = source(with_frames, model, last_frame=True)
    for clip in found.clips(0, StepShape("video", 2), range(2)):
        assert np.array_equal(clip.codes, rows[clip.name]["codes"])
        assert np.array_equal(clip.last, rows[clip.name][shards.FRAME_CODES][4])
    assert found.most_codes == {"image": 6, "video": 18}
    with pytest.raises(UserError, match=r"codes of clips only, and patterns\.ends need those of single.*leave patterns\.ends out"):
        source(ingested, model, last_frame=True)


def test_training_on_frames_refuses_shards_without_their_codes(ingested, model, tmp_path):
    with pytest.raises(UserError, match=r"holds the codes of clips only.*--per-frame-codes"):
        source(ingested, model, per_frame=True)
    old = tmp_path / "old"
    shutil.copytree(ingested, old)
    description = json.loads((old / DESCRIPTION).read_text())
    del description["settings"]["per_frame_codes"]  # as an earlier version wrote it
    write_json(old / DESCRIPTION, description)
    assert source(old, model).clips(0, StepShape("video", 1), range(1))
    with pytest.raises(UserError, match="--per-frame-codes"):
        source(old, model, per_frame=True)


def test_an_earlier_folder_is_continued_only_as_it_began(ingested, clips, tokenizer, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(ingested, old)
    description = json.loads((old / DESCRIPTION).read_text())
    del description["settings"]["per_frame_codes"]
    write_json(old / DESCRIPTION, description)
    assert ingest([clips], old, tokenizer, SETTINGS, max_failure_rate=0.5)["new_items"] == 0
    with pytest.raises(UserError, match="per_frame_codes False, not True"):
        ingest([clips], old, tokenizer, WITH_FRAMES, max_failure_rate=0.5)


def damaged_copy(path: Path, to: Path, change) -> Path:
    """Write a copy of a shard with other frame codes in its first row."""
    opened = pq.ParquetFile(path)
    table, metadata = opened.read().replace_schema_metadata(), opened.metadata.metadata
    columns = {name: table.column(name).to_pylist() for name in table.schema.names}
    columns[shards.FRAME_CODES][0] = change(columns[shards.FRAME_CODES][0])
    with pq.ParquetWriter(to, table.schema) as writer:
        writer.write_table(pa.Table.from_pydict(columns, schema=table.schema))
        writer.add_key_value_metadata({key: metadata[key.encode()].decode() for key in (shards.FACTS, shards.VERSION_KEY)})
    return to


@pytest.mark.parametrize(
    "change",
    [lambda c: [(c[0] + 1) % 64, *c[1:]], lambda c: c[:-1], lambda c: [], lambda c: [64, *c[1:]], lambda c: None],
    ids=["another", "fewer", "none", "out of range", "null"],
)
def test_other_frame_codes_are_damage(with_frames, tmp_path, change):
    path = damaged_copy(shards.shard_paths(with_frames)[0], tmp_path / "s.parquet", change)
    made_by = read_description(with_frames)["tokenizer"]
    with pytest.raises(RunError, match="is damaged or cut off"):
        shards.read_group(path, 0, made_by=made_by)


def test_the_digest_covers_frame_codes(with_frames):
    rows = shards.read_group(shards.shard_paths(with_frames)[0], 0)
    before = shards.content_digest(rows)
    rows[0] = rows[0] | {shards.FRAME_CODES: rows[0][shards.FRAME_CODES] ^ 1}
    assert shards.content_digest(rows) != before


def test_frame_codes_cross_to_ray_as_text(with_frames):
    rows = shards.read_group(shards.shard_paths(with_frames)[0], 0)
    for row, back in zip(rows, from_text(to_text(rows)), strict=True):
        for name in ("codes", shards.FRAME_CODES):
            assert back[name].dtype == np.uint16
            assert np.array_equal(back[name], row[name])


def test_the_flag_of_the_command_stores_frame_codes(clips, tokenizer, tmp_path):
    main(["ingest", str(clips / "0.mp4"), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--fps", "12",
          "--size", "16x24", "--frames", "5", "--workers", "0", "--per-frame-codes"])  # fmt: skip
    assert next(shards.read_shards(tmp_path / "out"))[shards.FRAME_CODES].shape == (5, 2, 3)


def test_a_continuous_tokenizer_is_refused(clips, golden, tmp_path):
    with pytest.raises(UserError, match="ingest needs a video tokenizer with codes"):
        ingest([clips], tmp_path / "out", golden / "cosmos_cv", SETTINGS)
    assert not (tmp_path / "out").exists()
