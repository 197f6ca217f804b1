"""The targets of `bench` that measure whole processes: the processes and settings that they start, and the form of their output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lumos import threads
from lumos.benchmarks import processes
from lumos.benchmarks.processes import Spent, busy_processes, environment, timed_process
from lumos.cli import main
from lumos.commands import bench_ingest
from lumos.commands.bench_threads import choices
from lumos.errors import RunError

OWN = {threads.OWN_VARIABLE, *threads.COUNT_VARIABLES, *threads.PASSIVE}


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def test_children_inherit_no_settings_of_threads(monkeypatch):
    for name in OWN:
        monkeypatch.setenv(name, "7")
    found = environment(OMP_NUM_THREADS="3")
    assert {name: found[name] for name in OWN if name in found} == {"OMP_NUM_THREADS": "3"}


def test_children_may_write_bytecode(monkeypatch):
    """Otherwise `bench start` would measure the compilation of modules, which an installed Lumos has done once."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in environment()


def test_each_choice_is_left_as_it_is():
    """Lumos sets only variables that a choice leaves unset: none for the choice "spinning", all for the last choice."""
    prepared = {}
    for name, variables in choices(4).items():
        prepared[name] = dict(variables)
        threads.prepare_process(None, prepared[name], lambda: threads.Machine(4, 4, 1, 4))
    assert prepared == {
        "1": {"OMP_NUM_THREADS": "1", **threads.PASSIVE},
        "4, spinning": {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "300000"},
        "4, passive": {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"},
        "chosen by Lumos": {"OMP_NUM_THREADS": "3", **threads.PASSIVE},
    }


@pytest.mark.slow
def test_time_of_a_process_and_of_its_children():
    work = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.2: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {work!r}])"
    assert timed_process(["-S", "-c", child], os.environ, "work").cpu_seconds >= 0.2
    assert timed_process(["-S", "-c", "import time; time.sleep(0.3)"], os.environ, "sleep").seconds >= 0.3
    with pytest.raises(RunError, match="measuring nothing failed: ValueError: why"):
        timed_process(["-S", "-c", "raise ValueError('why')"], os.environ, "nothing")


@pytest.mark.slow
def test_busy_processes_end_with_the_block():
    before = set(psutil.Process().children())
    with busy_processes(2):
        began = set(psutil.Process().children()) - before
        assert len(began) == 2
    assert not any(process.is_running() for process in began)


@pytest.mark.slow
def test_busy_processes_end_with_a_killed_bench(repo):
    program = (
        "import os, signal, psutil\n"
        "from lumos.benchmarks.processes import busy_processes\n"
        "with busy_processes(2):\n"
        "    print(*(process.pid for process in psutil.Process().children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repo, stdout=subprocess.PIPE, text=True)
    left = [psutil.Process(int(pid)) for pid in done.stdout.split() if psutil.pid_exists(int(pid))]
    assert (done.returncode, len(done.stdout.split())) == (-9, 2)
    gone, _ = psutil.wait_procs(left, timeout=60)
    assert len(gone) == len(left)


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Run each different command of Lumos once, in this process, and return [(command, environment)] of all calls."""
    started, left = [], tmp_path / "left"

    def run(command, env, what):
        repeated = command in [other for other, _ in started]
        started.append((command, {name: env[name] for name in sorted(OWN) if name in env}))
        if command[:2] == ["-m", "lumos"] and "--help" not in command and not repeated:
            assert main(command[2:]) == 0
        if command[2:3] == ["train"]:
            folder = Path(json.loads(Path(command[-1]).read_text())["training"]["output_dir"])
            shutil.copytree(*((left, folder) if repeated else (folder, left)))
        return Spent(float(len(started)), 2.0 if "torch" in command[-1] else 5.0)

    monkeypatch.setattr(processes, "timed_process", run)
    return started


@pytest.mark.slow
def test_threads_measures_each_choice_in_processes_of_its_own(in_this_process, micro_folder, tmp_path, capsys):
    words = ["--model", str(micro_folder), "--steps", "2", "--batch-size", "1", "--busy", "1", "--repetitions", "1"]
    output = tmp_path / "threads.json"
    assert main(["bench", "threads", *words, "--threads", "2", "--output", str(output)]) == 0
    result = last_line(capsys.readouterr().out)
    assert result == json.loads(output.read_text())
    names = ["1", "2, spinning", "2, passive", "chosen by Lumos"]
    assert {state: list(of) for state, of in result["seconds"].items()} == {"alone": names, "busy": names}
    assert all(of["clip_seconds"] >= 0 and of["step_seconds"] > 0 for ways in result["seconds"].values() for of in ways.values())
    assert [command[2] for command, _ in in_this_process] == ["generate", "train"] * 8
    assert [env for _, env in in_this_process[:8:2]] == [dict(sorted(way.items())) for way in choices(2).values()]


def test_start_compares_with_a_bare_import(in_this_process, micro_folder, capsys):
    assert main(["bench", "start", "--model", str(micro_folder), "--repetitions", "1"]) == 0
    result = last_line(capsys.readouterr().out)
    assert list(result["processes"]) == ["import torch", "import lumos", "generate --help", "first command"]
    assert result["first_command_over_import_torch"] == 2.5


def test_ingest_counts_clips_and_reads_films(micro_folder, monkeypatch, capsys):
    monkeypatch.setattr(bench_ingest, "FILMS", {"6 s": (6, 72)})
    for name, value in (("HEIGHT", 20), ("WIDTH", 40), ("SIZE", "16x24")):
        monkeypatch.setattr(bench_ingest, name, value)
    words = ["--clips", "2", "--workers", "0", "--repetitions", "1"]
    assert main(["bench", "ingest", "--tokenizer", str(micro_folder), *words]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["clips_per_second"]["0"] > 0
    assert result["film_seconds"]["6 s"] > 0


def test_wrong_numbers_are_refused(capsys):
    for words, message in (
        (["threads", "--steps", "1"], "--steps 1 is not allowed; give at least 2"),
        (["threads", "--model", "nowhere"], "nowhere is no model folder"),
        (["start", "--repetitions", "0"], "--repetitions 0 is not allowed"),
        (["ingest", "--clips", "0"], "--clips 0 is not allowed"),
    ):
        assert main(["bench", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_start_with_lumos_importable(tmp_path):
    code = "import lumos.threads, os; print(os.environ.get('OMP_NUM_THREADS'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
