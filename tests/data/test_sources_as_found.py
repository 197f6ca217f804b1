"""Tars, tables and folders as other programs leave them: nothing in them vanishes, and no item gets the caption of another."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumos.data.ingest.item import BAD_CAPTION, BAD_ROW, BROKEN_TAR, DUPLICATE, NO_CAPTION, UNREADABLE
from lumos.data.ingest.manifest import items
from lumos.data.ingest.tables import rows
from lumos.errors import UserError
from lumos.prompt_lists.rows import read_rows
from lumos.video.io import write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write_video(path, np.zeros((2, 16, 24, 3), np.uint8), 8)
    return path.read_bytes()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def found(*sources: Path, said: list[str] | None = None, **options) -> dict[str, str]:
    """Return the caption of each item, or the reason of its problem, by the end of its name."""
    warn = [].append if said is None else said.append
    return {item.id.partition("/")[2] or item.id: item.problem[0] if item.problem else item.caption
            for item in items(sources, warn=warn, **options)}  # fmt: skip


def test_the_second_of_two_joined_tars_is_said(clip, tmp_path):
    one, two = (tar(tmp_path / f"{n}.tar", (f"{n}.mp4", clip), (f"{n}.txt", b"a cat")) for n in (1, 2))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert found(both) == {"1.mp4": "a cat", "both.tar": BROKEN_TAR}


def test_captions_without_media_are_said(clip, tmp_path):
    members = {"1.txt": b"one", "2.mp4": clip, "2.txt": b"two", "3.odd": b"x", "3.txt": b"three", "4.json": b"{}", "5.odd": b"x"}
    for source in (tar(tmp_path / "b.tar", *members.items()), folder(tmp_path / "clips", members)):
        said: list[str] = []
        assert found(source, said=said) == {"2.mp4": "two", "3.odd": UNREADABLE if source.suffix else "three"}
        assert len(said) == 1
        assert "the first is '1.txt'" in said[0]


def test_a_text_that_is_in_a_tar_twice(clip, tmp_path):
    """A program that unpacks the tar would keep the last one."""
    made = tar(tmp_path / "a.tar", ("1.mp4", clip), ("1.txt", b"one"), ("1.txt", b"two"), ("2.mp4", clip), ("2.txt", b"x"),
               ("2.txt", b"x\n"), ("1.mp4", clip))  # fmt: skip
    assert found(made) == {"1.mp4": BAD_CAPTION, "2.mp4": "x", "1.mp4 (again 1)": DUPLICATE}


def test_names_of_tars_with_and_without_a_dot_in_front(clip, tmp_path):
    made = tar(tmp_path / "a.tar", ("./1.mp4", clip), ("1.txt", b"one"), ("a/2.mp4", clip), ("./a//2.txt", b"two"))
    assert found(made) == {"./1.mp4": "one", "a/2.mp4": "two"}


def test_captions_may_have_the_whole_name_of_a_file(clip, tmp_path):
    members = {"a.mp4": clip, "a.mp4.txt": b"of the clip", "a.webm": clip, "a.txt": b"of the other"}
    expected = {"a.mp4": "of the clip", "a.webm": "of the other"}
    assert found(tar(tmp_path / "a.tar", *members.items())) == expected
    assert found(folder(tmp_path / "clips", members)) == expected


def test_a_caption_is_not_that_of_a_name_elsewhere(clip, tmp_path):
    source = folder(tmp_path / "src", dict.fromkeys(("a.mp4", "sub/a.mp4", "sub/b.mp4", "x/c.mp4", "y/c.mp4"), clip))
    table, said = tmp_path / "captions.csv", []
    table.write_text("path,caption\na.mp4,in the root\nb.mp4,by name\nc.mp4,both\n")
    assert found(source, captions=table, said=said) == {
        "a.mp4": "in the root", "sub/a.mp4": NO_CAPTION, "sub/b.mp4": "by name", "x/c.mp4": "both", "y/c.mp4": "both",
    }  # fmt: skip
    assert len(said) == 1
    assert said[0].startswith("1 captions of ")
    assert "'c.mp4'" in said[0]


def test_links_of_captions_that_lead_nowhere(clip, tmp_path):
    folder(tmp_path / "src", {"a.mp4": clip})
    os.symlink("nowhere", tmp_path / "src" / "a.txt")
    assert found(tmp_path / "src") == {"a.mp4": BAD_CAPTION}


def test_only_archives_count_as_archives(clip, tmp_path):
    folder(tmp_path / "src", {"a.tar.mp4": clip, "a.tar.txt": b"a cat"})
    assert found(tmp_path / "src") == {"a.tar.mp4": "a cat"}
    for name in ("b.zip", "b.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match="is an archive; unpack it"):
            items([tmp_path / name])


def test_an_empty_source_among_others_is_said(clip, tmp_path):
    said: list[str] = []
    empty = tmp_path / "empty"
    empty.mkdir()
    assert found(folder(tmp_path / "src", {"a.mp4": clip, "a.txt": b"x"}), empty, said=said) == {"a.mp4": "x"}
    assert said == [f"the source {empty} has no media file and no row"]


@pytest.mark.parametrize("value", [["a", "b"], {"en": "a"}, 7, True])
def test_captions_that_are_no_text_are_said(clip, tmp_path, value):
    folder(tmp_path, {"a.mp4": clip})
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": "a.mp4", "caption": value}))
    record = json.dumps({"caption": value}).encode()
    for source in (tmp_path / "t.jsonl", tar(tmp_path / "t.tar", ("a.mp4", clip), ("a.json", record))):
        (item,) = items([source])
        assert item.problem[0] == BAD_CAPTION
        assert "not text" in item.problem[1]
    (row, item) = items([folder(tmp_path / "src", {"a.mp4": clip})], tmp_path / "t.jsonl")
    assert (row.problem[0], item.problem[0]) == (BAD_ROW, NO_CAPTION)
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": value, "caption": "x"}))
    (item,) = items([tmp_path / "t.jsonl"])
    assert "path is " in item.problem[1]


def test_empty_cells_of_tables_of_numbers(clip, tmp_path):
    """Programs write NaN into them; a blank caption is not the caption if another column has one."""
    folder(tmp_path, {"a.mp4": clip, "b.mp4": clip})
    nan = float("nan")
    columns = {"path": ["a.mp4", "b.mp4"], "caption": [nan, nan], "text": ["x", "y"], "start": [nan, 0.5], "end": [nan, 1.0]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert found(tmp_path / "t.parquet") == {"a.mp4": "x", "b.mp4@0.5-1.0": "y"}
    (tmp_path / "t.csv").write_text("path,caption,text,start\na.mp4, ,x,NaN\nb.mp4,,y,0:01\n")
    assert found(tmp_path / "t.csv") == {"a.mp4": "x", "row 2": BAD_ROW}


def test_a_key_that_stands_twice_in_a_row_is_no_row(clip, tmp_path):
    folder(tmp_path, {"a.mp4": clip})
    (tmp_path / "t.jsonl").write_text('{"path": "a.mp4", "caption": "one", "caption": "two"}\n')
    assert found(tmp_path / "t.jsonl") == {"row 1": BAD_ROW}
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "prompt": "two"}\n')
    assert "the key 'prompt' stands twice" in read_rows(tmp_path / "p.jsonl")[0].problem


def test_quotes_behind_a_space_are_quotes(tmp_path):
    (tmp_path / "t.csv").write_text('path, caption\na.mp4, "a cat, sleeping"\n')
    assert [row["caption"] for _, row in rows(tmp_path / "t.csv")] == ["a cat, sleeping"]
    (tmp_path / "p.csv").write_text('prompt, seed\n"a cat, sleeping", "3"\n')
    assert read_rows(tmp_path / "p.csv")[0].options == {"prompt": "a cat, sleeping", "seed": 3}
