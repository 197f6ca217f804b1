"""Batches drawn by processes give the same losses as by threads, and nothing hangs when a process or the run ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks, Runs
from run_log import assert_same_run, read_log
from safetensors.torch import load_file

from lumos.data import prefetch as ahead
from lumos.data.prefetch import in_processes
from lumos.errors import RunError, UserError
from lumos.models.lumos1.training import ArdfTask
from lumos.training import checkpoint
from lumos.training.loop import Run, train

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
    with pytest.raises(RunError, match=r"was killed, perhaps by the system because memory ran out; .* use fewer processes"):
        list(made)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_too_little_shared_memory_says_what_to_do():
    """Raise the error of torch in a container with 64 MB of shared memory."""

    def make(step: int) -> int:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)")

    with pytest.raises(RunError, match=r"of 2 processes do not fit into shared memory \(unable .*\); enlarge /dev/shm"):
        list(in_processes(make, range(3), processes=2))
    with pytest.raises(RuntimeError, match="another fault"):
        list(in_processes(lambda step: (_ for _ in ()).throw(RuntimeError("another fault")), range(3), processes=2))


@pytest.mark.parametrize("how", ["killed when all is made", "hanging"])
def test_processes_that_do_not_end_are_ended(monkeypatch, how: str):
    monkeypatch.setattr(ahead, "GRACE", 0.2)
    made = in_processes(lambda step: (step and how == "hanging" and time.sleep(1000), os.getpid()), range(2), processes=2)
    _, process = next(made)
    if how == "hanging":
        made.close()
    else:
        next(made)
        os.kill(process, signal.SIGKILL)
        assert list(made) == []
    assert not multiprocessing.active_children()


def test_processes_do_not_advance_the_random_state_of_the_run():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(in_processes(lambda step: float(torch.rand(1)), range(4), processes=2))
    assert torch.equal(torch.rand(1), expected)


def lora_folder(micro_settings, tmp_path: Path) -> dict:
    """Sections of a run whose model draws random numbers, for dropout."""
    base = train(micro_settings(training={"max_steps": 1, "output_dir": str(tmp_path / "base")}))["export"]
    return {"model": {"from": base}, "tokenizer": {"video": None, "text": None}, "lora": {"rank": 2, "dropout": 0.3}}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.thorough)])
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
    draft = ArdfTask.prepare

    def broken(self: ArdfTask, step: int, *args, **options):
        if step == 1:
            raise UserError("the clip is broken; leave it out")
        return draft(self, step, *args, **options)

    monkeypatch.setattr(ArdfTask, "prepare", broken)
    with pytest.raises(UserError) as error:
        train(micro_settings(data={"processes": 1, "workers": 1}))
    assert str(error.value) == "the clip is broken; leave it out"
    assert not multiprocessing.active_children()


def test_several_workers_with_processes_are_refused(micro_settings):
    with pytest.raises(UserError, match=r"data\.workers is 2, but with data\.processes one thread encodes"):
        micro_settings(data={"processes": 2, "workers": 2})


def test_a_system_that_cannot_fork(micro_settings, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UserError, match="processes is 2, but this system cannot fork"):
        micro_settings(data={"processes": 2})


@pytest.fixture
def drawn(runs: Runs):
    """Return settings of `runs` in a folder of this name, with two processes that draw clips."""

    def make(name: str):
        settings = runs.make(runs.folder / name)
        settings.data.processes, settings.data.workers = 2, 1
        return settings

    return make


def test_a_signal_to_the_whole_group_is_left_to_the_run(drawn, runs: Runs, ranks: Ranks):
    settings = drawn("group")
    (process,) = ranks.train(settings, "plain", 1, {0: [["signal_group_after_step", 2]]})
    assert process.code == 0, process.err
    assert "stopped after step 3; the same command continues" in process.err
    assert "Traceback" not in process.err
    ranks.finish(settings, "plain", 1)
    assert_same_run(settings.output_dir, runs.whole("plain"))


def test_a_killed_process_ends_the_run_with_one_error(drawn, runs: Runs, ranks: Ranks):
    settings = drawn("lost-process")
    settings.training.max_steps = 50
    (process,) = ranks.train(settings, "plain", 1, {0: [["kill_drawing_after_step", 2]]}, seconds=300)
    assert process.code == 1, process.err
    assert process.error.startswith("error: a process that makes batches ahead was killed")
    assert "Traceback" not in process.err
    assert checkpoint.latest(settings.output_dir / "checkpoints")[1]["step"] >= 2


def test_a_killed_run_releases_its_lock_and_connections(drawn, runs: Runs, ranks: Ranks, times):
    """Processes must not hold the lock of the folder, which the next run needs, or connections, at whose end others stop."""
    settings = drawn("killed-drawing")
    for after in (1, 3)[: times(1, 2)]:
        first, second = ranks.train(settings, "zero2", 2, {1: [["kill_after_step", after]]}, seconds=300)
        assert (first.code, second.code) == (1, -9), first.err
        assert "another process of the run" in first.error
        first, second = ranks.train(settings, "zero2", 2, {0: [["kill_after_step", after + 1]]}, seconds=300)
        assert (first.code, second.code) == (-9, 1), second.err
    ranks.finish(settings, "zero2")
    assert_same_run(settings.output_dir, runs.whole("zero2"))
