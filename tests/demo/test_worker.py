"""The worker makes one clip at a time from a bounded queue, and ends cancelled jobs."""

from __future__ import annotations

import threading
import time

import pytest

from lumos.demo.limits import ServerBusy
from lumos.demo.worker import ClipJob, Worker
from lumos.errors import RunError, UserError
from lumos.pipeline.request import Request


class Bench:
    """A worker whose jobs run until a test releases them; `begun` and `ended` hold the prompts of its jobs."""

    def __init__(self, queue_length: int):
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.go = threading.Event()
        self.error: Exception | None = None
        self.worker = Worker(self.make, queue_length)

    def make(self, job: ClipJob) -> None:
        self.begun.append(job.request.prompt)
        while not self.go.is_set():
            job.check_stop()
            time.sleep(0.001)
        if self.error is not None:
            raise self.error
        self.ended.append(job.request.prompt)

    def submit(self, prompt: str, **options) -> ClipJob:
        return self.worker.submit(ClipJob(Request.of(prompt), **options))


@pytest.fixture
def bench():
    bench = Bench(queue_length=2)
    yield bench
    bench.worker.close()


def wait_until(true, what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


def test_jobs_are_made_in_order_one_at_a_time(bench):
    jobs = [bench.submit(name) for name in "abc"]
    wait_until(lambda: bench.begun == ["a"], "a begins")
    assert [job.state for job in jobs] == ["working", "waiting", "waiting"]
    assert [bench.worker.ahead(job) for job in jobs] == [0, 1, 2]
    assert bench.worker.status() == {"state": "working", "waiting": 2}
    bench.go.set()
    wait_until(lambda: all(job.ended for job in jobs), "all end")
    assert bench.ended == ["a", "b", "c"]
    assert {job.state for job in jobs} == {"done"}
    assert bench.worker.status() == {"state": "idle", "waiting": 0}


def test_the_queue_is_bounded_and_has_room_again(bench):
    bench.submit("a")
    waiting = [bench.submit(name) for name in "bc"]
    with pytest.raises(ServerBusy, match="2 requests are waiting already"):
        bench.submit("d")
    bench.worker.cancel(waiting[0])
    assert waiting[0].state == "cancelled"
    assert bench.submit("e").state == "waiting"


def test_a_visitor_has_one_clip_in_the_queue(bench):
    first = bench.submit("a", owner="visitor")
    with pytest.raises(ServerBusy, match="your last clip is still being made"):
        bench.submit("b", owner="visitor")
    bench.submit("c", owner="other")
    bench.worker.cancel_of("visitor")
    wait_until(lambda: first.ended, "the first ends")
    bench.submit("d", owner="visitor")


def test_cancelling_a_running_job_starts_the_next_one(bench):
    running, waiting = bench.submit("a"), bench.submit("b")
    wait_until(lambda: bench.begun == ["a"], "a begins")
    bench.worker.cancel(running)
    wait_until(lambda: running.ended and bench.begun == ["a", "b"], "b begins")
    assert running.state == "cancelled"
    assert running.error is None
    assert not waiting.ended
    bench.worker.cancel_of(waiting.owner)
    wait_until(lambda: bench.worker.status()["state"] == "idle", "idle")
    assert bench.ended == []


def test_cancelling_an_ended_job_changes_nothing(bench):
    bench.go.set()
    job = bench.submit("a")
    wait_until(lambda: job.ended, "a ends")
    bench.worker.cancel(job)
    assert job.state == "done"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("a wrong size"), UserError, "a wrong size"),
        (RunError("the disk is full"), RunError, "the disk is full"),
        (MemoryError(), RunError, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), RunError, "out of memory; ask for a smaller size"),
        (KeyError("secret"), RunError, "the server's log says why"),
    ],
)
def test_a_failure_stays_with_its_job(bench, error, kind, message, capsys):
    bench.error = error
    bench.go.set()
    job = bench.submit("a")
    wait_until(lambda: job.ended, "a ends")
    assert job.state == "failed"
    assert type(job.error) is kind
    assert message in str(job.error)
    assert "secret" not in str(job.error)
    assert ("KeyError" in capsys.readouterr().err) == isinstance(error, KeyError)
    bench.error = None
    other = bench.submit("b")
    wait_until(lambda: other.ended, "b ends")
    assert other.state == "done"


def test_closing_interrupts_everything_and_takes_no_more(bench):
    jobs = [bench.submit(name) for name in "ab"]
    bench.worker.close()
    assert {job.state for job in jobs} == {"interrupted"}
    with pytest.raises(ServerBusy, match="closing"):
        bench.submit("c")
