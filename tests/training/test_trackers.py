"""TensorBoard itself; stand-ins for Weights & Biases and trackio, and W&B itself if it is installed."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from PIL import Image
from run_log import read_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lumos.cli import main
from lumos.errors import UserError
from lumos.training.loop import Run, train
from lumos.training.trackers import check_installed

SAMPLES = {"every": 3, "prompts": ["a red circle"], "options": {"num_inference_steps": 1}}
TAG = "samples/00-a-red-circle"


class Killed(Exception):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Run._report

    def killed(run: Run) -> None:
        original(run)
        if run.step == step:
            raise Killed

    monkeypatch.setattr(Run, "_report", killed)


def trained_with_a_break(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is killed after step 5, two steps after its checkpoint, and then finished."""
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            train(settings)
    train(settings)


@pytest.mark.slow
def test_tensorboard_shows_the_log_and_the_samples(micro_settings, tmp_path: Path, monkeypatch):
    settings = micro_settings(
        training={"eval_every": 3, "save_every_steps": 3}, logging={"to": ["tensorboard"]}, samples=SAMPLES
    )
    trained_with_a_break(settings, monkeypatch)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for tag, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("val/loss_video", "val_loss_video")):
        logged = read_log(tmp_path / "run", key)
        assert [(event.step, event.value) for event in board.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in logged.items()
        ]
    frame_losses = read_log(tmp_path / "run", "frame_loss_video")
    assert [event.value for event in board.Scalars("train/frame_loss_video/1")] == pytest.approx(
        [value[1] for value in frame_losses.values()]
    )
    clips = board.Images(TAG)
    assert [clip.step for clip in clips] == [3, 6]
    moving = Image.open(io.BytesIO(clips[-1].encoded_image_string))
    assert (moving.format, moving.n_frames, moving.size) == ("GIF", 5, (32, 32))
    assert not (tmp_path / "run" / "run_id").exists()


def tracker(name: str) -> ModuleType:
    """A module with the functions of wandb and trackio, which records its calls."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.told, module.runs = [], []
    module.init = lambda **options: module.runs.append(SimpleNamespace(**options))
    module.log = lambda values, step: module.told.append((step, values))
    module.finish = lambda: module.told.append("finish")
    module.Video = lambda path, format: SimpleNamespace(path=Path(path), format=format)
    module.Image = lambda path: SimpleNamespace(path=Path(path), format="png")
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_told_everything_under_one_id(micro_settings, tmp_path: Path, monkeypatch, name: str):
    module = tracker(name)
    monkeypatch.setitem(sys.modules, name, module)
    settings = micro_settings(
        training={"save_every_steps": 3}, logging={"to": [name], "project": "shapes"}, samples=SAMPLES
    )
    trained_with_a_break(settings, monkeypatch)
    first, second = module.runs
    assert first == second
    assert (first.project, first.resume, first.config) == ("shapes", "allow", settings.to_dict())
    assert first.name == f"train-{(tmp_path / 'run' / 'run_id').read_text()}"
    assert hasattr(first, "id") == (name == "wandb")
    assert module.told.count("finish") == 2
    told = [line for line in module.told if line != "finish"]
    losses = [(step, values["train/loss"]) for step, values in told if "train/loss" in values]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 4, 5, 6]
    assert dict(losses) == read_log(tmp_path / "run")
    clips = [(step, values[TAG]) for step, values in told if TAG in values]
    assert [(step, clip.format, clip.path.is_file()) for step, clip in clips] == [(3, "mp4", True), (6, "mp4", True)]


def test_a_tracker_that_cannot_start_is_one_line(micro_settings, monkeypatch):
    module = tracker("wandb")
    module.init = lambda **options: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"wandb of logging\.to cannot start: division by zero; log in, set WANDB_MODE=offline"):
        train(micro_settings(logging={"to": ["wandb"]}))


def test_another_folder_has_another_id(micro_settings, tmp_path: Path, monkeypatch):
    module = tracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for folder in ("a", "b"):
        train(micro_settings(training={"max_steps": 1, "output_dir": str(tmp_path / folder)}, logging={"to": ["wandb"]}))
    assert len({run.id for run in module.runs}) == 2


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(micro_settings, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(micro_settings(training={"max_steps": 3}, logging={"to": ["wandb"]}, samples=SAMPLES))
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0
    assert list((run / "files" / "media" / "videos").rglob("*.mp4"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_what_is_not_installed_is_named_with_its_extra(micro_settings, tmp_path: Path, monkeypatch, capsys, name: str):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *more: None if wanted == name else find(wanted, *more))
    check_installed([])
    with pytest.raises(UserError, match=rf"logging\.to names {name}.*pip install 'lumos-video\[{name}\]'"):
        check_installed([name])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(micro_settings(logging={"to": [name]}).to_dict()))
    assert main(["train", "--config", str(config)]) == 2
    assert capsys.readouterr().err.startswith(f"error: logging.to names {name}")
    assert not (tmp_path / "run").exists()


def test_each_extra_named_in_the_error_exists():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name in ("tensorboard", "wandb", "trackio", "plot"):
        assert project["optional-dependencies"][name]


def test_lines_without_numbers_reach_no_writer(micro_settings, tmp_path: Path, monkeypatch):
    module = tracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    train(micro_settings(training={"max_steps": 1}, logging={"to": ["trackio"]}))
    ((_, values), finish) = module.told
    assert finish == "finish"
    assert all(isinstance(value, (int, float)) for value in values.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line.get("event") for line in lines] == ["start", None, "end"]
