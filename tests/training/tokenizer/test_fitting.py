"""The fit of a tokenizer for twice the size has the least squared error, and changes no other weight."""

from __future__ import annotations

import json
import signal

import pytest
import small_training
import torch
from torch import Tensor

from lumos.errors import UserError
from lumos.training.loop import Run
from lumos.training.tokenizer.clips import TrainingClips
from lumos.training.tokenizer.fitting import DifferenceFit
from lumos.training.tokenizer.settings import TokenizerTrainingSettings
from lumos.training.tokenizer.task import foreground_weight, train
from tokenizer import VideoTokenizer, VideoTokenizerConfig
from tokenizer.resizing import BANDS, double, halve, same_codes

MODEL = small_training.MODEL | {"pointwise_ends": True}
WIDE = MODEL | {"spatial_patch_size": 2, "spatial_compression": 16, "resolution": 2048}
CLIPS = {"height": 32, "width": 32, "num_frames": 5, "batch_size": 3, "pictures_per_batch": 2, "share_worlds": 1.0, "seed": 4}


@pytest.fixture(scope="module")
def start() -> VideoTokenizer:
    torch.manual_seed(0)
    model = VideoTokenizer(VideoTokenizerConfig.from_dict(MODEL)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.conv_out.conv3d.weight, std=0.05)
    return model


def settings(output_dir, folder, **changes) -> TokenizerTrainingSettings:
    values = {"output_dir": str(output_dir), "model": WIDE, "start_from": str(folder), "train_encoder": False, "fit_batches": 4}
    return TokenizerTrainingSettings.from_dict(
        CLIPS | values | {"steps": 0, "export_dtype": "float32", "validation_clips": 2} | changes
    )


@pytest.mark.slow
def test_the_fit_minimizes_the_weighted_pixel_error(start):
    """The weighted squared error of decoded pixels rises from the fit in whatever direction, for clips and pictures."""
    model = double(start)
    fit = DifferenceFit(model)
    seen = []
    for number in range(3):
        for video, is_world in TrainingClips(**CLIPS, film_sources=()).batch(number).videos("cpu"):
            weights = foreground_weight(video, is_world, 5.0)
            of_patch = torch.nn.functional.avg_pool3d(weights[:, :, 1:], (4, 8, 8)) if video.shape[2] > 1 else weights[:, :, :0]
            of_first = torch.nn.functional.avg_pool3d(weights[:, :, :1], (1, 8, 8)).repeat_interleave(8, 3).repeat_interleave(8, 4)
            spread = of_patch.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
            seen.append((video, torch.cat([of_first, spread.view(len(video), 1, -1, *video.shape[3:])], dim=2)))
            fit.add(video, weights)
    fit.solve()

    def error() -> Tensor:
        shown = (model.decode(model.encode(video)).double() for video, _ in seen)
        return sum((weights * (mine - video).square()).sum() for mine, (video, weights) in zip(shown, seen, strict=True))

    layer = model.decoder.conv_out.conv3d.requires_grad_(True)
    gradients = torch.autograd.grad(error(), list(layer.parameters()))
    least = float(error().detach())
    for gradient in gradients:
        bands = gradient.unflatten(0, (64, BANDS, 3))
        assert bands[:, 1:].abs().max() < 1e-3 * bands[:, :1].abs().max()
    torch.manual_seed(1)
    for _ in range(3):
        with torch.no_grad():
            step = 1e-2 * torch.randn_like(layer.weight).unflatten(0, (64, BANDS, 3))
            step[:, :1] = 0
            layer.weight += step.flatten(0, 2)
            assert float(error()) > least
            layer.weight -= step.flatten(0, 2)


def test_the_weight_of_pictures_changes_a_fit(start):
    found = []
    for weight in (0.0, 1e-3, 1e3):
        fit = DifferenceFit(model := double(start))
        clips, pictures = TrainingClips(**CLIPS, film_sources=()).batch(0).videos("cpu")
        for (video, is_world), share in ((clips, 1.0), (pictures, weight)):
            fit.add(video, share * foreground_weight(video, is_world, 5.0))
        fit.solve()
        found.append(model.decoder.conv_out.conv3d.weight.clone())
    change = [float((weight - found[0]).norm() / found[0].norm()) for weight in found[1:]]
    assert change[0] < 0.1 < change[1]


@pytest.mark.slow
def test_a_fit_changes_the_differences_alone(start, tmp_path):
    start.save_pretrained(tmp_path / "start")
    assert train(settings(tmp_path / "wide", tmp_path / "start"))["steps"] == 0
    found = VideoTokenizer.from_pretrained(tmp_path / "wide")
    assert found.decoder.conv_out.conv3d.weight.unflatten(0, (64, BANDS, 3))[:, 1:].abs().max() > 1e-3
    assert same_codes(start, found)
    for name, weight in halve(found).state_dict().items():
        assert torch.equal(weight, start.state_dict()[name]), name


@pytest.mark.slow
def test_steps_after_a_fit_use_new_clips_and_can_resume(start, tmp_path, monkeypatch):
    start.save_pretrained(tmp_path / "start")
    more = {"steps": 4, "warmup_steps": 1, "ema_decay": 0.5}
    train(settings(tmp_path / "whole", tmp_path / "start", **more))
    seen, draw, step = [], TrainingClips.batch, Run._train_step
    monkeypatch.setattr(TrainingClips, "batch", lambda clips, number, *at: seen.append(number) or draw(clips, number, *at))

    def stop_in_two(run, *args):
        if run.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(run, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_train_step", stop_in_two)
        stopped = train(settings(tmp_path / "parts", tmp_path / "start", **more))
    assert (stopped["steps"], stopped["stopped_by"], stopped["export"]) == (3, "SIGTERM", None)
    assert train(settings(tmp_path / "parts", tmp_path / "start", **more))["steps"] == 4
    assert seen == [4, 5, 6, 7, 0, 1, 2, 3]
    whole, parts = (VideoTokenizer.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


@pytest.mark.slow
def test_the_time_of_a_fit_is_not_that_of_its_steps(start, tmp_path, monkeypatch):
    """max_minutes counts the steps only: a long fit before them does not shorten their warm-up."""
    start.save_pretrained(tmp_path / "start")
    clock, add = [0.0], DifferenceFit.add
    monkeypatch.setattr("lumos.training.loop.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(DifferenceFit, "add", lambda *given: (clock.append(clock.pop() + 600.0), add(*given)))
    done = train(settings(tmp_path / "wide", tmp_path / "start", steps=3, warmup_steps=1, max_minutes=5.0))
    record = json.loads((tmp_path / "wide" / "video_tokenizer" / "training.json").read_text())
    assert (done["steps"], record["metrics"]["minutes"]) == (3, 80.0)


@pytest.mark.slow
def test_only_a_finished_fit_is_kept_and_it_is_not_repeated(start, tmp_path, monkeypatch):
    start.save_pretrained(tmp_path / "start")
    add = DifferenceFit.add

    def stopped(*given):
        signal.raise_signal(signal.SIGTERM)
        add(*given)

    with monkeypatch.context() as patched:
        patched.setattr(DifferenceFit, "add", stopped)
        stopped = train(settings(tmp_path / "wide", tmp_path / "start"))
    assert (stopped["steps"], stopped["stopped_by"], stopped["checkpoint"], stopped["export"]) == (0, "SIGTERM", None, None)
    assert not (tmp_path / "wide" / "checkpoints").exists()
    assert not (tmp_path / "wide" / "video_tokenizer").exists()
    first = train(settings(tmp_path / "wide", tmp_path / "start"))
    monkeypatch.setattr(DifferenceFit, "add", None)
    again = train(settings(tmp_path / "wide", tmp_path / "start"))
    assert first["psnr_worlds"] == again["psnr_worlds"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": None, "train_encoder": True}, "fit_batches 4 is not possible: allowed is 0 without start_from"),
        ({"model": MODEL}, "allowed is 0 without start_from, model.spatial_patch_size=2, model.pointwise_ends=true and"),
        ({"model": WIDE | {"patch_method": "rearrange"}}, "allowed is 0 without .*patch_method=haar"),
        ({"max_minutes": 1.0}, "max_minutes 1.0 is not possible: allowed is null with steps 0"),
        ({"model": WIDE | {"pointwise_ends": False}}, "allowed is 0 without start_from"),
        ({"fit_batches": -1}, "fit_batches is -1; it must be between 0 and 1000000"),
        ({"fit_batches": 0}, "steps 0 is not possible: allowed is 1 or more, or 0 with fit_batches"),
    ],
)
def test_invalid_fits_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        settings(tmp_path, tmp_path, **changes)
