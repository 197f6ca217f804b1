"""Lists of clips on a real local Ray give the files of a single process, also after a task was killed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lumos.cli import main
from lumos.commands import generate, generate_ray

ROOT = Path(__file__).parents[2]
ROWS = 'prompt,seed,num_frames\na red circle,1,5\na blue square,2,5\nкрасный круг,3,5\nx,4,1\nbad,5,6\n'


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs that the tests here share."""
    ray = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = str(ROOT)  # what its workers import
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield context.address_info["address"]
    ray.shutdown()


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


@pytest.mark.parametrize("quiet", [False, True])
def test_a_share_returns_its_messages_with_their_levels(micro_folder, tmp_path, monkeypatch, capsys, quiet):
    """A task of Ray returns notes and errors separately, so that --quiet hides only the notes."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    words = ["--model", str(micro_folder), "--prompts", "list.csv", "--device", "cpu", "--output-dir", "out"]
    values = {**vars(parser.parse_args(words)), "threads": 1, "own_process": False, "quiet": quiet}
    for prompt in ("x", "y"):  # the second time, the file is there with another prompt, which gives a note
        Path("list.csv").write_text(f"prompt,seed,num_frames,output\n{prompt},1,1,a.png\nbad,5,6,\n")
        answer = generate_ray.share_in_task(values, 1, 1, str(tmp_path))
    levels = [level for level, _ in answer["said"]]
    assert answer["share"]["bad_rows"] == 1, answer
    assert logging.ERROR in levels
    assert (logging.WARNING in levels) != quiet, answer
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "list.txt", "--engine", "ray", "--shard", "1/2"], "--engine ray makes the shares itself"),
        (["--prompts", "list.txt", "--workers", "2"], "--workers has no effect without --engine ray"),
        (["--prompts", "list.txt", "--engine", "ray", "--workers", "0"], "--workers 0 is not allowed; give at least 1"),
        (["--prompts", "list.txt", "--engine", "ray", "--device", "mps"], "which assigns the GPUs"),
        (["--prompt", "x", "--num-videos-per-prompt", "2", "--engine", "ray"], "several processes need one --seed"),
        (["--prompt", "x", "--engine", "ray"], "--engine has no effect on a single clip"),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys, words, message):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("x\n")
    assert main(["generate", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    Path("list.txt").write_text("x\n")
    assert main(["generate", "--prompts", "list.txt", "--engine", "ray"]) == 2
    assert "pip install 'lumos-video[ray]'" in capsys.readouterr().err
