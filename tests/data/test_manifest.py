"""Every kind of source gives the same items: paths, captions, times and problems."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

from lumos.data.ingest import tables
from lumos.data.ingest.manifest import as_file, items
from lumos.errors import UserError


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of b.mp4 and a/c.png with captions, and d.gif without one."""
    folder = tmp_path / "clips"
    (folder / "a").mkdir(parents=True)
    for name in ("b.mp4", "a/c.png", "d.gif", "notes.md", ".hidden.mp4"):
        (folder / name).write_bytes(name.encode())
    (folder / "b.txt").write_text("a red\n circle ", encoding="utf-8")
    (folder / "a" / "c.txt").write_text("a blue square", encoding="utf-8")
    return folder


def facts(found):
    return [(item.id, item.caption, item.problem and item.problem[0]) for item in found]


def test_a_folder_in_a_fixed_order(clips):
    found = list(items([clips]))
    expected = [("clips/a/c.png", "a blue square", None), ("clips/b.mp4", "a red circle", None), ("clips/d.gif", "", "no caption")]
    assert facts(found) == expected
    assert [Path(item.path).read_bytes() for item in found] == [b"a/c.png", b"b.mp4", b"d.gif"]


def test_the_sheet_of_shards_in_a_source_is_no_picture_of_it(clips):
    (clips / "sheet.png").write_bytes(b"the user's own")
    (clips / "shards").mkdir()
    (clips / "shards" / "sheet.png").write_bytes(b"drawn by inspect")
    (clips / "shards" / "dataset.json").write_text("{}")
    assert [item.id for item in items([clips])] == ["clips/a/c.png", "clips/b.mp4", "clips/d.gif", "clips/sheet.png"]


def test_ids_do_not_depend_on_where_the_folder_lies(clips, tmp_path, monkeypatch):
    before = facts(items([clips]))
    (tmp_path / "elsewhere").mkdir()
    clips.rename(tmp_path / "elsewhere" / "clips")
    monkeypatch.chdir(tmp_path / "elsewhere" / "clips")
    assert facts(items(["."])) == before


def test_captions_beside_a_folder_go_first(clips, tmp_path):
    table = tmp_path / "captions.jsonl"
    rows = [{"path": "d.gif", "caption": "by name"}, {"path": "c", "text": "by stem"}, {"path": "b.mp4", "caption": "new"}]
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [item.caption for item in items([clips], table)] == ["by stem", "new", "by name"]


def test_one_caption_for_all_goes_before_all_others(clips):
    (clips / "b.txt").write_bytes(b"\xff\xfe\x00\xd8")  # no text
    assert facts(items([clips], caption=" a  gray rabbit ")) == [
        (name, "a gray rabbit", None) for name in ("clips/a/c.png", "clips/b.mp4", "clips/d.gif")
    ]
    with pytest.raises(UserError, match="--caption '' cannot be used: no caption"):
        items([clips], caption="")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_manifests_agree(clips, tmp_path, kind):
    rows = [
        {"path": "clips/b.mp4", "text": "whole", "start": "", "end": ""},
        {"path": "clips/b.mp4", "text": "part", "start": "0.5", "end": "2"},
        {"path": "clips/b.mp4", "text": "part again", "start": "0.5", "end": "2"},
        {"path": "clips/a/c.png", "text": "", "start": "", "end": ""},
        {"path": "", "text": "nothing", "start": "", "end": ""},
        {"path": "clips/d.gif", "text": "wrong times", "start": "3", "end": "2"},
        {"path": str(clips / "d.gif"), "text": "absolute", "start": "1", "end": ""},
    ]
    table = tmp_path / f"m.{kind}"
    if kind == "csv":
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        numbers = [{**row, "start": float(row["start"] or 0), "end": float(row["end"]) if row["end"] else None} for row in rows]
        pq.write_table(pa.Table.from_pylist(numbers), table)
    found = list(items([table]))
    name = table.name
    assert facts(found) == [
        (f"{name}/clips/b.mp4", "whole", None),
        (f"{name}/clips/b.mp4@0.5-2.0", "part", None),
        (f"{name}/clips/b.mp4@0.5-2.0 (again 1)", "part again", "duplicate"),
        (f"{name}/clips/a/c.png", "", "no caption"),
        (f"{name}/row 5", "", "bad row"),
        (f"{name}/row 6", "wrong times", "bad row"),
        (f"{name}/{clips.as_posix()}/d.gif@1.0-", "absolute", None),
    ]
    assert [(item.start, item.end) for item in found[:2]] == [(0.0, None), (0.5, 2.0)]
    assert Path(found[0].path).read_bytes() == b"b.mp4"


def test_a_line_that_is_not_json_is_counted_and_left_out(clips, tmp_path):
    table = tmp_path / "m.jsonl"
    table.write_text('{"path": "clips/b.mp4", "caption": "x"}\n{"path": \n\n[1]\n{"path": "clips/d.gif", "caption": "y"}\n')
    assert [problem for _, _, problem in facts(items([table]))] == [None, "bad row", "bad row", None]


def test_a_webdataset_tar(tmp_path):
    tar = tmp_path / "part-000.tar"
    members = {
        "x/0001.mp4": b"first", "x/0001.txt": b"caption one", "x/0002.json": b'{"caption": "caption two"}',
        "x/0002.jpg": b"second", "x/0003.mp4": b"third",
    }  # fmt: skip
    with tarfile.open(tar, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = list(items([tar]))
    assert facts(found) == [
        ("part-000.tar/x/0001.mp4", "caption one", None),
        ("part-000.tar/x/0002.jpg", "caption two", None),
        ("part-000.tar/x/0003.mp4", "", "no caption"),
    ]
    for item, data in zip(found, (b"first", b"second", b"third"), strict=True):
        with as_file(item) as file:
            assert file.read_bytes() == data
            assert file.suffix == Path(item.member).suffix
        assert not file.exists()


@pytest.fixture
def tar(tmp_path) -> Path:
    """A tar of three samples (0.png with 0.txt, and so on), with files of 1024 bytes: a sample takes 3072 bytes."""
    path = tmp_path / "w.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for n in range(3):
            for suffix, data in ((".png", bytes(1024)), (".txt", b"caption".ljust(1024))):
                info = tarfile.TarInfo(f"{n}{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("cut", "samples", "problem"),
    [
        (9216, 3, "tar without an end"),
        (6144, 2, "tar without an end"),
        (0, 0, "broken tar"),
        (9216 - 1, 2, "broken tar"),  # in the caption of the last
        (3072 + 512 + 5, 1, "broken tar"),  # in a picture
        (6144 + 100, 2, "broken tar"),  # in a header
        (6144 + 512, 2, "broken tar"),  # after a header
    ],
)
def test_a_cut_tar_gives_its_whole_samples_and_one_failure(tar, cut, samples, problem):
    tar.write_bytes(tar.read_bytes()[:cut])
    expected = [(f"w.tar/{n}.png", "caption", None) for n in range(samples)]
    assert facts(items([tar])) == [*expected, ("w.tar", "", problem)]


def test_a_tar_with_garbage_gives_its_samples_and_a_failure(tar, tmp_path):
    whole = tar.read_bytes()
    tar.write_bytes(whole[:6144] + b"garbage!" * 1000)
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    found = list(items([tmp_path / "none.tar", tar]))
    assert facts(found)[0] == ("none.tar", "", "broken tar")
    assert "uncompressed tar" in found[0].problem[1]
    assert facts(found)[1:] == [("w.tar/0.png", "caption", None), ("w.tar/1.png", "caption", None), ("w.tar", "", "broken tar")]
    tar.write_bytes(whole)
    assert len(list(items([tar]))) == 3


def test_a_long_name_cut_in_the_middle_of_its_headers(tar):
    """tarfile raises an error here, although it ignores a plain header that is cut off."""
    with tarfile.open(tar, "a") as archive:
        archive.addfile(tarfile.TarInfo("x" * 200 + ".txt"))
    assert len(list(items([tar]))) == 3
    tar.write_bytes(tar.read_bytes()[: 9216 + 512])
    assert [problem for _, _, problem in facts(items([tar]))] == [None, None, None, "broken tar"]


def test_wrong_sources_are_refused(clips, tmp_path):
    with pytest.raises(UserError, match="there is no source"):
        items([tmp_path / "none"])
    with pytest.raises(UserError, match="not a known kind of source"):
        items([clips / "notes.md"])
    (tmp_path / "x" / "clips").mkdir(parents=True)
    with pytest.raises(UserError, match="two sources are named clips"):
        items([clips, tmp_path / "x" / "clips"])
    with pytest.raises(UserError, match="--captions"):
        items([clips], tmp_path / "none.jsonl")


def test_text_that_a_parquet_file_repeats_is_held_once(tmp_path):
    """A few hundred bytes of the file stand for 2.8 GB of captions."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"path": ["x.mp4"] * 700, "caption": pa.DictionaryArray.from_arrays([0] * 700, ["a" * 4_000_000])})
    pq.write_table(table, tmp_path / "m.parquet", compression="zstd", store_schema=False)
    del table
    before = pa.total_allocated_bytes()
    found = items([tmp_path / "m.parquet"])
    next(found)
    assert pa.total_allocated_bytes() - before < 64 * 2**20


def test_columns_that_need_too_much_memory_are_skipped(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.setattr(tables, "MAX_COLUMN_BYTES", 1000)
    rows = [{"path": f"{i}.mp4", "caption": str(i) * 900} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet", row_group_size=2, use_dictionary=False)
    found = [why for _, row in tables.rows(tmp_path / "m.parquet") for why in [row] if isinstance(row, str)]
    assert len(found) == 2
    assert all("caption has" in why and "1,000 are allowed" in why for why in found)
