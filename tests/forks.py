"""Python programs in processes of their own that are forked from a server, which has imported everything once.

Starting a program in this way takes a tenth of a second, not seconds. Tests of the start itself (what it imports,
what an environment without a package does) start Python themselves.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


def trust_the_system() -> None:
    """Let `os.fsync` return at once: no test cuts the power, and what is written outlives a killed process without it."""
    os.fsync = lambda descriptor: None


@dataclass
class Process:
    """A program that runs or has ended. `returncode` is negative for a signal; the outputs are files."""

    server: Forks
    args: list[str]
    pid: int
    out: Path
    err: Path
    returncode: int | None = None

    @property
    def stdout(self) -> str:
        return self.out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.err.read_text(errors="replace")

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Wait for the exit code. After `timeout` seconds, kill the process and raise TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                self.wait(60)
                raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
            time.sleep(0.02)
        return self.returncode

    def first_line(self, timeout: float = 600) -> str:
        """Wait for the first line of stdout and return it, or the part of it that exists when the program has ended."""
        deadline = time.monotonic() + timeout
        while "\n" not in self.stdout and self.poll() is None:
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.02)
        return self.stdout.partition("\n")[0]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()


class Forks:
    """The server, which starts with the first program."""

    def __init__(self, folder: Path):
        self.folder, self.numbers, self.server, self.asked = folder, itertools.count(), None, threading.Lock()

    def ask(self, job: dict) -> int | None:
        with self.asked:
            return self._ask(job)

    def _ask(self, job: dict) -> int | None:
        if self.server is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with open(self.folder / "server.err", "w") as log:
                self.server = subprocess.Popen([sys.executable, __file__], stderr=log, env=environment, **pipes)
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, (self.folder / "server.err").read_text()[-3000:]
        return json.loads(answer)

    def start(
        self, args: Sequence[object], *, input: str = "", env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Process:
        """Start `python ARGS...`: `-m module`, `-c code` or a script, with arguments. env: the whole environment."""
        stem = self.folder / str(next(self.numbers))
        names = {name: str(stem.with_suffix(f".{name}")) for name in ("in", "out", "err")}
        for name, text in (("in", input), ("out", ""), ("err", "")):
            Path(names[name]).write_text(text)
        args = [str(a) for a in args]
        environment = {name: text for name, text in (os.environ if env is None else env).items() if name != "OMP_NUM_THREADS"}
        pid = self.ask({"args": args, "env": environment, "cwd": str(cwd or Path.cwd()), **names})
        return Process(self, args, pid, Path(names["out"]), Path(names["err"]))

    def run(self, args: Sequence[object], *, timeout: float = 600, **options) -> subprocess.CompletedProcess[str]:
        process = self.start(args, **options)
        code = process.wait(timeout)
        return subprocess.CompletedProcess(process.args, code, process.stdout, process.stderr)

    def launch(self, args: Sequence[object], *, env: Mapping[str, str], rank_option: str = "") -> list[Process]:
        """Run a script or module in two processes with the variables of torchrun; return them when both have ended.

        rank_option: an option that is added with the rank, as the deepspeed launcher does.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        program, rest = (args[:2], args[2:]) if args[0] == "-m" else (args[:1], args[1:])
        runs = []
        for rank in ("0", "1"):
            told = [f"{rank_option}={rank}"] if rank_option else []
            runs.append(self.start([*program, *told, *rest], env={**env, **shared, "RANK": rank, "LOCAL_RANK": rank}))
        for run in runs:
            run.wait()
        return runs

    def close(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()


# -- the server --------------------------------------------------------------------------------------------------------


def import_all() -> None:
    """Also import modules that are imported at their first use. Nothing here computes, because threads do not survive a fork."""

    import lumos.commands.bench
    import lumos.commands.generate_list
    import lumos.commands.train
    import lumos.commands.train_tokenizer
    import lumos.data.ingest.ingest
    import lumos.data.shards.format
    import lumos.data.synthetic.digits
    import lumos.models.lumos1.benchmarks.attention
    import lumos.models.lumos1.benchmarks.generate
    import lumos.models.lumos1.benchmarks.loss
    import lumos.models.lumos1.benchmarks.train
    import lumos.models.lumos1.pipeline
    import lumos.models.lumos1.training
    import lumos.training.samples
    import lumos.training.tokenizer.task

    lumos.data.shards.format.parquet()


def serve() -> list[str] | None:
    """Answer jobs; in a forked process, return the arguments of the program."""
    codes: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            if job["poll"] not in codes:
                done, status = os.waitpid(job["poll"], os.WNOHANG)
                if done:
                    codes[done] = os.waitstatus_to_exitcode(status)
            answer = codes.get(job["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                become(job)
                return job["args"]
        print(json.dumps(answer), flush=True)
    return None


def become(job: dict) -> None:
    os.environ.clear()
    os.environ.update({**job["env"], "OMP_NUM_THREADS": "1"})
    os.chdir(job["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (name, mode) in enumerate((("in", os.O_RDONLY), ("out", flags), ("err", flags))):
        os.dup2(os.open(job[name], mode, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT, and so do its children
    # The server may have read further input, which is not for the program.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.path[:0] = [path for path in job["env"].get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]


def become_program(args: list[str]) -> None:
    """Run the program as Python does with these arguments."""
    import runpy

    kind, *rest = args
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


def code_of(program: list[str]) -> int:
    """Run a program to its end in this process and return its exit code."""
    try:
        become_program(program)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    import_all()
    trust_the_system()
    gc.freeze()  # collections in the forked processes would copy all memory
    if (program := serve()) is not None:
        code = code_of(program)
        atexit._run_exitfuncs()
        for file in (sys.stdout, sys.stderr):
            file.flush()
        os._exit(code)  # Python's cleanup of all modules takes longer than most programs
