"""Items that end their worker or hang are skipped, with any number of processes; all others are there, in order."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
from ingest_helpers import FLAGS, SETTINGS, Ahead, Crowded, Fragile, Greedy, Late, Unstartable, content

pytest.importorskip("pyarrow")

from lumos.cli import main
from lumos.data.ingest.ingest import ingest
from lumos.data.ingest.manifest import Item
from lumos.data.ingest.workers import AHEAD, WorkerPool
from lumos.data.shards import format as shards
from lumos.errors import RunError


@pytest.fixture
def source(clips, tmp_path) -> Path:
    """Good, killing, good, killing once, hanging, good."""
    folder = tmp_path / "clips"
    folder.mkdir()
    captions = ["good", "kill", "good", f"once {tmp_path / 'flag'}", "hang", "good"]
    for n, caption in enumerate(captions):
        shutil.copy(clips / "0.mp4", folder / f"{n}.mp4")
        (folder / f"{n}.txt").write_text(caption)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_items_that_kill_or_hang_are_skipped(source, tokenizer, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr("lumos.data.ingest.executors.ItemEncoder", Fragile)
    command = ["ingest", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer), *FLAGS]
    options = ["--workers", str(workers), "--item-timeout", "3", "--max-failure-rate"]
    assert main([*command, *options, "0.5"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reasons"] == {"worker died": 1, "timeout": 1}
    assert [(entry["id"], entry["reason"]) for entry in report["skipped"]] == [
        ("clips/1.mp4", "worker died"), ("clips/4.mp4", "timeout"),
    ]  # fmt: skip
    assert "ended its worker twice (exit code -11)" in report["skipped"][0]["detail"]
    assert [row["id"] for row in shards.read_shards(tmp_path / "out")] == [f"clips/{n}.mp4" for n in (0, 2, 3, 5)]
    capsys.readouterr()
    assert main([*command, *options, "0.2"]) == 1  # typed again it does not meet them again
    assert "2 of 6 items gave no clip (worker died 1, timeout 1)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is of Linux")
def test_an_item_beyond_a_worker_s_memory_is_skipped(source, tokenizer, tmp_path, monkeypatch):
    for n, caption in enumerate(["good", "greedy", "good"]):
        (source / f"{n}.txt").write_text(caption)
    for n in (3, 4, 5):
        (source / f"{n}.mp4").unlink()
    monkeypatch.setattr("lumos.data.ingest.executors.ItemEncoder", Greedy)
    report = ingest([source], tmp_path / "out", tokenizer, SETTINGS, workers=1, max_failure_rate=0.5)
    assert (report["encoded"], report["reasons"]) == (2, {"out of memory": 1})
    assert "GiB in a worker; --workers 0 has no such limit" in report["skipped"][0]["detail"]


@pytest.mark.slow
def test_what_is_not_the_item_s_fault_ends_the_run(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("lumos.data.ingest.executors.ItemEncoder", Unstartable)
    with pytest.raises(RunError, match=r"a worker process ended while it was starting \(exit code 7"):
        ingest([source], tmp_path / "out", tokenizer, SETTINGS, workers=1)
    (source / "0.txt").write_text("bug")
    monkeypatch.setattr("lumos.data.ingest.executors.ItemEncoder", Fragile)
    with pytest.raises(OSError, match="a bug"):
        ingest([source], tmp_path / "out", tokenizer, SETTINGS, workers=1)


def test_a_killed_ingest_leaves_no_worker_that_hangs(source, tokenizer, tmp_path, forks):
    (source / "0.txt").write_text("hang")
    script = (
        "import sys, pathlib, ingest_helpers, lumos.data.ingest.executors as engines; from lumos.data.ingest.ingest import ingest\n"
        "engines.ItemEncoder = ingest_helpers.Fragile\n"
        "ingest([sys.argv[1]], sys.argv[2], sys.argv[3], ingest_helpers.SETTINGS, workers=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])}
    process, children = forks.start(["-c", script, source, tmp_path / "out", tokenizer], env=environment), []
    while len(children) < 3 and process.poll() is None:  # the server of processes, the tracker of resources, the worker
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert len(children) == 3
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_slow_item_does_not_end_the_run(tmp_path, workers):
    total = 2 * AHEAD * workers + 3
    slow, begun = (0, total // 2, total - 1), AHEAD * workers if workers > 1 else 1
    pool = WorkerPool(partial(Late, tmp_path, slow, begun, total), workers, 1, 600)
    with closing(pool):
        for _ in range(2):  # a pool is used again, as on Ray
            done = [item.id for item, _ in pool.results(Item(str(number), "") for number in range(total))]
            assert done == [str(number) for number in range(total)]


def test_a_worker_reads_one_item_while_it_encodes_another(tmp_path):
    with closing(WorkerPool(partial(Ahead, tmp_path, 9), 1, 1, 600)) as pool:
        assert [item.id for item, _ in pool.results(Item(str(number), "") for number in range(9))] == [str(n) for n in range(9)]


def test_what_lacks_memory_beside_another_item_is_tried_alone(tmp_path):
    todo = [Item(str(number), "", caption="large" if number == 2 else "") for number in range(5)]
    with closing(WorkerPool(partial(Crowded, tmp_path), 1, 1, 600)) as pool:
        found = {item.id: result for item, result in pool.results(iter(todo))}
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert [number for number, result in found.items() if result != []] == ["2"]
    assert found["2"].reason == "out of memory"


@pytest.mark.slow
@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_shards_do_not_depend_on_the_number_of_workers(clips, tokenizer, tmp_path, clips_per_video):
    """The results equal those that this process makes alone, item after item."""
    settings = replace(SETTINGS, clips_per_video=clips_per_video)
    for workers in (0, 1, 2):
        ingest([clips], tmp_path / str(workers), tokenizer, settings, workers=workers, shard_clips=3, max_failure_rate=0.5)
    alone = content(tmp_path / "0")
    assert sum(name.endswith(".parquet") for name in alone) >= 2
    assert content(tmp_path / "1") == content(tmp_path / "2") == alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0", "--item-timeout", "5"], "item_timeout needs processes"),
        (["--item-timeout", "0"], "item_timeout 0.0 is not allowed"),
        (["--workers", "-1"], "workers -1 is not allowed; give at least 0"),
    ],
)
def test_wrong_options_are_usage_errors(clips, tokenizer, tmp_path, capsys, options, words):
    assert main(["ingest", str(clips), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer), *FLAGS, *options]) == 2
    assert words in capsys.readouterr().err
