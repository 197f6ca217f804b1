"""Faults of a run: killed processes, dead or stopped ranks, a full disk, numbers that are not finite."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from ranks import Ranks, Runs
from run_log import KEYS, assert_same_run, read_log

from lumos.training import checkpoint


@pytest.mark.parametrize("fault", ["kill_soon_after_step", "kill_in_save", "kill_before_rename"])
def test_one_process_killed(runs: Runs, ranks: Ranks, fault: str):
    settings = runs.make(runs.folder / f"plain-{fault}")
    where = (random.randint(1, 4), random.uniform(0, 0.2)) if fault == "kill_soon_after_step" else (4,)
    (process,) = ranks.train(settings, "plain", 1, {0: [[fault, *where]]})
    assert process.code in (-9, 0) if fault == "kill_soon_after_step" else process.code == -9, process.err
    ranks.finish(settings, "plain", 1)
    assert_same_run(settings.output_dir, runs.whole("plain"))


@pytest.mark.parametrize("engine", ["zero3", pytest.param("zero2", marks=pytest.mark.thorough)])
def test_one_of_two_killed_again_and_again(runs: Runs, ranks: Ranks, engine: str):
    """A process is killed after a step, then during a save; each time the other process ends with an error."""
    settings = runs.make(runs.killed(engine, 2, f"{engine}-again"))
    victim = random.randint(0, 1)
    other = 1 - victim
    processes = ranks.train(settings, engine, 2, {victim: [["kill_in_save", 4]]})
    assert processes[victim].code == -9, processes[victim].err
    assert (processes[other].code, "another process of the run" in processes[other].error) == (1, True), processes[other].err
    assert [p.name for p in checkpoint.list_checkpoints(settings.output_dir / "checkpoints")] == ["step-00000002"]
    ranks.finish(settings, engine)
    assert_same_run(settings.output_dir, runs.whole(engine))


@pytest.mark.parametrize("engine", ["zero1", pytest.param("zero0", marks=pytest.mark.thorough)])
def test_one_of_two_killed_with_replicated_weights(runs: Runs, ranks: Ranks, engine: str):
    settings = runs.make(runs.folder / f"{engine}-broken")
    assert [p.code for p in ranks.train(settings, engine, 2, {1: [["kill_in_save", 4]]})] == [1, -9]
    ranks.finish(settings, engine)
    assert_same_run(settings.output_dir, runs.whole(engine))


@pytest.mark.parametrize(("engine", "world", "then", "processes"), [
    ("zero3", 2, "plain", 1), ("plain", 1, "zero3", 2), *(pytest.param(*change, marks=pytest.mark.thorough) for change in (
        ("zero2", 2, "zero2", 1), ("zero2", 1, "zero2", 2), ("zero3", 2, "zero3", 1), ("zero3", 1, "zero3", 2),
        ("zero2", 2, "zero0", 2),
    )),
])  # fmt: skip
def test_another_number_of_processes_or_another_engine(
    runs: Runs, ranks: Ranks, engine: str, world: int, then: str, processes: int
):
    settings = runs.make(runs.killed(engine, world, f"{engine}-{world}-then-{then}-{processes}"))
    ended = ranks.train(settings, then, processes)
    assert [p.code for p in ended] == [0] * processes, ended
    said = ended[0].err
    name = {"plain": "plain PyTorch"}.get(then, f"DeepSpeed ZeRO {then[-1]}")
    assert f"this is {name}, {processes} process{'es' * (processes > 1)}: weights, optimizer state" in said
    assert said.count("divided anew") == 1
    for key in KEYS[:4]:
        again, whole = read_log(settings.output_dir, key), read_log(runs.whole("plain"), key)
        assert sorted(again) == sorted(whole)
        assert again == pytest.approx(whole, abs=1e-4), key
    assert [p.name for p in checkpoint.list_checkpoints(settings.output_dir / "checkpoints")] == ["step-00000004", "step-00000005"]


def test_one_of_two_told_to_stop(runs: Runs, ranks: Ranks):
    """Both processes finish the same step, save and end; the same command resumes the run."""
    settings = runs.make(runs.folder / "told")
    ended = ranks.train(settings, "zero2", 2, {1: [["signal_after_step", 2]]})
    assert [p.code for p in ended] == [0, 0], ended
    assert "stopped after step 3; the same command continues" in ended[0].err
    ranks.finish(settings, "zero2")
    assert_same_run(settings.output_dir, runs.whole("zero2"))


def test_a_process_that_hangs(runs: Runs, ranks: Ranks):
    """The other process ends after deepspeed.timeout_minutes instead of waiting forever."""
    settings = runs.make(runs.folder / "hangs")
    settings.deepspeed.timeout_minutes = 0.1
    settings.samples.max_seconds = 1
    first, stopped = ranks.train(settings, "zero2", 2, {1: [["stop_after_step", 1]]})
    assert (first.code, stopped.code) == (1, None), first.err
    assert "another process of the run ended or did not answer within deepspeed.timeout_minutes" in first.error


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.thorough)])
def test_a_full_disk_in_one_process(runs: Runs, ranks: Ranks, rank: int):
    """All processes end; the last complete checkpoint stays, and the incomplete one is removed."""
    settings = runs.make(runs.folder / f"full-{rank}")
    ended = ranks.train(settings, "zero3", 2, {rank: [["full_disk_in_save", 4]]})
    assert [p.code for p in ended] == [1, 1]
    assert "step 4 cannot be written: " in ended[rank].error
    assert "File too large" in ended[rank].error
    assert "another process failed" in ended[1 - rank].error
    assert [p.name for p in (settings.output_dir / "checkpoints").iterdir()] == ["step-00000002"]
    if rank:
        ranks.finish(settings, "zero3")
        assert_same_run(settings.output_dir, runs.whole("zero3"))


def test_a_damaged_newest_checkpoint_of_two_processes(runs: Runs, ranks: Ranks):
    """One process finds the damage; both fall back to the older checkpoint with a warning, and reach the same losses."""
    settings = runs.make(runs.folder / "damaged")
    shutil.copytree(runs.whole("zero3"), settings.output_dir)
    newest = settings.output_dir / "checkpoints" / "step-00000005"
    (newest / "rank-0001.safetensors").write_bytes(b"x")
    ended = ranks.train(settings, "zero3")
    assert [p.code for p in ended] == [0, 0], ended
    assert "rank-0001.safetensors has 1 bytes instead of" in ended[0].err + ended[1].err
    assert "resumed from step 4" in ended[0].err
    assert_same_run(settings.output_dir, runs.whole("zero3"))


@pytest.mark.parametrize(("engine", "what"), [
    ("zero1", "loss"), ("zero3-offload", "gradient"), *(pytest.param(*change, marks=pytest.mark.thorough) for change in (
        ("zero0", "gradient"), ("zero2", "gradient"), ("zero3", "loss"), ("zero2-offload", "loss"),
    )),
])  # fmt: skip
def test_not_finite_in_one_of_two_processes_is_left_out_by_both(runs: Runs, ranks: Ranks, engine: str, what: str):
    """Both processes leave the update out, as a single process does with the same batch."""
    runs_of = {}
    for name, world in (("plain", 1), (engine, 2)):
        settings = runs.make(runs.folder / f"{name}-{what}-left-out")
        settings.training.micro_batch_size, settings.training.skip_not_finite = None, 1
        runs_of[name] = settings.output_dir
        if not settings.output_dir.exists():
            ranks.finish(settings, name, world, faults={world - 1: [["not_finite_in_step", 3, what]]})
    for key in ("loss", "grad_norm", "val_loss_video_ema"):
        plain, spread = (read_log(folder, key) for folder in runs_of.values())
        assert sorted(plain) == ([1, 2, 4, 5] if key != "val_loss_video_ema" else [5])
        assert spread == pytest.approx(plain, abs=1e-4)
    events = [json.loads(line) for line in (runs_of[engine] / "log.jsonl").read_text().splitlines() if "not_finite" in line]
    (event,) = [event for event in events if event.get("event") == "not_finite"]
    assert (event["step"], event["skipped"]) == (3, 1)
    assert what in event["error"]
    assert event["clips"] == [f"worlds/0/{2 * 65536 + i}" for i in range(4)]


def test_not_finite_in_one_of_two_processes_stops_both(runs: Runs, ranks: Ranks):
    settings = runs.make(runs.folder / "stops")
    settings.training.micro_batch_size = None
    ended = ranks.train(settings, "zero2", 2, {1: [["not_finite_in_step", 3, "gradient"]]})
    assert [p.code for p in ended] == [1, 1]
    assert all("step 3: the gradient norm is" in p.error and "the weights were not updated" in p.error for p in ended), ended
    assert checkpoint.latest(settings.output_dir / "checkpoints")[1]["step"] == 2
