"""Runs the jobs of experiments in the process of the test."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lumos.cli import main
from lumos.evaluation.experiments import runs


def run_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run jobs in this process, one after another, because starting an interpreter for each would take most of the time."""

    def run(command, *, stdout, **_) -> subprocess.CompletedProcess:
        assert command[:3] == [sys.executable, "-m", "lumos"]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            return subprocess.CompletedProcess(command, main(command[3:]))

    monkeypatch.setattr(runs, "ThreadPoolExecutor", lambda _: contextlib.nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
