"""Samples of a run: their content, and no effect on the training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_log import read_log
from safetensors.torch import load_file

from lumos import LumosPipeline
from lumos.errors import UserError
from lumos.models.lumos1.training import ArdfTask
from lumos.training import samples
from lumos.training.logging import RunLog
from lumos.training.loop import train
from lumos.training.samples import Sampler, render
from lumos.training.sections import SampleSettings
from lumos.video.io import read_video

PROMPTS = ["a red circle moves left", "a blue square"]
SAMPLES = {"every": 3, "prompts": PROMPTS, "seed": 5, "options": {"num_inference_steps": 2, "guidance_scale": 3.0}}
NAMES = ["00-a-red-circle-moves-left.mp4", "01-a-blue-square.mp4", "samples.json", "sheet.png"]


@pytest.fixture
def shown(monkeypatch) -> list[tuple[int, str, Path, np.ndarray, float]]:
    """Collect everything that is sent to the dashboards of a run."""
    found = []
    monkeypatch.setattr(RunLog, "clip", lambda self, *clip: found.append(clip))
    return found


def events(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == "samples"]


@pytest.mark.slow
def test_a_run_draws_what_its_averaged_weights_can_draw(micro_settings, tmp_path: Path, shown):
    summary = train(micro_settings(training={"ema_decay": 0.9}, samples=SAMPLES))
    folder = tmp_path / "run" / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000006"]
    for step in folder.iterdir():
        assert sorted(p.name for p in step.iterdir()) == NAMES
        assert read_video(step / NAMES[0])[0].shape == (5, 32, 32, 3)
        Image.open(step / NAMES[-1]).verify()
    pipe = LumosPipeline.from_pretrained(summary["export"])  # written after step 6, with the averaged weights
    last = {name: (path, frames, fps) for step, name, path, frames, fps in shown if step == 6}
    for seed, prompt in enumerate(PROMPTS, 5):
        path, frames, fps = last[f"samples/{Path(NAMES[seed - 5]).stem}"]
        assert (path, fps) == (folder / "step-00000006" / NAMES[seed - 5], 8)
        assert np.array_equal(frames, pipe(prompt, seed=seed, output_type="uint8", **SAMPLES["options"]).frames[0])
    record = json.loads((folder / "step-00000006" / "samples.json").read_text())
    assert [(c["prompt"], c["seed"], c["file"]) for c in record["clips"]] == [(PROMPTS[i], 5 + i, NAMES[i]) for i in (0, 1)]
    assert (record["step"], record["averaged"], record["left_out"]) == (6, True, [])
    assert (record["settings"]["num_inference_steps"], record["settings"]["height"]) == (2, 32)
    assert [event["clips"] for event in events(tmp_path / "run")] == [2, 2]


@pytest.mark.slow
def test_samples_do_not_change_the_training(micro_settings, tmp_path: Path):
    common = {"ema_decay": 0.9, "eval_every": 2}
    train(micro_settings(data={"workers": 1}, training=common))
    output = {"output_dir": str(tmp_path / "seen")}
    train(micro_settings(data={"workers": 1}, training=common | output, samples={**SAMPLES, "every": 1}))
    assert len(events(tmp_path / "seen")) == 6
    for key in ("loss", "grad_norm", "lr", "frame_loss_video", "val_loss_video", "val_loss_video_ema"):
        assert read_log(tmp_path / "run", key) == read_log(tmp_path / "seen", key)
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("run", "seen"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def draw_at_random(prompt: str, seed: int, on_step) -> np.ndarray:
    """A sampler that uses every global random generator."""
    torch.rand(3), random.random()
    return np.random.randint(0, 256, (5, 16, 16, 3)).astype(np.uint8)


def rendered(folder: Path, draw=draw_at_random, stop=lambda: False, **options) -> tuple[RunLog, Path]:
    log = RunLog(folder, first_step=7, max_steps=9, enabled=True)
    settings = SampleSettings(**{"every": 1, "prompts": PROMPTS, **options})
    target = folder / "samples" / "step-00000007"
    render(settings, lambda: Sampler(draw, 8, {}), target, step=7, log=log, stop=stop, facts={})
    log.close()
    return log, target


def test_the_random_states_are_put_back(tmp_path: Path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    _, folder = rendered(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == NAMES
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_what_is_not_done_in_time_is_left_out(tmp_path: Path, monkeypatch, caplog):
    """Clips have two steps of 30 s each, on a clock that only moves there."""
    clock = [0.0]

    def draw(prompt: str, seed: int, on_step) -> np.ndarray:
        for _ in range(2):
            clock[0] += 30
            on_step(0, 1, 0, 2)
        return draw_at_random(prompt, seed, on_step)

    monkeypatch.setattr(samples.time, "monotonic", lambda: clock[0])
    for seconds, done in ((100, NAMES[:1] + NAMES[2:]), (10, ["samples.json"])):
        clock[0] = 0.0
        _, folder = rendered(tmp_path, draw, max_seconds=seconds)
        assert sorted(p.name for p in folder.iterdir()) == done
        assert clock[0] <= seconds + 30
        left_out = json.loads((folder / "samples.json").read_text())["left_out"]
        assert left_out == PROMPTS[len(done) // 3 :]
        assert f"{2 - len(left_out)} of 2 samples of step 7 were finished" in caplog.text
    assert [event["clips"] for event in events(tmp_path)] == [1, 0]


def test_a_run_told_to_stop_does_not_go_on_rendering(tmp_path: Path):
    _, folder = rendered(tmp_path, stop=lambda: True)
    assert sorted(p.name for p in folder.iterdir()) == ["samples.json"]


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("too long"), torch.OutOfMemoryError("CUDA")])
def test_samples_that_fail_do_not_end_the_training(micro_settings, tmp_path: Path, monkeypatch, caplog, error: Exception):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(samples, "write_video", fail)
    assert train(micro_settings(samples=SAMPLES))["steps"] == 6
    assert len(read_log(tmp_path / "run")) == 6
    said = caplog.text
    assert said.count("there are no samples of step") == 2
    assert str(error).split()[-1] in said
    assert [sorted(event) for event in events(tmp_path / "run")] == [["error", "event", "step"]] * 2
    assert list((tmp_path / "run" / "samples").iterdir()) == []


def test_samples_of_the_same_step_are_replaced(tmp_path: Path):
    _, folder = rendered(tmp_path)
    (folder / "old").touch()
    rendered(tmp_path, prompts=PROMPTS[:1])
    assert sorted(p.name for p in folder.iterdir()) == NAMES[:1] + NAMES[2:]


def test_a_run_of_pictures_draws_pictures(micro_settings, tmp_path: Path):
    train(micro_settings(data={"stages": [{"image_share": 1.0}]}, training={"max_steps": 1}, samples={**SAMPLES, "every": 1}))
    folder = tmp_path / "run" / "samples" / "step-00000001"
    assert sorted(p.name for p in folder.iterdir()) == [name.replace(".mp4", ".png") for name in NAMES]
    assert Image.open(folder / "01-a-blue-square.png").size == (32, 32)


def test_a_prompt_that_cannot_be_read_is_refused_before_the_run(micro_settings):
    settings = micro_settings(samples={**SAMPLES, "prompts": ["a red circle " * 200]})
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens; this model reads at most"):
        ArdfTask(settings, torch.device("cpu"))
