"""Replicas make the clips of a single process, in batches of one shape; on a real Ray in tests/data/test_ray_engine.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from served_clips import asked, made

from lumos.cli import main
from lumos.commands.serve import numbers
from lumos.demo.replicas import ATTEMPTS, Maker, Replicas, ReplicaSettings, batches, deployment
from lumos.demo.worker import Cancelled, ClipJob
from lumos.errors import RunError, UserError
from lumos.pipeline.request import Request


@pytest.fixture
def maker(pipe, monkeypatch):
    monkeypatch.chdir(Path.cwd())
    return Maker(lambda: (pipe, lambda: {"device": "there"}), os.getcwd())


def test_a_replica_has_its_own_number_of_threads(tmp_path):
    """Ray hands on OMP_NUM_THREADS of the server, which is for the whole machine."""
    here, before = os.getcwd(), torch.get_num_threads()
    try:
        assert Maker(lambda: (torch.get_num_threads(), None), str(tmp_path), 3).pipe == 3
    finally:
        os.chdir(here)
        torch.set_num_threads(before)


# ---- batches


def test_requests_of_one_form_are_a_batch():
    picture = np.zeros((4, 4, 3), np.uint8)
    odd = [asked(3, image=picture), asked(4, negative_prompt="x"), asked(5, image=picture)]
    requests = [asked(0), asked(1), asked(2), *odd, asked(7)]
    assert batches(requests) == [[0, 2], [1, 6], [3], [4], [5]]


def test_a_batch_has_the_clips_of_single_calls(maker, pipe):
    requests = [asked(seed) for seed in range(6)]
    calls = []
    whole = type(pipe).__call__
    counted = SimpleNamespace(pipe=lambda prompt, **more: calls.append(prompt) or whole(pipe, prompt, **more))
    maker.pipe = counted.pipe
    for request, answer in zip(requests, maker.make(requests), strict=True):
        alone = pipe(**request, output_type="uint8").frames[0]
        assert np.array_equal(answer["frames"], alone)
        assert answer["about"] == {"device": "there"}
    assert calls == [["clip 0", "clip 2", "clip 4"], ["clip 1", "clip 3", "clip 5"]]


def test_a_clip_that_cannot_be_made_spoils_no_other(maker, pipe, capsys):
    whole = type(pipe).__call__

    def fails(prompt, **more):
        if "clip 2" in prompt or prompt == "clip 2":
            raise UserError("no clip 2")
        if "clip 4" in prompt or prompt == "clip 4":
            raise KeyError("secret")
        return whole(pipe, prompt, **more)

    maker.pipe = fails
    answers = maker.make([asked(seed) for seed in (0, 2, 4)])
    assert "frames" in answers[0]
    assert answers[1] == {"error": "no clip 2", "is_users": True}
    assert "secret" not in answers[2]["error"]
    assert not answers[2]["is_users"]
    assert "secret" in capsys.readouterr().err  # the log of the replica


# ---- the server's side, with a handle that makes the clips in this process


class Died(Exception):
    pass


class Handle:
    """The handle of a deployment whose replicas die `deaths` times, or never answer."""

    def __init__(self, maker: Maker | None, deaths: int = 0):
        self.maker, self.deaths, self.asked, self.cancelled = maker, deaths, 0, 0

    def remote(self, request):
        self.asked += 1
        return SimpleNamespace(result=lambda timeout_s: self.result(request, timeout_s), cancel=self.cancel)

    def result(self, request, timeout_s):
        assert timeout_s > 0
        if self.deaths:
            self.deaths -= 1
            raise Died("the actor died")
        if self.maker is None:
            raise TimeoutError
        return self.maker.make([request])[0]

    def cancel(self):
        self.cancelled += 1


SETTINGS = ReplicaSettings(2, batch_size=3)


def test_a_clip_of_a_dead_replica_is_made_again(maker, pipe):
    handle = Handle(maker, deaths=ATTEMPTS - 1)
    frames, about = Replicas(handle, SETTINGS, (Died,)).make(Request.of(**asked(3)), lambda: None)
    assert handle.asked == ATTEMPTS
    assert np.array_equal(frames, pipe(**asked(3), output_type="uint8").frames[0])
    assert about == {"device": "there"}
    with pytest.raises(RunError, match=r"3 replicas ended while they made the clip \(the actor died\)"):
        Replicas(Handle(maker, ATTEMPTS), SETTINGS, (Died,)).make(Request.of("x", seed=1), lambda: None)


def test_a_cancelled_clip_is_waited_for_no_longer():
    handle, job = Handle(None), ClipJob(Request.of("x"))
    job.stop.set()
    with pytest.raises(Cancelled):
        Replicas(handle, SETTINGS, (Died,)).make(Request.of("x", seed=1), job.check_stop)
    assert handle.cancelled == 1


def test_the_results_are_those_of_a_single_process(pipe, maker, tmp_path):
    requests = [Request.of(**asked(seed)) for seed in range(4)]
    handle = Handle(maker, deaths=2)
    there = made(pipe, tmp_path / "there", requests, Replicas(handle, SETTINGS, (Died,)))
    here = made(pipe, tmp_path / "here", requests)
    assert {seed: file for seed, (file, _) in there.items()} == {seed: file for seed, (file, _) in here.items()}
    assert {record["device"] for _, record in there.values()} == {"there"}
    drawn = made(pipe, tmp_path / "drawn", [Request.of("x", num_frames=1)], Replicas(Handle(maker, 1), SETTINGS, (Died,)))
    ((seed, (file, _)),) = drawn.items()  # a seed that is drawn is drawn once, also if the replica dies
    again = made(pipe, tmp_path / "again", [Request.of("x", num_frames=1, seed=seed)])
    assert again[seed][0] == file


# ---- settings


def test_settings_become_those_of_ray_serve():
    assert ReplicaSettings(3).options() == {"num_replicas": 3}
    scaled = ReplicaSettings(3, autoscaling={"min_replicas": 2, "target_ongoing_requests": 1.5})
    assert scaled.options() == {"autoscaling_config": {"min_replicas": 2, "target_ongoing_requests": 1.5, "max_replicas": 3}}
    assert SETTINGS.at_once == 6
    assert numbers(["min_replicas=2", "upscale_delay_s=0.5"]) == {"min_replicas": 2, "upscale_delay_s": 0.5}


def test_no_more_replicas_than_cores(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0})
    ReplicaSettings(2).check(ray)
    with pytest.raises(UserError, match="--replicas 3 needs as many CPU cores, and Ray has 2 here; give at most 2"):
        ReplicaSettings(3).check(ray)
    ReplicaSettings(3, autoscaling={}).check(ray)
    ReplicaSettings(1, threads=2).check(ray)
    for wrong, message in ((ReplicaSettings(2, threads=2), "needs 4 CPU cores with --threads 2, .*; give at most 1"),
                           (ReplicaSettings(1, threads=3, autoscaling={}), "--threads 3 needs as many CPU cores")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            wrong.check(ray)
    monkeypatch.setenv("RAY_ADDRESS", "cluster")
    ReplicaSettings(3).check(ray)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "2"], "--batch-size has no effect without --replicas"),
        (["--autoscaling", "min_replicas=1"], "--autoscaling has no effect without --replicas"),
        (["--replicas", "0"], "--replicas 0 is not allowed; give at least 1"),
        (["--replicas", "2", "--batch-size", "0"], "--batch-size 0 is not allowed"),
        (["--replicas", "2", "--batch-wait", "-1"], "--batch-wait -1.0 is not allowed"),
        (["--replicas", "2", "--device", "mps"], "device 'mps' is not allowed with --replicas"),
        (["--replicas", "2", "--autoscaling", "min_replicas"], "'min_replicas' is not allowed; give NAME=NUMBER"),
        (["--replicas", "2", "--autoscaling", "max_replicas=3"], "max_replicas is what --replicas says"),
    ],
)
def test_options_that_are_refused(monkeypatch, capsys, tmp_path, words, message):
    pytest.importorskip("fastapi")
    monkeypatch.setattr("lumos.demo.replicas.import_serve", lambda: None)
    assert main(["serve", *words, "--root", str(tmp_path / "root")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


def test_without_ray_serve_one_line_says_what_to_install(monkeypatch, capsys):
    pytest.importorskip("fastapi")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--replicas", "2"]) == 2
    assert "pip install 'lumos-video[replicas]'" in capsys.readouterr().err


def test_settings_that_ray_serve_takes_and_refuses():
    serve = pytest.importorskip("ray.serve", exc_type=ImportError)

    def config(**autoscaling):
        app = deployment(serve, lambda: None, ReplicaSettings(3, batch_size=5, autoscaling=autoscaling, threads=2), 1)
        return app._bound_deployment

    made = config(min_replicas=2, target_ongoing_requests=1.5)
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 3, 1.5)
    assert made.max_ongoing_requests == 5
    assert {name: made.ray_actor_options[name] for name in ("num_cpus", "num_gpus")} == {"num_cpus": 2, "num_gpus": 1}
    unknown = "--autoscaling 'odd' is unknown; known are min_replicas"
    for wrong, message in (({"min_replicas": 5}, "min_replicas"), ({"odd": 1}, unknown)):
        with pytest.raises(UserError, match=message):
            config(**wrong)
