"""Trainings of a tokenizer that start from another one: of the same size, of half the size, or with its encoder frozen."""

from __future__ import annotations

import pytest
import torch
from small_training import MODEL, small, stop_in_step, stopped_after

from lumos.data.curriculum import StepShape
from lumos.errors import UserError
from lumos.training.tokenizer.settings import loop_settings
from lumos.training.tokenizer.task import TokenizerTask, train
from tokenizer import VideoTokenizer
from tokenizer.resizing import double, same_codes


@pytest.mark.slow
def test_a_run_starts_from_another_one(tmp_path):
    """The run begins with the quality of that tokenizer and trains all weights; another shape is refused."""
    first = train(small(tmp_path / "first", steps=12, export_dtype="float32"))
    folder = tmp_path / "first" / "video_tokenizer"
    again = {"start_from": str(folder), "steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "export_dtype": "float32"}
    second = train(small(tmp_path / "second", lr=1e-9, min_lr=0.0, **again))
    assert second["psnr_worlds"] == pytest.approx(first["psnr_worlds"], abs=1e-3)
    train(small(tmp_path / "third", lr=1e-3, **again))
    before, after = (
        VideoTokenizer.from_pretrained(tmp_path / name / "video_tokenizer").state_dict() for name in ("first", "third")
    )
    model = VideoTokenizer.from_pretrained(folder).train().requires_grad_(True)
    task = TokenizerTask(loop_settings(small(tmp_path)), torch.device("cpu"))
    task.losses(model, task.batch(0, StepShape("video", 3), range(3)).whole)[0].sum().backward()
    # What attention asks with has no gradient where there is but one key, nor has what is the same for all keys.
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None and "attn" not in name}
    assert len(used) > 30
    assert {name for name in used if torch.equal(before[name], after[name])} == set()
    other = {**again, "model": MODEL | {"channels": 16}}
    with pytest.raises(UserError, match=r"start_from .* has another config than model: channels 8 there, 16 here"):
        train(small(tmp_path / "fourth", **other))
    with pytest.raises(UserError, match="start_from nowhere cannot be read"):
        train(small(tmp_path / "fifth", **{**again, "start_from": "nowhere"}))


@pytest.mark.slow
def test_doubled_size_learns_sharpness_and_keeps_the_codes(tmp_path, monkeypatch):
    """The run starts from a tokenizer of half the size; a run that was stopped in between ends with the same weights."""
    model = MODEL | {"pointwise_ends": True}
    train(small(tmp_path / "first", steps=20, export_dtype="float32", model=model))
    start = VideoTokenizer.from_pretrained(tmp_path / "first")
    wide = {
        "model": model | {"spatial_patch_size": 2, "spatial_compression": 16, "resolution": 2048},
        "start_from": str(tmp_path / "first" / "video_tokenizer"),
        "train_encoder": False,
        "height": 32,
        "width": 32,
        "steps": 16,
        "ema_decay": 0.5,
        "export_dtype": "float32",
    }
    trained = train(small(tmp_path / "wide", **wide))
    before = TokenizerTask(loop_settings(small(tmp_path / "wide", **wide)), torch.device("cpu")).measure(double(start)).values
    assert trained["psnr_worlds"] > before["psnr_worlds"] + 0.1
    found = VideoTokenizer.from_pretrained(tmp_path / "wide")
    assert same_codes(start, found)
    assert found.decoder.conv_out.conv3d.weight.unflatten(0, (64, 4, 3))[:, 1:].abs().max() > 1e-3

    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        assert stopped_after(train(small(tmp_path / "again", **wide))) == 7
    train(small(tmp_path / "again", **wide))
    again = VideoTokenizer.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in found.state_dict().items())


@pytest.mark.slow
def test_a_frozen_encoder_must_exist_and_have_no_dropout(tmp_path):
    train(small(tmp_path / "first", steps=2, model=MODEL | {"dropout": 0.1}))
    start = {"start_from": str(tmp_path / "first" / "video_tokenizer"), "model": MODEL | {"dropout": 0.1}}
    with pytest.raises(UserError, match=r"model.dropout 0.1 is not possible with train_encoder=false"):
        train(small(tmp_path / "second", train_encoder=False, **start))
    assert train(small(tmp_path / "second", train_encoder=False, **(start | {"model": MODEL})))["export"]
    assert same_codes(*(VideoTokenizer.from_pretrained(tmp_path / name / "video_tokenizer") for name in ("first", "second")))
    with pytest.raises(UserError, match="train_encoder False is not possible: allowed is true without start_from"):
        small(tmp_path, train_encoder=False)
