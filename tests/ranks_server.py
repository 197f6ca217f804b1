"""Processes of training runs, forked from this one after all imports: a run of two takes seconds, not half a minute.

Reads a job a line, {"folder", "verb", "config", "overrides", "world", "faults": {rank: [[name, argument, ...], ...]}, "seconds"},
and answers with how each process ended. Each process runs `train` of the command line, with the faults installed.
"""

from __future__ import annotations

import atexit
import gc
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from forks import trust_the_system

from lumos import registry
from lumos.cli import main
from lumos.commands.bench_faults import kill_at_file_call
from lumos.models.lumos1.training import ArdfTask
from lumos.training import checkpoint
from lumos.training.loop import Run


def kill_after_step(step: int) -> None:
    report = Run._report

    def killed(run: Run) -> None:
        report(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Run._report = killed


def kill_soon_after_step(step: int, seconds: float) -> None:
    """Kill the process after `seconds`, at any line."""
    report = Run._report

    def killed(run: Run) -> None:
        report(run)
        if run.step == step:
            threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    Run._report = killed


def kill_at_file_call_after_step(step: int, number: int) -> None:
    """Kill the process before its n-th call that changes or stores files, counted from then on."""
    report = Run._report

    def armed(run: Run) -> None:
        report(run)
        if run.step == step:
            kill_at_file_call(number)

    Run._report = armed


def signal_after_step(step: int) -> None:
    """Send SIGTERM, as a scheduler does to end a job."""
    report = Run._report

    def told(run: Run) -> None:
        report(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Run._report = told


def signal_group_after_step(step: int) -> None:
    """Send SIGTERM to the whole process group, as some schedulers do."""
    os.setpgid(0, 0)
    report = Run._report

    def told(run: Run) -> None:
        report(run)
        if run.step == step:
            os.killpg(0, signal.SIGTERM)

    Run._report = told


def kill_drawing_after_step(step: int) -> None:
    """Kill one of data.processes, as the system does when memory runs out."""
    report = Run._report

    def killed(run: Run) -> None:
        report(run)
        if run.step == step:
            multiprocessing.active_children()[0].kill()

    Run._report = killed


def stop_after_step(step: int) -> None:
    """Stop the process (SIGSTOP): it neither ends nor answers."""
    report = Run._report

    def stopped(run: Run) -> None:
        report(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGSTOP)

    Run._report = stopped


def kill_in_save(step: int) -> None:
    """Kill the process when half of its file of a checkpoint is written."""
    save = checkpoint.save_file

    def killed(tensors: dict, path: Path) -> None:
        save(tensors, path)
        if f"{step:08d}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = killed


def kill_before_rename(step: int) -> None:
    """Kill the process when a checkpoint is written but not yet renamed."""
    replace = os.replace

    def killed(source: object, target: object) -> None:
        if str(target).endswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killed


def full_disk_in_save(step: int) -> None:
    """Limit the size of files, so that the kernel refuses most of this process's file."""
    save = checkpoint.save_file

    def limited(tensors: dict, path: Path) -> None:
        if f"{step:08d}" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            save(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoint.save_file = limited


def not_finite_in_step(step: int, what: str) -> None:
    """Make the loss of this process's clips, or only its gradient, not finite."""
    losses = ArdfTask.losses
    calls = [0]

    def spoiled(task: ArdfTask, model: torch.nn.Module, micro: dict) -> tuple:
        values, frames = losses(task, model, micro)
        if model.training:
            calls[0] += 1
            if calls[0] == step:
                values = values * math.nan if what == "loss" else values + (values * 0).sqrt()
        return values, frames

    ArdfTask.losses = spoiled


def weigh_after_step(step: int, file: str) -> None:
    """Record the bytes of all tensors between two steps, without the tensors that existed before the model."""
    build_model, report = ArdfTask.build_model, Run._report

    def held() -> dict[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    def built(task: ArdfTask) -> torch.nn.Module:
        task.before = held()
        return build_model(task)

    def weighed(run: Run) -> None:
        report(run)
        if run.step == step:
            Path(file).write_text(str(sum(size for place, size in held().items() if place not in run.task.before)))

    ArdfTask.build_model, Run._report = built, weighed


def hide_a_weight() -> None:
    """Remove a slot, as if DeepSpeed kept a weight in an unknown place."""
    from lumos.training.deepspeed_engine import DeepSpeedEngine

    slots = DeepSpeedEngine.slots
    DeepSpeedEngine.slots = lambda engine: dict(list(slots(engine).items())[1:])


def toy_without_dropout() -> None:
    """Remove the dropout of the toy, because each process draws it from a random state of its own."""
    import toy_task

    make = toy_task.Velocity.__init__

    def made(self: toy_task.Velocity) -> None:
        make(self)
        self.layers[2].p = 0.0

    toy_task.Velocity.__init__ = made


def serve() -> list[str] | None:
    """Answer jobs; in a forked process, return the command line that it shall run."""
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children: list[int] = []
        for rank in range(job["world"]):
            child = os.fork()
            if child == 0:
                return become(rank, port, job)
            children.append(child)
        print(json.dumps(wait(children, job)), flush=True)
    return None


def become(rank: int, port: int, job: dict) -> list[str]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job["plain"]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    os.chdir(job["folder"])
    for number, name in ((0, "/dev/null"), (1, f"out-{rank}"), (2, f"err-{rank}")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    for name, *arguments in job["faults"].get(str(rank), []):
        globals()[name](*arguments)
    return [*job["verb"].split(), "--config", job["config"], *job["overrides"]]


def wait(children: list[int], job: dict) -> list[dict]:
    """Return how each process ended: its exit code, negative for a signal, null if it had to be killed at the end."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + job["seconds"]
    stopped = {int(rank) for rank, faults in job["faults"].items() if any(f[0] == "stop_after_step" for f in faults)}
    waiting = {child for rank, child in enumerate(children) if rank not in stopped}
    while waiting - codes.keys() and time.monotonic() < deadline:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = [Path(job["folder"], f"err-{rank}").read_text(errors="replace")[-4000:] for rank in range(len(children))]
    return [{"code": codes.get(child), "err": text} for child, text in zip(children, texts, strict=True)]


def import_all() -> None:
    """Also import modules that are imported at their first use."""
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.original_muon
    import peft  # noqa: F401

    import lumos.commands.compress_distill
    import lumos.commands.train
    import lumos.commands.train_tokenizer
    import lumos.data.synthetic.digits
    import lumos.training.deepspeed_engine
    import lumos.training.tokenizer.task

    lumos.data.synthetic.digits.load()
    assert deepspeed.ops.__compatible_ops__


if __name__ == "__main__":
    import_all()
    trust_the_system()
    registry.PACKAGES.append("toy_task")
    gc.freeze()  # collections in the forked processes would go through, and copy, all that is imported
    if (command := serve()) is not None:
        code = main(command)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # Python's cleanup of all modules takes as long as some steps
