"""Odd items: ids are unique, readers stop at odd data, and all good items are found."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")

from lumos.data.ingest import state as ingest_state
from lumos.data.ingest.encode import Skip, ingest_item
from lumos.data.ingest.fingerprint import CHANGED, SAME, compare, fingerprint
from lumos.data.ingest.item import MAX_CAPTION_LENGTH, Item, as_text, problem_of, row_name
from lumos.data.ingest.manifest import items
from lumos.data.ingest.state import State
from lumos.errors import RunError, UserError

ODD_TEXT = st.text(st.sampled_from("a\\xu()@-.0123 4d8fceagirow/\0\n\x1b\udc80\udcff\ud800\u202eé\U0001f600\x85\u2028"),
    max_size=24)


@given(ODD_TEXT, ODD_TEXT)
@settings(max_examples=200)
def test_no_two_names_share_an_id(one, other):
    for escape in (as_text, row_name):
        escape(one).encode("utf-8")
        assert (escape(one) == escape(other)) == (one == other)


@pytest.mark.parametrize(
    ("name", "id_"),
    [("\udcff", r"\udcff"), (r"\udcff", r"\\udcff"), ("\\\udcff", r"\\\udcff"), (r"\\udcff", r"\\\\udcff"), (r"a\b", r"a\b")],
)
def test_an_id_is_the_printable_form_of_a_name(name, id_):
    assert as_text(name) == row_name(name) == id_


ENDINGS = ["row 5", "a@0.0-1.0", "a@1.0-", "a (again 1)"]


@pytest.mark.parametrize("name", ENDINGS)
def test_no_path_of_a_row_looks_like_an_ending_of_ids(name):
    assert row_name(name) != name == as_text(name)
    assert row_name(f"{name}.png") == f"{name}.png"


def test_many_backslashes_are_escaped_quickly():
    as_text("\\" * 500_000)


ROWS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXT, lambda inner: st.lists(inner, max_size=2)
                    | st.dictionaries(ODD_TEXT, inner, max_size=2), max_leaves=4)  # fmt: skip


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60)
def test_good_rows_are_all_there_among_odd_ones(tmp_path_factory, data):
    """Each odd item has a name too, the same in a second run, and all items have fingerprints."""
    folder = tmp_path_factory.mktemp("m")
    odd = data.draw(st.lists(st.dictionaries(st.sampled_from(["path", "caption", "start", "end", "text"]), ROWS) | ROWS,
        max_size=6))
    raw = data.draw(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=4))
    good = [{"path": f"good{n}.png", "caption": f"caption {n}"} for n in range(3)]
    lines = [json.dumps(row).encode() for row in [*odd, *good]] + raw
    (folder / "m.jsonl").write_bytes(b"\n".join(data.draw(st.permutations(lines))))
    found = list(items([folder / "m.jsonl"]))
    assert sorted(item.caption for item in found if item.id.startswith("m.jsonl/good")) == ["caption 0", "caption 1", "caption 2"]
    assert len({item.id for item in found}) == len(found)
    assert [item.id for item in items([folder / "m.jsonl"])] == [item.id for item in found]
    for item in found:
        assert compare(item, fingerprint(item)) == SAME
        assert isinstance(ingest_item(item, None, None), Skip)  # no file is there


@given(st.lists(st.text(st.sampled_from('a,"\n\r\0é\udcff; '), max_size=12), max_size=8))
@settings(max_examples=80)
def test_good_rows_of_csv_follow_a_quote_that_is_never_closed(tmp_path_factory, odd):
    folder = tmp_path_factory.mktemp("m")
    text = "path,caption\n" + "\n".join(odd).replace('"',
        "") + '\nx.png,"open' + "".join(f'\ng{n}.png,"a, b"' for n in range(3)) + "\n"
    (folder / "m.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = list(items([folder / "m.csv"]))
    assert [(item.id, item.caption, item.problem) for item in found[-3:]] == [(f"m.csv/g{n}.png", "a, b", None) for n in range(3)]


def test_captions_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    """The user of the tests may read all files, so the error of the system is simulated."""
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b").mkdir()
    opened, listed = os.open, os.scandir

    def refuse(usual, name):
        def call(path, *rest, **options):
            if str(path).endswith(name):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return usual(path, *rest, **options)

        return call

    monkeypatch.setattr(os, "open", refuse(opened, "a.txt"))
    monkeypatch.setattr(os, "scandir", refuse(listed, "b"))
    found = {item.id.partition("/")[2]: item.problem for item in items([tmp_path])}
    assert found["a.png"] == ("bad caption", f"cannot read {tmp_path / 'a.txt'}: Permission denied")
    assert found["b"] == ("unreadable", f"cannot list the folder {tmp_path / 'b'}: Permission denied")
    (tmp_path / "captions.csv").write_text("path,caption\na.png,given\n,lost\n")
    given = list(items([tmp_path], tmp_path / "captions.csv"))
    assert [(item.id, item.problem and item.problem[0]) for item in given[:1]] == [("--captions/row 2", "bad row")]
    assert next(item for item in given if item.id.endswith("a.png")).problem is None


def test_a_caption_has_a_length_limit(tmp_path):
    for name, length in (("most", MAX_CAPTION_LENGTH), ("more", MAX_CAPTION_LENGTH + 1)):
        (tmp_path / f"{name}.png").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text("é" * length)
    more, most = items([tmp_path])
    assert most.problem is None
    assert more.problem == ("long caption", "the caption has 10,001 characters; at most 10,000 are allowed")


def test_sources_that_are_pipes_or_loops_are_refused(tmp_path):
    os.mkfifo(tmp_path / "m.csv")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (("m.csv", "is a named pipe; only regular files"), ("loop", "there is no source"), ("x" * 300,
        "File name too long")):
        with pytest.raises(UserError, match=words):
            items([tmp_path / name])
    with pytest.raises(UserError, match="--captions"):
        items([tmp_path], tmp_path / "m.csv")


def test_which_errors_are_an_item_s_and_which_are_bugs():
    wrapped = UserError("cannot read")
    wrapped.__cause__ = MemoryError()
    for error, reason in ((wrapped, "out of memory"), (OSError(errno.ENOMEM, "no memory"), "out of memory"), (OverflowError(),
        "unreadable"),
                          (RuntimeError("CUDA out of memory"), "out of memory"), (UserError("out of memory.mp4 is bad"),
                          "unreadable"),
                          (RecursionError(), "unreadable"), (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
                          "unreadable")):  # fmt: skip
        assert problem_of(error)[0] == reason
    assert problem_of(RuntimeError("a bug")) is None
    assert problem_of(TypeError("a bug")) is None


SHARD_LINE = {"shard": "shard-000000.parquet", "digest": "x", "items": {"a": "mark"}}
SKIP_LINE = {"id": "a", "reason": "unreadable", "detail": "x", "mark": "mark"}
JOURNALS = {"shards.jsonl": SHARD_LINE, "skipped.jsonl": SKIP_LINE}


@pytest.fixture(params=JOURNALS)
def journal(tmp_path, request) -> Path:
    return tmp_path / request.param


def read_state(journal: Path) -> State:
    return State(journal.parent, shard_clips=1, retry_skipped=False)


@pytest.mark.parametrize("line", [
    b"[" * 100_000, b"3", b"{}", b"\xff", *(json.dumps(entry).encode() for entry in (
        {**SKIP_LINE, "id": 3}, {**SKIP_LINE, "mark": 3},
        {**SHARD_LINE, "shard": "../x.parquet"}, {**SHARD_LINE, "items": {"a": 3}},
    )),
])  # fmt: skip
def test_a_damaged_journal_is_one_line(journal, line):
    journal.write_bytes(line + b"\n")
    with pytest.raises(RunError, match=rf"{journal.name}, line 1 .*use another --out"):
        read_state(journal)


def test_a_line_of_the_other_journal_is_damage(journal):
    (other,) = (entry for name, entry in JOURNALS.items() if name != journal.name)
    journal.write_text(json.dumps(JOURNALS[journal.name]) + "\n" + json.dumps(other) + "\n")
    with pytest.raises(RunError, match=rf"{journal.name}, line 2 is not a line that ingest writes"):
        read_state(journal)


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_a_journal_is_bounded_and_a_journal_is_not(journal, monkeypatch, end):
    line = json.dumps(JOURNALS[journal.name]).encode() + b"\n"
    monkeypatch.setattr(ingest_state, "MAX_LINE", len(line))
    journal.write_bytes(100 * line)
    read_state(journal)
    journal.write_bytes(100 * line + b"x" * len(line) + b"x" + end)
    with pytest.raises(RunError, match=rf"{journal.name}, line 101 has more than the {len(line)} bytes"):
        read_state(journal)
    assert journal.stat().st_size == 101 * len(line) + 1 + len(end)
    with pytest.raises(RunError, match="give a smaller --shard-clips"):
        ingest_state._append(journal, {"id": "x" * len(line)})


def test_an_incomplete_last_line_of_a_journal_is_removed(journal):
    whole = json.dumps(JOURNALS[journal.name]).encode() + b"\n"
    journal.write_bytes(whole + whole[:-1])
    read_state(journal)
    assert journal.read_bytes() == whole


def test_a_journal_that_is_no_regular_file_is_refused(journal):
    os.mkfifo(journal)
    with pytest.raises(RunError, match=rf"cannot read .*{journal.name} as a journal"):
        read_state(journal)


def test_journals_are_plain_text_whatever_an_item_says(tmp_path):
    state = State(tmp_path, shard_clips=1, retry_skipped=False)
    item = Item(as_text("m/\udcff\n.png"), "/nowhere/\ud800\udcff\0.png", "half \ud83d")
    state.skip(item, Skip("unreadable", "\ud800\x1b[31m\n" + "x" * 5000))
    text = (tmp_path / "skipped.jsonl").read_bytes().decode("ascii")
    entry = json.loads(text)
    assert json.dumps(entry, ensure_ascii=False).encode("utf-8")
    assert entry["detail"].startswith(r"\ud800\x1b[31m\n")
    assert len(entry["detail"]) < 1100
    again = State(tmp_path, shard_clips=1, retry_skipped=False)
    assert again.knows(item)
    again.check([item])
    assert again.warnings == []
    assert compare(item, "no mark at all") == CHANGED
    assert Path(tmp_path / "skipped.jsonl").stat().st_size == len(text)
