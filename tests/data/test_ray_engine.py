"""On a real local Ray, ingest, lists of clips and replicas write the files of one process, also after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_helpers import FLAGS, SETTINGS, Fragile, content
from served_clips import asked, made

from lumos import LumosPipeline
from lumos.cli import main
from lumos.commands.loading import LOADING
from lumos.commands.serve import load_replica
from lumos.data.ingest.encode import EncoderSpec, Skip
from lumos.data.ingest.ingest import ingest
from lumos.data.ingest.manifest import items
from lumos.data.ingest.ray_executor import RayExecutor, from_text, to_text
from lumos.data.shards import format as shards
from lumos.demo.replicas import Replicas, ReplicaSettings, replicas
from lumos.errors import RunError, UserError
from lumos.pipeline.request import Request

ROOT = Path(__file__).parents[2]
ROWS = 'prompt,seed,num_frames\na red circle,1,5\na blue square,2,5\nкрасный круг,3,5\nx,4,1\nbad,5,6\n'


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs. All tests share it: its processes take longer to start than the tests."""
    ray = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])  # what its workers import
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield context.address_info["address"]
    ray.shutdown()


def test_killed_and_continued_on_ray_equals_the_local_engine(cluster, ingested, clips, tokenizer, tmp_path, monkeypatch, forks):
    script = (
        "import os, signal, sys; from lumos.data.ingest.encode import ClipSettings; from lumos.data.ingest.ingest import ingest\n"
        "def on_item(done, skipped):\n"
        "    if done + skipped == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "settings = ClipSettings(fps=12, size='16x24', num_frames=5)\n"
        "ingest([sys.argv[1]], sys.argv[2], sys.argv[3], settings, engine='ray', workers=1, shard_clips=3, on_item=on_item)\n"
    )
    out = tmp_path / "shards"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster}
    killed = forks.run(["-c", script, clips, out, tokenizer], env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert set(content(out)) == {"shard-000000.parquet", "shards.jsonl", "skipped.jsonl"}
    monkeypatch.chdir(tokenizer.parent)  # a relative path is meant from here on every node
    report = ingest([clips], out, tokenizer.name, SETTINGS, engine="ray", workers=2, shard_clips=3, max_failure_rate=0.5)
    assert content(out) == content(ingested)
    assert report["reasons"] == {"unreadable": 1, "too short": 1, "no caption": 1}
    assert (report["new_items"], report["engine"]) == (7, "ray")  # of the first six, those of the whole shard and the skipped one


@pytest.mark.slow
def test_too_many_failures_stop_early_on_ray(cluster, tokenizer, tmp_path, capsys):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,caption\n" + "".join(f"none-{n}.mp4,text\n" for n in range(90)))
    command = ["ingest", str(manifest), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer), *FLAGS, "--engine", "ray"]
    assert main([*command, "--workers", "1"]) == 1
    assert "50 of 50 items gave no clip (missing file 50)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["items"] == 50
    with pytest.raises(UserError, match="'cuda' is not available: the Ray cluster has no GPU"):
        next(RayExecutor(EncoderSpec(str(tokenizer), SETTINGS, "cuda"), 1, None).results(items([manifest])))


@pytest.mark.slow
def test_items_that_kill_or_hang_on_ray_are_skipped(cluster, clips, tokenizer, tmp_path, monkeypatch, capsys):
    source = tmp_path / "clips"
    source.mkdir()
    for n, caption in enumerate(("good", "kill", f"once {tmp_path / 'flag'}", "hang", "good")):
        shutil.copy(clips / "0.mp4", source / f"{n}.mp4")
        (source / f"{n}.txt").write_text(caption)
    monkeypatch.setattr("lumos.data.ingest.ray_executor.ItemEncoder", Fragile)
    command = ["ingest", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer), *FLAGS, "--engine", "ray"]
    assert main([*command, "--workers", "1", "--item-timeout", "3", "--max-failure-rate", "0.5"]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(entry["id"], entry["reason"]) for entry in report["skipped"]] == [
        ("clips/1.mp4", "worker died"), ("clips/3.mp4", "timeout"),
    ]  # fmt: skip
    assert [row["id"] for row in shards.read_shards(tmp_path / "out")] == [f"clips/{n}.mp4" for n in (0, 2, 4)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".mp4", ".png")}


def kill_once(killed: list[int]) -> None:
    """Kill the first task that has begun to write clips, as if its node was lost."""
    deadline = time.monotonic() + 300
    while not killed and time.monotonic() < deadline:
        for process in psutil.process_iter(["name", "cmdline"]):
            if "ray::share_in_task" in " ".join([process.info["name"] or "", *(process.info["cmdline"] or [])]):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_list_on_ray_has_the_files_of_one_process(cluster, micro_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text(ROWS)
    command = ["generate", "--model", str(micro_folder), "--prompts", "list.csv", "--device", "cpu", "--batch-size", "2"]
    assert main([*command, "--output-dir", "alone"]) == 1  # for the bad row
    alone = capsys.readouterr()
    killed: list[int] = []
    thread = threading.Thread(target=kill_once, args=(killed,))
    thread.start()
    assert main([*command, "--output-dir", "ray", "--engine", "ray", "--workers", "2"]) == 1
    thread.join()
    assert killed
    found = capsys.readouterr()
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "alone")
    assert len(files_of(tmp_path / "ray")) == 4
    for said in (alone, found):
        last = said.out.splitlines()[-1]  # Ray tells of the killed task before it
        assert last.split()[1:] == ["4", "made", "now", "4", "clips", "in", "all", "5", "rows"]
        assert said.err.count("list.csv line 6: num_frames 6 is not allowed") == 1
        assert "1 of 5 rows are bad, as said above" in said.err
    record = json.loads(next((tmp_path / "ray").glob("*красный*.json")).read_text())
    assert record["prompt"] == "красный круг"
    assert not list((tmp_path / "ray").glob(".*"))
    assert main([*command, "--output-dir", "ray", "--engine", "ray"]) == 1  # nothing is missing: nothing is made
    assert " 0 made now  4 clips in all" in capsys.readouterr().out


@pytest.fixture
def ray_serve(cluster):
    """Ray Serve on the cluster, if it can be imported."""
    serve = pytest.importorskip("ray.serve", exc_type=ImportError)
    yield
    serve.shutdown()


def replica_processes() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(process.cmdline())]


class KillsOne(Replicas):
    """Kill a replica once some clips are done."""

    done, killed = 0, 0

    def make(self, request, check_stop):
        answer = super().make(request, check_stop)
        self.done += 1
        if self.done > 5 and not self.killed:
            self.killed = 1
            victim = replica_processes()[0]
            victim.send_signal(signal.SIGKILL)
        return answer


@pytest.mark.slow
def test_fifty_users_lose_nothing_when_a_replica_is_killed(ray_serve, micro_folder, tmp_path):
    options = dict.fromkeys((*LOADING, "dtype", "max_memory")) | {"model": str(micro_folder), "device": "cpu"}
    pipe = LumosPipeline.from_pretrained(micro_folder)
    requests = [Request.of(**asked(seed)) for seed in range(50)]
    settings = ReplicaSettings(2, batch_size=4)
    with replicas(lambda: load_replica(options), settings) as ready:
        assert len(replica_processes()) == 2
        ready.__class__ = KillsOne
        there = made(pipe, tmp_path / "there", requests, ready)
        assert ready.killed
    here = made(pipe, tmp_path / "here", requests)
    assert sorted(there) == list(range(50))
    assert {seed: file for seed, (file, _) in there.items()} == {seed: file for seed, (file, _) in here.items()}
    assert {(record["device"], record["threads"]) for _, record in there.values()} == {("cpu", 1)}


def test_what_cannot_work_is_said_before_anything_is_written(clips, tokenizer, tmp_path, monkeypatch, capsys):
    command = ["ingest", str(clips), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer), *FLAGS, "--engine"]
    assert main([*command, "ray", "--device", "cuda:1"]) == 2
    assert "device 'cuda:1' is not allowed with --engine ray" in capsys.readouterr().err
    assert main([*command, "ray", "--workers", "0"]) == 2
    assert "workers 0 is not allowed with --engine ray" in capsys.readouterr().err
    assert main([*command, "spark"]) == 2
    assert "engine 'spark' is unknown; allowed: local, ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "ray"]) == 2
    assert "pip install 'lumos-video[ray]', or use --engine local" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("numbers", "given", "words"),
    [
        (range(10), 10, r"Ray gave no result for 'clips/picture\.png'"),
        ([0, 2, 1], 1, r"Ray gave the result of 'clips/2\.mp4' for 'clips/1\.mp4'"),
        ([0, 0], 1, r"Ray gave the result of 'clips/0\.mp4' for 'clips/1\.mp4'"),
        ([*range(11), 10], 11, "Ray gave more than 11 results"),
    ],
)
def test_results_of_other_items_are_an_error(clips, tokenizer, monkeypatch, numbers, given, words):
    ray = types.SimpleNamespace(is_initialized=lambda: True, exceptions=types.SimpleNamespace(RayError=KeyError))
    monkeypatch.setattr("lumos.data.ingest.ray_executor._ray", lambda: ray)
    engine = RayExecutor(EncoderSpec(str(tokenizer), SETTINGS, "cpu"), 1, None)
    monkeypatch.setattr(engine, "_map", lambda ray, some: ((number, Skip("too short", "")) for number in numbers))
    found = engine.results(items([clips]))
    assert len([next(found) for _ in range(given)]) == given
    with pytest.raises(RunError, match=words):
        next(found)


grids = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
rows = st.tuples(grids, st.integers(0, 1 << 32), st.text(), st.floats(0, 1e6))


@pytest.mark.slow
@given(st.lists(rows, min_size=1, max_size=3))
def test_results_cross_as_text(made):
    result = [
        {"codes": np.random.default_rng(seed).integers(0, 1 << 16, grid).astype(np.uint16), "caption": text, "start": start}
        for grid, seed, text, start in made
    ]
    for row, back in zip(result, from_text(to_text(result)), strict=True):
        assert back["codes"].dtype == np.uint16
        assert np.array_equal(row.pop("codes"), back.pop("codes"))
        assert row == back
    again = from_text(to_text(Skip("too short", "1 frame")))
    assert (again.reason, again.detail) == ("too short", "1 frame")
