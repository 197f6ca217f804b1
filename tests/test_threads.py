"""Threads of a process: their number, their waiting policy, and the note when they wait too long."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumos import cli, threads
from lumos.cli import main, messages, program
from lumos.data.prefetch import prefetched
from lumos.errors import UserError
from lumos.threads import Machine, given_count, load, prepare_process, processes_here, quota, thread_times, waiting_note, watched


def files(root: Path, **contents: str) -> Path:
    """Write files under `root`; `__` in a name stands for a folder."""
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(allowed: int = 8, limit: float = math.inf, busy: float = 0, cores: int = 8) -> Machine:
    return Machine(allowed, limit, busy, cores)


@pytest.mark.parametrize(("contents", "cores"), [
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4),
    ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "600000 100000", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
    ({"proc/self/cgroup": "0::/host/path", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),  # a container sees its own group as root
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, math.inf),
    ({"proc/self/cgroup": "4:cpu,cpuacct:/d\n3:memory:/d", "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "250000",
      "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000"}, 2.5),
    ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
     math.inf),
    ({"proc/self/cgroup": "1:cpu:/d\n0::/d", "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "50000",
      "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000", "sys/fs/cgroup/unified/d/cpu.max": "max 100000"}, 0.5),
    ({"proc/self/cgroup": "2:cpuset:/x", "sys/fs/cgroup/cpuset/x/cpu.max": "100000 100000"}, math.inf),
    ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "what 1"}, math.inf),
    ({}, math.inf),
])  # fmt: skip
def test_quota_of_control_groups(tmp_path, contents, cores):
    assert quota(files(tmp_path, **contents)) == cores


def test_the_load_is_the_median_of_running_threads(tmp_path):
    seen = iter(["5/99", "3/99", "1/99", "4/99", "40/99"])

    def look(seconds: float = 0) -> None:
        files(tmp_path, **{"proc/loadavg": f"9.00 8.00 7.00 {next(seen)} 1234"})

    look()
    assert load(tmp_path, look) == 3  # 4, 2, 0, 3 and 39 others
    files(tmp_path, **{"proc/loadavg": "nonsense"})
    assert load(tmp_path, lambda seconds: None) == 0


def test_without_such_files_the_load_average_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 1, 1))
    assert load(tmp_path) == 2.5


@pytest.mark.parametrize(("state", "count"), [
    (machine(), 8), (machine(limit=2.5), 2), (machine(limit=0.5), 1), (machine(busy=3), 5), (machine(busy=20), 1),
    (machine(allowed=2, busy=4), 1), (machine(allowed=4, busy=4, cores=64), 4), (machine(allowed=4, busy=32, cores=64), 2),
    (machine(allowed=2, cores=2, busy=1), 1), (machine(allowed=2, cores=2, busy=0.3), 2), (machine(limit=2, busy=7), 1),
])  # fmt: skip
def test_free_threads(state, count):
    assert state.free_threads() == count


CORES = st.integers(1, 256)


@given(allowed=CORES, limit=st.floats(0.01, 300) | st.just(math.inf), busy=st.floats(0, 500), cores=CORES)
def test_there_is_always_a_thread_and_never_more_than_allowed(allowed, limit, busy, cores):
    count = Machine(allowed, limit, busy, cores).free_threads()
    assert 1 <= count <= max(1, min(allowed, limit))
    assert count >= Machine(allowed, limit, busy + 1, cores).free_threads()


def test_affinity_counts():
    found = Machine.now()
    assert found.allowed == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    assert found.free_threads() >= 1


@pytest.mark.parametrize(("asked", "before", "after"), [
    (None, {}, {"OMP_NUM_THREADS": "6", **threads.PASSIVE}),
    (3, {}, {"OMP_NUM_THREADS": "3", **threads.PASSIVE}),
    (3, {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "5"}, {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", **threads.PASSIVE}),
    (None, {"LUMOS_THREADS": "2", "OMP_NUM_THREADS": "5"}, {"LUMOS_THREADS": "2", "OMP_NUM_THREADS": "2", **threads.PASSIVE}),
    (3, {"LUMOS_THREADS": "2"}, {"LUMOS_THREADS": "2", "OMP_NUM_THREADS": "3", **threads.PASSIVE}),
    (None, {"OMP_NUM_THREADS": "5"}, {"OMP_NUM_THREADS": "5", **threads.PASSIVE}),
    (None, {"OMP_NUM_THREADS": "4,2"}, {"OMP_NUM_THREADS": "4,2", **threads.PASSIVE}),
    (None, {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "6", **threads.PASSIVE}),
    (None, {"OMP_NUM_THREADS": "", "MKL_NUM_THREADS": "x"}, {"OMP_NUM_THREADS": "6", "MKL_NUM_THREADS": "6", **threads.PASSIVE}),
    (None, {"MKL_NUM_THREADS": "5"}, {"MKL_NUM_THREADS": "5", **threads.PASSIVE}),
    (None, {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "5", **threads.PASSIVE}),
    (None, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "6"}),
    (None, {"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9", "OMP_NUM_THREADS": "6"}),
    (None, {"LOCAL_WORLD_SIZE": "4"}, {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1", **threads.PASSIVE}),
    (None, {"LOCAL_SIZE": "2"}, {"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "3", **threads.PASSIVE}),
])  # fmt: skip
def test_what_the_user_set_wins(asked, before, after):
    environ = dict(before)
    prepare_process(asked, environ, lambda: machine(busy=2))
    assert environ == after


def test_a_choice_that_is_given_asks_nothing_of_the_machine():
    environ: dict[str, str] = {}
    prepare_process(2, environ, lambda: pytest.fail("the machine was asked"))


@pytest.mark.parametrize(("asked", "environ", "message"), [
    (0, {}, "--threads 0 is not allowed; give at least 1"),
    (2000, {}, "--threads 2000 is not allowed; give at most 1,024"),
    (None, {"LUMOS_THREADS": "-3"}, "LUMOS_THREADS -3 is not allowed; give at least 1"),
    (None, {"LUMOS_THREADS": "many"}, "LUMOS_THREADS is 'many'; give a number of threads"),
])  # fmt: skip
def test_numbers_that_are_not_allowed(asked, environ, message):
    with pytest.raises(UserError) as raised:
        given_count(asked, environ)
    assert str(raised.value) == message


def test_processes_of_a_run_on_this_machine():
    assert processes_here({}) == 1
    assert processes_here({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}) == 2
    assert processes_here({"WORLD_SIZE": "8"}) == 8
    assert processes_here({"WORLD_SIZE": "x"}) == 1


SECOND = 10**9


@pytest.mark.parametrize(("count", "ran", "waited", "noted"), [
    (2, 6, 6, True), (2, 6, 3, True), (2, 6, 2.9, False), (1, 2, 20, False), (2, 0.1, 0.9, False), (4, 1, 9, True),
])  # fmt: skip
def test_a_note_if_threads_wait_half_as_long_as_they_run(count, ran, waited, noted):
    before = {"1": (5 * SECOND, 100 * SECOND), "9": (7 * SECOND, 7 * SECOND)}  # thread 9 ends, thread 2 begins
    after = {"1": (5 * SECOND + int(ran * SECOND / 2), 100 * SECOND), "2": (int(ran * SECOND / 2), int(waited * SECOND))}
    note = waiting_note(before, after, count)
    assert (note is not None) == noted
    if noted:
        assert f"{count} threads waited {waited:.0f} s for a core and ran {ran:.0f} s" in note
        assert f"--threads {count // 2}" in note


@pytest.mark.parametrize("quiet", [False, True])
def test_the_watch_says_it_once_and_stops(monkeypatch, capsys, quiet):
    times = iter(range(0, 1000, 10))

    def busier(root: Path) -> threads.Times:
        return {"1": (SECOND, next(times) * SECOND)}

    monkeypatch.setattr(threads, "thread_times", busier)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with messages(quiet), watched(0.001):
        thread = next(thread for thread in threads.threading.enumerate() if thread.name == "threads-watch")
        thread.join(60)
        assert not thread.is_alive()
    assert capsys.readouterr().err.count("note: other programs use this machine: 4 threads waited 10 s") == (not quiet)


def test_a_system_that_does_not_tell_is_not_watched(tmp_path, capsys):
    assert thread_times(tmp_path) == {}
    with watched(0.001, tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_times_of_threads_are_read(tmp_path):
    files(tmp_path, **{"proc/self/task/7/schedstat": "11 22 3\n", "proc/self/task/8/schedstat": "broken"})
    assert thread_times(tmp_path) == {"7": (11, 22)}


@pytest.fixture
def seen(monkeypatch):
    """Make the verbs `plan` and `resize` only record the number of torch's threads and their arguments."""
    found = []
    from lumos.commands import resize

    monkeypatch.setattr(resize, "add_arguments", lambda parser: None)
    monkeypatch.setattr(resize, "run", lambda args: found.append((torch.get_num_threads(), args.threads)))
    return found


def test_in_a_foreign_process_threads_hold_for_the_call(seen, monkeypatch):
    before, environment = torch.get_num_threads(), dict(os.environ)
    assert main(["resize", "--threads", "3"]) == 0
    assert main(["resize"]) == 0
    assert program(["resize"]) == 0  # torch is imported, so it is too late to prepare the process
    assert seen == [(3, 3), (before, None), (before, None)]
    assert torch.get_num_threads() == before
    assert dict(os.environ) == environment


def test_all_verbs_that_compute_have_the_option(capsys):
    for words in (*([verb] for verb in cli.VERBS if verb not in cli.LIGHT_VERBS), ["evaluate", "prompts"], ["compress", "prune"],
                  ["bench", "attention"], ["bench", "threads"]):  # fmt: skip
        assert main([*words, "--help"]) == 0
        assert "--threads N" in capsys.readouterr().out, words
    assert main(["plot", "--threads", "2"]) == 2


def test_threads_that_make_batches_compute_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(prefetched(lambda step: torch.get_num_threads(), range(3), workers=2, depth=2)) == [1, 1, 1]
        assert list(prefetched(lambda step: torch.get_num_threads(), range(2), workers=0, depth=2)) == [3, 3]
        assert torch.get_num_threads() == 3
        later = []
        thread = threads.threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_process_of_its_own_is_prepared_before_torch(repo, tmp_path, micro_folder):
    own = ("LUMOS_THREADS", *threads.COUNT_VARIABLES, *threads.PASSIVE)
    environment = {**{name: value for name, value in os.environ.items() if name not in own}, "PYTHONPATH": str(repo)}
    output = tmp_path / "a.mp4"
    words = ["--model", str(micro_folder), "--prompt", "a red circle", "--seed", "1", "--output", str(output), "--threads", "2"]
    program_text = (
        "import os, sys; from lumos.cli import program; code = program(sys.argv[1:]);"
        "print({name: os.environ.get(name) for name in ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY')});"
        "print({'scipy.optimize', 'accelerate', 'sympy', 'torch._dynamo'} & set(sys.modules));"
        "print(type(sys.modules['transformers']).__name__, type(sys.modules['transformers.models']).__name__);"
        "import gc; print(gc.isenabled(), gc.get_freeze_count() > 100_000, gc.get_stats()[-1]['collections']); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program_text, "generate", *words], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    *_, variables, modules, packages, collector = done.stdout.splitlines()
    assert variables == "{'OMP_NUM_THREADS': '2', 'OMP_WAIT_POLICY': 'PASSIVE'}"
    assert modules == "set()"  # the import of transformers left them out
    assert packages == "Unread Unread"  # nothing asked transformers for a name that makes it read the files of all models
    assert collector == "True True 0"  # the collector never searched what the imports made, and works again
    assert json.loads(Path(f"{output}.json").read_text())["threads"] == 2
    kept = tmp_path / "kept.mp4"  # the same clip, made where nothing is left out
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["generate", *words[:-4], "--output", str(kept)]) == 0
    finally:
        torch.set_num_threads(before)
    assert kept.read_bytes() == output.read_bytes()
