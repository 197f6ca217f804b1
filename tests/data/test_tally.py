"""The count of ingest finds items that an engine loses, doubles or swaps, and clips that are missing in the folder."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ingest_helpers import FLAGS, SETTINGS

pytest.importorskip("pyarrow")

from lumos.cli import main
from lumos.data.ingest.encode import Skip
from lumos.data.ingest.executors import LocalExecutor
from lumos.data.ingest.ingest import ingest
from lumos.data.ingest.manifest import Item
from lumos.data.ingest.state import State
from lumos.data.ingest.tally import Tally
from lumos.data.shards import format as shards
from lumos.data.shards.source import ShardIndex
from lumos.errors import RunError


@pytest.mark.slow
@given(st.lists(st.booleans(), max_size=12), st.data())
def test_a_tally_misses_no_item(known, data):
    """Count items, some of them known, for an engine that takes `taken` and answers the first `answered`."""
    left = [str(n) for n, is_known in enumerate(known) if not is_known]
    taken = data.draw(st.integers(0, len(left)))
    answered = data.draw(st.integers(0, taken))
    tally = Tally([Item(str(n), "") for n in range(len(known))], lambda item: known[int(item.id)])
    todo = tally.todo()
    for item in [next(todo) for _ in range(taken)][:answered]:
        tally.back(item)
    lost = tally.lost()
    assert tally.seen == len(known)
    if answered == len(left):
        assert lost is None
    else:
        assert lost.startswith(f"{len(left) - answered} of {len(known)} items in the sources were not done, {left[answered]!r}")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_answers_out_of_order_or_twice_are_an_error(order):
    assume(order != list(range(len(order))))
    given_items = [Item(str(n), "") for n in range(5)]
    tally = Tally(given_items, lambda item: False)
    list(tally.todo())
    with pytest.raises(RunError, match="the executor gave a result for"):
        list(map(tally.back, [given_items[number] for number in order]))


@pytest.mark.parametrize("lost", [1, 5, 11])
def test_an_executor_that_ends_early_keeps_clips(
    ingested, clips, tokenizer, tmp_path, monkeypatch, capsys, lost
):
    whole = LocalExecutor.results
    few = lambda self, todo: (pair for _, pair in zip(range(11 - lost), whole(self, todo), strict=False))  # noqa: E731
    monkeypatch.setattr(LocalExecutor, "results", few)
    out = tmp_path / "out"
    command = ["ingest", str(clips), "--out", str(out), "--tokenizer", str(tokenizer), *FLAGS, "--workers", "0"]
    assert main([*command, "--shard-clips", "3", "--max-failure-rate", "0.5"]) == 1
    assert f"error: {lost} of 11 items in the sources were not done, " in capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert (report["seen_items"], report["items"]) == (11, 11 - lost)
    assert report["stopped"].startswith(f"{lost} of 11 items")
    monkeypatch.setattr(LocalExecutor, "results", whole)
    ingest([clips], out, tokenizer, SETTINGS, shard_clips=3, max_failure_rate=0.5)
    assert [row["id"] for row in shards.read_shards(out)] == [row["id"] for row in shards.read_shards(ingested)]


def test_items_missed_by_an_early_end_are_done_by_the_next_run(ingested, clips, tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(ingested, out)
    (out / "shard-000000.parquet").unlink()
    whole = LocalExecutor.results
    few = lambda self, todo: (pair for _, pair in zip(range(2), whole(self, todo), strict=False))  # noqa: E731
    monkeypatch.setattr(LocalExecutor, "results", few)
    with pytest.raises(RunError, match="1 of 11 items in the sources were not done"):
        ingest([clips], out, tokenizer, SETTINGS, max_failure_rate=0.5)
    monkeypatch.setattr(LocalExecutor, "results", whole)
    ingest([clips], out, tokenizer, SETTINGS, max_failure_rate=0.5)
    assert (out / "shard-000000.parquet").read_bytes() == (ingested / "shard-000000.parquet").read_bytes()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("_write_new", r"the shards of .* should hold 8 items and hold 0, 'clips/0\.mp4' differs"),
        ("_skip", r"skipped\.jsonl of .* should hold 3 items and hold 0, 'clips/3\.mp4' differs"),
    ],
)
def test_an_item_missing_from_shards_and_journals_is_an_error(clips, tokenizer, tmp_path, monkeypatch, method, words):
    def skip(self, item, why: Skip):  # forgets to write
        self.skipped[item.id] = {"reason": why.reason, "detail": why.detail}

    if method == "_skip":
        monkeypatch.setattr(State, "skip", skip)
    else:
        monkeypatch.setattr(State, method, lambda self: None)
    with pytest.raises(RunError, match=words):
        ingest([clips], tmp_path / "out", tokenizer, SETTINGS, max_failure_rate=0.5)


def test_an_encoder_that_returns_no_clip_is_an_error(clips, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("lumos.data.ingest.executors.ItemEncoder", lambda work: lambda item: [])
    with pytest.raises(RunError, match="should hold 11 items and hold 0"):
        ingest([clips], tmp_path / "out", tokenizer, SETTINGS)


def test_readers_miss_a_shard_that_is_not_there(ingested, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(ingested, out)
    (out / "shard-000001.parquet").unlink()
    with pytest.raises(RunError, match=r"hold 5 of the 8 clips that its report\.json counts; run the same ingest again"):
        ShardIndex(out)
    assert main(["inspect", str(out), "--no-sheet"]) == 1
    assert "hold 5 of the 8 clips" in capsys.readouterr().err
    (out / "report.json").write_text("[]")
    with pytest.raises(RunError, match="is damaged"):
        ShardIndex(out)
    (out / "report.json").unlink()  # somebody took a part of the shards on purpose
    assert len(ShardIndex(out).places) == 5


def test_a_footer_that_tells_of_other_clips_is_damage(tmp_path, ingested, monkeypatch):
    rows = list(shards.read_shards(ingested))
    dumps = json.dumps
    fewer = lambda facts: dumps(facts | {"height": facts["height"][1:]} if isinstance(facts, dict) else facts)  # noqa: E731
    monkeypatch.setattr(shards.json, "dumps", fewer)
    shards.write_shard(tmp_path / "shard-000000.parquet", rows)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"its footer has the height of 7 clips, it holds 8"):
        shards.read_facts(tmp_path / "shard-000000.parquet")
