"""Captions, tables and folders as they occur in practice: encodings, quotes, foreign file names, links, unknown suffixes."""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumos.commands.demo import read_examples
from lumos.data.ingest.encode import ClipSettings, begin
from lumos.data.ingest.item import BAD_CAPTION, BAD_ROW, BROKEN_TABLE, DUPLICATE, MISSING, NOT_A_FILE, UNREADABLE
from lumos.data.ingest.manifest import items
from lumos.data.ingest.tables import rows
from lumos.errors import UserError
from lumos.files import read_json, read_prompts, read_text
from lumos.prompt_lists.rows import read_rows
from lumos.video.io import write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write_video(path, np.zeros((2, 16, 24, 3), np.uint8), 8)
    return path.read_bytes()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def found(source: Path, **options) -> dict[str, str]:
    """Return the caption of each item, or the reason of its problem, by the end of its name."""
    return {item.id.partition("/")[2]: item.problem[0] if item.problem else item.caption for item in items([source], **options)}


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_captions_in_marked_encodings_are_read_right(clip, tmp_path, encoding):
    text = "ein größerer Kreis \N{CAT FACE}"
    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert found(tmp_path) == {"a.mp4": text}
    record = json.dumps({"caption": text}, ensure_ascii=False).encode(encoding)
    made = tar(tmp_path / "x.tar", {"1.mp4": clip, "1.txt": text.encode(encoding), "2.mp4": clip, "2.json": record})
    assert list(found(made).values()) == [text, text]
    for name, written in (("t.csv", f"path,caption\na.mp4,{text}\n"), ("t.tsv", f"path\tcaption\na.mp4\t{text}\n"),
                          ("t.jsonl", json.dumps({"path": "a.mp4", "caption": text}, ensure_ascii=False) + "\n")):  # fmt: skip
        (tmp_path / name).write_bytes(written.encode(encoding))
        assert [row["caption"] for _, row in rows(tmp_path / name)] == [text]
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "list.txt", "a list") == text
    (tmp_path / "p.json").write_bytes(record)
    assert read_json(tmp_path / "p.json", "a document") == {"caption": text}


def test_captions_that_cannot_be_read_have_a_reason(clip, tmp_path):
    written = {
        "latin": "café".encode("latin-1"), "lost": "caf\ufffd".encode(), "inside": "a\ufeff cat".encode(), "zero": b"a\0cat",
        "escape": "猫".encode("iso-2022-jp"), "odd": "a cat".encode("utf-16")[:-1],
    }  # fmt: skip
    for name, data in written.items():
        (tmp_path / f"{name}.mp4").write_bytes(clip)
        (tmp_path / f"{name}.txt").write_bytes(data)
    assert found(tmp_path) == {f"{name}.mp4": BAD_CAPTION for name in written} | {"inside.mp4": "a cat"}
    (tmp_path / "list.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_text(tmp_path / "list.txt", "a list")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_captions_in_encodings_without_a_mark_are_read_right(clip, tmp_path, encoding):
    text = "a größer \N{CAT FACE}"
    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "t.csv").write_bytes(f"path,caption\na.mp4,{text}\n".encode(encoding))
    assert found(tmp_path) == {"a.mp4": text}
    assert found(tmp_path / "t.csv") == {"a.mp4": text}
    assert read_prompts(tmp_path / "a.txt", "captions") == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["一只猫在草地上跑", "Ā cat", "猫が走る"])
def test_captions_of_an_unsure_byte_order_have_a_reason(clip, tmp_path, encoding, text):
    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert found(tmp_path) == {"a.mp4": BAD_CAPTION}


def test_one_letter_in_utf_16(tmp_path):
    (tmp_path / "a.txt").write_bytes("a".encode("utf-16-le"))
    assert read_text(tmp_path / "a.txt", "a list") == "a"


def test_marks_inside_of_prompts_and_lost_characters(tmp_path):
    (tmp_path / "list.txt").write_bytes("one\n".encode("utf-8-sig") + "two\n".encode("utf-8-sig"))
    assert [row.options["prompt"] for row in read_rows(tmp_path / "list.txt")] == ["one", "two"]
    (tmp_path / "list.txt").write_text("one\ntw\ufffd\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2 has U\+FFFD"):
        read_rows(tmp_path / "list.txt")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_marks_inside_of_tables_are_no_part_of_a_path(clip, tmp_path, suffix):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(clip)
    if suffix == ".jsonl":
        lines = [json.dumps({"path": name, "caption": "x"}) for name in ("a.mp4", "b.mp4")]
    else:
        lines = [("," if suffix == ".csv" else "\t").join(cells) for cells in (("path", "caption"), ("a.mp4", "x"), ("b.mp4", "x"))]
    table = tmp_path / f"t{suffix}"
    table.write_bytes(b"".join(line.encode("utf-8-sig") + b"\n" for line in lines))
    assert found(table) == {"a.mp4": "x", "b.mp4": "x"}


def test_lines_of_prompts_end_as_those_of_any_system(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "list.txt").write_bytes(f"one{end}two\u2028still two{end}".encode())
        assert [row.options["prompt"] for row in read_rows(tmp_path / "list.txt")] == ["one", "two\u2028still two"]
        assert read_examples(tmp_path / "list.txt") == ["one", "two\u2028still two"]


@pytest.mark.parametrize(("suffix", "cell"), [(".csv", ","), (".tsv", "\t")])
def test_rows_with_too_many_cells_and_wrong_columns_are_said(clip, tmp_path, suffix, cell):
    """A comma in a caption without quotes does not cut the caption."""
    (tmp_path / "a.mp4").write_bytes(clip)
    table = tmp_path / f"t{suffix}"
    table.write_text(f"path{cell}caption\na.mp4{cell}a cat{cell} and a dog\na.mp4{cell}a cat\n")
    assert list(found(table).values()) == [BAD_ROW, "a cat"]
    table.write_text(f" path {cell} caption\na.mp4{cell}a cat\n")
    assert list(found(table).values()) == ["a cat"]
    twice = f"path{cell}caption{cell}caption\na.mp4{cell}a cat{cell}a dog\n"
    for written in (f"a.mp4{cell}a cat\n", f"clip{cell}words\na.mp4{cell}a cat\n", "", twice):
        table.write_text(written)
        assert [item.problem[0] for item in items([table])] == [BROKEN_TABLE]


def test_members_of_a_tar_with_dots_have_their_own_captions(clip, tmp_path):
    made = tar(tmp_path / "d.tar", {
        "clip_1.5s.mp4": clip, "clip_1.5s.txt": b"first", "clip_1.7s.mp4": clip, "clip_1.7s.json": b'{"caption": "second"}',
        "7.left.mp4": clip, "7.right.mp4": clip, "7.txt": b"both", "a.b/8.mp4": clip, "a.b/8.txt": b"in a folder", "9.x.mp4": clip,
    })  # fmt: skip
    assert found(made) == {
        "clip_1.5s.mp4": "first", "clip_1.7s.mp4": "second", "7.left.mp4": "both", "7.right.mp4": "both",
        "a.b/8.mp4": "in a folder", "9.x.mp4": "no caption",
    }  # fmt: skip


@pytest.mark.parametrize("first", ["1.txt", "1.json"])
def test_a_text_counts_before_a_record_of_the_same_sample(clip, tmp_path, first):
    """Records often hold the words of a page, from which the caption was made; the order in the tar is that of a program."""
    members = {"1.mp4": clip, "1.txt": b"a cat", "1.json": b'{"caption": "cat.jpg for sale"}'}
    assert found(tar(tmp_path / "d.tar", {first: members.pop(first), **members})) == {"1.mp4": "a cat"}


@pytest.mark.parametrize("text", ["nan", "None", "NULL", "<NA>", " nan\n"])
def test_what_programs_write_for_a_missing_caption_is_none(clip, tmp_path, text):
    made = tar(tmp_path / "d.tar", {"1.mp4": clip, "1.txt": text.encode(), "2.mp4": clip, "2.txt": b"nan bread"})
    assert found(made) == {"1.mp4": "no caption", "2.mp4": "nan bread"}


def test_a_caption_of_one_film_is_not_that_of_another(clip, tmp_path):
    made = tar(tmp_path / "d.tar", {"clip_1.mp4": clip, "clip_1.txt": b"first", "clip_1.5s.mp4": clip})
    assert found(made) == {"clip_1.mp4": "first", "clip_1.5s.mp4": "no caption"}


def test_quotes_are_text_in_tsv_and_strict_in_csv(tmp_path):
    (tmp_path / "t.tsv").write_text('path\tcaption\na.mp4\t"quoted" text\nb.mp4\t5" wide\nc.mp4\t"open\nd.mp4\tlast\n')
    assert [row["caption"] for _, row in rows(tmp_path / "t.tsv")] == ['"quoted" text', '5" wide', '"open', "last"]
    (tmp_path / "t.csv").write_text('path,caption\na.mp4,"quoted, ""twice"""\nb.mp4,"wrong" text\nc.mp4,5" wide\n')
    read = [row for _, row in rows(tmp_path / "t.csv")]
    assert (read[0]["caption"], read[2]["caption"]) == ('quoted, "twice"', '5" wide')
    assert "a quote inside of quotes is written twice" in read[1]


def test_names_from_other_systems_find_their_files(clip, tmp_path):
    composed = unicodedata.normalize("NFC", "grün.mp4")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / composed).write_bytes(clip)
    (tmp_path / "plain.mp4").write_bytes(clip)
    decomposed = unicodedata.normalize("NFD", composed)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"path": path, "caption": "x"}) + "\n" for path in (
        f"sub\\{composed}", f"sub/{decomposed}", f"sub\\{decomposed}", "plain.mp4", "none.mp4")))  # fmt: skip
    for item in list(items([tmp_path / "t.jsonl"]))[:4]:
        assert Path(item.path).is_file()
    (tmp_path / "captions.csv").write_text(f"path,caption\nsub\\{decomposed},green\nplain.mp4,plain\n")
    assert found(tmp_path, captions=tmp_path / "captions.csv") == {f"sub/{composed}": "green", "plain.mp4": "plain"}


def test_each_part_of_a_path_has_its_own_form(clip, tmp_path):
    folder, file = unicodedata.normalize("NFC", "größe"), unicodedata.normalize("NFD", "grün.mp4")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / file).write_bytes(clip)
    paths = [f"{unicodedata.normalize(form, folder)}{slash}{unicodedata.normalize(other, file)}"
             for form in ("NFC", "NFD") for other in ("NFC", "NFD") for slash in "/\\"]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"path": path, "caption": "x"}) + "\n" for path in paths))
    assert {Path(item.path) for item in items([tmp_path / "t.jsonl"])} == {tmp_path / folder / file}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_captions_beside_files_from_other_systems_are_found(clip, tmp_path, forms):
    media, text = (unicodedata.normalize(form, name) for form, name in zip(forms, ("grün.mp4", "grün.txt"), strict=True))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / media).write_bytes(clip)
    (tmp_path / "folder" / text).write_text("green")
    (tmp_path / "folder" / "upper.mp4").write_bytes(clip)
    (tmp_path / "folder" / "upper.TXT").write_text("upper")
    assert set(found(tmp_path / "folder").values()) == {"green", "upper"}
    assert found(tar(tmp_path / "a.tar", {media: clip, text: b"green"})) == {media: "green"}


def test_captions_without_a_file_are_said(clip, tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "captions.csv").write_text("path,caption\na.mp4,here\nb.mp4,gone\nc.mp4,gone too\n")
    said: list[str] = []
    assert found(tmp_path, captions=tmp_path / "captions.csv", warn=said.append) == {"a.mp4": "here"}
    assert len(said) == 1
    assert said[0].startswith("2 of 3 captions of ")
    assert "'b.mp4'" in said[0]


def test_a_second_caption_for_a_file_is_said(clip, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.mp4").write_bytes(clip)
    captions = tmp_path / "captions.csv"
    captions.write_text("path,caption\na.mp4,one\na.mp4,two\n./a.mp4,one\n")
    assert found(tmp_path / "src", captions=captions) == {"row 2": DUPLICATE, "a.mp4": "one"}


def test_no_folder_behind_links_is_read_twice(clip, tmp_path):
    source, other = tmp_path / "src", tmp_path / "real"
    (other / "in").mkdir(parents=True)
    source.mkdir()
    for folder in (other, other / "in"):
        (folder / "a.mp4").write_bytes(clip)
        (folder / "a.txt").write_text("x")
    (other / "again").symlink_to(other / "in")
    for name, target in (("a", other / "in"), ("b", other), ("c", other / "in")):
        (source / name).symlink_to(target)
    assert found(source) == {
        "a/a.mp4": "x", "b/a.mp4": "x", "b/again": DUPLICATE, "b/in": DUPLICATE, "c": DUPLICATE,
    }  # fmt: skip


def test_links_to_hidden_folders_are_followed(clip, tmp_path):
    source, hidden = tmp_path / "src", tmp_path / "src" / ".store" / "in"
    hidden.mkdir(parents=True)
    for folder in (hidden.parent, hidden):
        (folder / "a.mp4").write_bytes(clip)
        (folder / "a.txt").write_text("x")
    (hidden / "back").symlink_to(source)
    (source / "data").symlink_to(hidden.parent)
    (source / "more").symlink_to(hidden)
    assert found(source) == {"data/a.mp4": "x", "data/in/a.mp4": "x", "data/in/back": DUPLICATE, "more": DUPLICATE}


def test_nothing_in_a_folder_vanishes(clip, tmp_path):
    source, other = tmp_path / "src", tmp_path / "real"
    source.mkdir()
    other.mkdir()
    names = ["a.wmv", "b.ts", "c.flv", "d.3gp", "e.mts", "f.unknown", "g"]
    for name in names:
        (source / name).write_bytes(clip)
    Image.new("RGB", (24, 16)).save(source / "h.picture", "PNG")
    (source / "notes.xyz").write_text("no media")
    (source / "broken.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (other / "r.mp4").write_bytes(clip)
    (other / "back").symlink_to(other)  # loops
    (other / "home").symlink_to(source)
    (source / "linked").symlink_to(other)
    (source / "own").symlink_to(source)
    (source / ".cache").mkdir()
    for hidden in (".cache/old.mp4", "._a.mp4"):
        (source / hidden).write_bytes(clip)
    captions = tmp_path / "captions.csv"
    captions.write_text("path,caption\n" + "".join(f"{name},x\n" for name in [*names, "h.picture", "r.mp4"]))
    assert found(source, captions=captions) == {
        **dict.fromkeys([*names, "h.picture", "linked/r.mp4"], "x"), "broken.mp4": MISSING,
        "linked/back": DUPLICATE, "linked/home": DUPLICATE, "own": DUPLICATE,
    }  # fmt: skip


def test_what_cannot_be_read_in_a_folder_has_a_reason(clip, tmp_path):
    """Pictures of cameras, links without a suffix that lead nowhere, pipes, and tars, which are sources of their own."""
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "photo.txt").write_text("a photo")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe")
    tar(tmp_path / "inside.tar", {"a.mp4": clip, "a.txt": b"x"})
    archives = ["b.tar.gz", "c.tgz", "d.ZIP", "e.7z"]
    for name in archives:
        (tmp_path / name).write_bytes(b"x")
    assert found(tmp_path) == {
        "photo.heic": "a photo", "nowhere": MISSING, "itself": UNREADABLE, "pipe": NOT_A_FILE, "inside.tar": NOT_A_FILE,
        **dict.fromkeys(archives, NOT_A_FILE),
    }  # fmt: skip
    photo = next(item for item in items([tmp_path]) if item.id.endswith(".heic"))
    assert begin(photo, ClipSettings(), 4).reason == UNREADABLE


def test_members_of_tars_and_sources_are_known_by_content(clip, tmp_path):
    made = tar(tmp_path / "a.tar", {
        "a.clip": clip, "a.txt": b"a", "b": clip, "b.txt": b"b", "c.cls": b"7", "._a.clip": b"x", ".cache/d.mp4": clip,
    })  # fmt: skip
    assert found(made) == {"a.clip": "a", "b": "b"}
    (tmp_path / "film").write_bytes(clip)
    assert [item.id for item in items([tmp_path / "film"])] == ["film"]
    with pytest.raises(UserError, match="not a known kind of source"):
        items([made.rename(tmp_path / "a.abc")])


def test_a_row_without_a_path_is_still_a_bad_row(tmp_path):
    (tmp_path / "t.tsv").write_text("path\tcaption\n\tnothing\n")
    assert list(found(tmp_path / "t.tsv").values()) == [BAD_ROW]
