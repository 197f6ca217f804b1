"""Batches drawn by processes: the same losses as by threads, and nothing that hangs when one of them, or the run, is ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from run_log import read_log
from safetensors.torch import load_file

from lumos.data.ahead import in_processes
from lumos.errors import RunError, UserError
from lumos.training.ardf import ArdfTask
from lumos.training.loop import Run, train
from lumos.training.settings import build_settings

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
STAGES = [{"steps": 2, "image_share": 1.0, "image_batch_size": 6}, {"image_share": 0.5}]


def test_the_results_are_in_order_and_made_by_as_many_processes():
    made = list(in_processes(lambda step: (torch.full((3,), step), os.getpid()), range(2, 12), processes=2))
    assert [tensor.tolist() for tensor, _ in made] == [[step] * 3 for step in range(2, 12)]
    assert os.getpid() not in {process for _, process in made}
    assert not multiprocessing.active_children()


def test_an_error_keeps_its_kind_and_its_one_line():
    def make(step: int) -> int:
        if step == 3:
            raise UserError("broken clip")
        return step

    seen = []
    with pytest.raises(UserError) as error:
        seen.extend(in_processes(make, range(9), processes=2))
    assert str(error.value) == "broken clip"
    assert seen == [0, 1, 2]
    assert not multiprocessing.active_children()


def test_a_killed_process_is_one_error_and_ends_the_others():
    made = in_processes(lambda step: (time.sleep(0.02), os.getpid())[1], range(1000), processes=3)
    os.kill(next(made), signal.SIGKILL)
    with pytest.raises(RunError, match="was killed, by the system if memory ran out; .* with fewer processes"):
        list(made)
    assert not multiprocessing.active_children()


def test_the_generator_of_random_numbers_of_the_run_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(in_processes(lambda step: float(torch.rand(1)), range(4), processes=2))
    assert torch.equal(torch.rand(1), expected)


def lora_folder(micro_settings, tmp_path: Path) -> dict:
    """Sections of a run whose model draws random numbers, for dropout."""
    base = train(micro_settings(training={"max_steps": 1, "output_dir": str(tmp_path / "base")}))["export"]
    return {"model": {"from": base}, "tokenizer": {"video": None, "text": None}, "lora": {"rank": 2, "dropout": 0.3}}


@pytest.mark.parametrize("workers", [0, 1])
def test_losses_are_bitwise_those_of_threads_also_resumed(micro_settings, tmp_path: Path, monkeypatch, workers: int):
    sections = lora_folder(micro_settings, tmp_path)
    options = {"save_every_steps": 2, "eval_every": 3, "ema_decay": 0.9}

    def make(name: str, **data):
        training = {**options, "output_dir": str(tmp_path / name)}
        return micro_settings(**sections, data={"stages": STAGES, **data}, training=training)

    train(make("threads", workers=1))
    drawn = make("processes", workers=workers, processes=2)
    with monkeypatch.context() as patch:
        report = Run._report
        patch.setattr(Run, "_report", lambda self: (report(self), os.kill(os.getpid(), signal.SIGTERM) if self.step == 3 else None))
        assert train(drawn)["stopped_by"] == "SIGTERM"
    assert not multiprocessing.active_children()
    train(drawn)
    for key in ("loss", "grad_norm", "frame_loss_video", "val_loss_video_ema"):
        assert read_log(tmp_path / "processes", key) == read_log(tmp_path / "threads", key), key
    ours, theirs = (load_file(tmp_path / name / "export" / "adapter_model.safetensors") for name in ("threads", "processes"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_clip_that_cannot_be_drawn_is_the_same_error(micro_settings, monkeypatch):
    draft = ArdfTask.draft

    def broken(self: ArdfTask, step: int, *args, **options):
        if step == 1:
            raise UserError("the clip is broken; leave it out")
        return draft(self, step, *args, **options)

    monkeypatch.setattr(ArdfTask, "draft", broken)
    with pytest.raises(UserError) as error:
        train(micro_settings(data={"processes": 1, "workers": 1}))
    assert str(error.value) == "the clip is broken; leave it out"
    assert not multiprocessing.active_children()


def test_several_threads_have_nothing_to_do(micro_settings):
    with pytest.raises(UserError, match=r"data\.workers is 2, but with data\.processes one thread encodes"):
        micro_settings(data={"processes": 2, "workers": 2})


def test_a_system_that_cannot_fork(micro_settings, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UserError, match="processes is 2, but this system cannot fork"):
        micro_settings(data={"processes": 2})


@pytest.fixture(scope="module")
def command(repo) -> list[str]:
    return [sys.executable, str(repo / "train.py"), "--config"]


class Started:
    """The command line's run of some settings, in a group of processes of its own, seen when it has done two steps."""

    def __init__(self, command: list[str], settings, repo: Path):
        self.settings, self.folder = settings, settings.output_dir
        config = self.folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(settings.to_dict()))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
        self.process = subprocess.Popen(
            [*command, str(config)], stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
        )
        deadline, before = time.monotonic() + 120, self._steps()
        while self.process.poll() is None and time.monotonic() < deadline and self._steps() < before + 2:
            time.sleep(0.02)
        assert self.process.poll() is None, self.process.stderr.read()
        self.drawing = psutil.Process(self.process.pid).children()
        assert len(self.drawing) == settings.data.processes

    def _steps(self) -> int:
        log = self.folder / "log.jsonl"
        return log.read_text().count('"grad_norm"') if log.exists() else 0

    def ended(self) -> tuple[int, list[str]]:
        """Exit code and the errors; nothing that it started is left."""
        _, err = self.process.communicate(timeout=60)
        assert not psutil.wait_procs(self.drawing, timeout=10)[1]
        assert "Traceback" not in err, err
        return self.process.returncode, [line for line in err.splitlines() if line.startswith("error")]


@pytest.fixture
def started(command, micro_settings, repo):
    runs = []

    def start():
        settings = micro_settings(
            data={"processes": 2, "workers": 1}, training={"max_steps": 100_000, "save_every_steps": 2, "log_every": 1}
        )
        runs.append(Started(command, settings, repo))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


def test_signals_to_the_whole_group_save_and_a_killed_process_ends_the_run(started):
    """SIGTERM to all: the processes leave it to the run. The same command goes on, loses a process and ends with an error; and
    goes on again, when it is killed itself: the lock of its folder goes with it, though its processes share that."""
    run = started()
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.ended() == (0, [])
    last = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()][-1]
    assert (last["event"], last["stopped_by"]) == ("end", "SIGTERM")

    run = started()
    run.drawing[0].kill()
    code, errors = run.ended()
    assert code == 1
    assert len(errors) == 1
    assert "a process that makes batches ahead was killed" in errors[0]

    run = started()
    run.process.kill()
    assert run.ended()[0] == -signal.SIGKILL
    raw = run.settings.to_dict()
    raw["training"]["max_steps"] = 1  # done already: it only has to be let in
    with pytest.raises(UserError, match="max_steps"):
        train(build_settings(raw))
