"""Settings that make a run faster on a GPU and must not change its losses: padding, attention, compiled parts."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from run_log import read_log
from safetensors.torch import load_file

from lumos import LumosPipeline
from lumos.data.curriculum import StepShape
from lumos.errors import UserError
from lumos.models.lumos1 import training as ardf
from lumos.models.lumos1.training import ArdfTask
from lumos.pipeline.acceleration import compile_parts
from lumos.training.loop import train

CPU = torch.device("cpu")
STAGES = {"stages": [{"steps": 2, "image_share": 1.0, "image_batch_size": 6}, {"image_share": 0.5}]}
KEYS = ("loss", "grad_norm", "frame_loss_video", "mask_ratio_loss_video", "val_loss_video", "val_loss_image")


@pytest.fixture
def eager(monkeypatch):
    """Let torch.compile trace but generate no code, because a compiler takes long."""
    monkeypatch.setattr(ardf, "compile_parts", functools.partial(compile_parts, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plain_run(settings_in, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    train(settings_in(folder, data=STAGES, training={"eval_every": 3}))
    return folder


def assert_close(folder: Path, plain: Path) -> None:
    for key in KEYS:
        ours, theirs = read_log(folder, key), read_log(plain, key)
        assert sorted(ours) == sorted(theirs)
        for step, value in theirs.items():
            assert ours[step] == pytest.approx(value, abs=1e-4), (key, step)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "training"), [
    ({"pad_to": 16}, {}), ({"pad_to": 16}, {"micro_batch_size": 3}), ({}, {"attention": "dense"}),
    ({"pad_to": 8}, {"attention": "dense", "micro_batch_size": 1, "activation_checkpointing": True}),
])  # fmt: skip
def test_padding_and_attention_do_not_change_losses(micro_settings, plain_run: Path, data: dict, training: dict):
    settings = micro_settings(data=STAGES | data, training={"eval_every": 3, **training})
    assert_close(train_folder(settings), plain_run)


def train_folder(settings) -> Path:
    train(settings)
    return settings.output_dir


def test_rows_are_padded_to_the_multiple_and_hold_the_same(micro_settings):
    shape = StepShape("video", 4)
    plain, padded = (ArdfTask(micro_settings(data={"pad_to": pad_to}), CPU).batch(0, shape, range(4)) for pad_to in (1, 32))
    for micro in (padded.tensors, *padded.micro_batches(3)):
        assert micro["input_ids"].shape[1] % 32 == micro["targets"].shape[1] % 32 == 0
    assert (padded.lengths, padded.rows, padded.flops) == (plain.lengths, plain.rows, plain.flops)
    length = plain.tensors["input_ids"].shape[1]
    for name, nothing in (("input_ids", 0), ("targets", -100)):
        assert torch.equal(padded.tensors[name][:, :length], plain.tensors[name])
        assert (padded.tensors[name][:, length:] == nothing).all()


@pytest.mark.slow
def test_attention_is_of_the_run_not_of_the_model(micro_settings):
    """A checkpoint can be resumed with another attention, and the export has the attention of its config."""
    train(micro_settings(training={"max_steps": 2, "attention": "dense"}))
    folder = Path(train(micro_settings(training={"max_steps": 3}))["export"])
    assert LumosPipeline.from_pretrained(folder).model.config.attention == "segmented"


def test_flex_is_for_cuda(micro_settings):
    with pytest.raises(UserError, match=r"attention flex trains on CUDA only, not on cpu; set training\.attention=segmented"):
        train(micro_settings(training={"attention": "flex"}))
    settings = micro_settings()
    settings.model.overrides = {**settings.model.overrides, "attention": "flex"}
    with pytest.raises(UserError, match="flex trains on CUDA only"):
        train(settings)
    settings.training.attention = "segmented"
    ArdfTask(settings, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("training", [
    {}, {"activation_checkpointing": True, "attention": "dense"},
    pytest.param({"activation_checkpointing": True}, marks=pytest.mark.thorough),
])  # fmt: skip
def test_compiled_parts(micro_settings, plain_run: Path, eager, training: dict):
    assert_close(train_folder(micro_settings(data=STAGES, training={"eval_every": 3, "compile": True, **training})), plain_run)


@pytest.mark.slow
def test_a_compiled_run_has_the_names_of_any_other(micro_settings, tmp_path: Path, eager):
    """A run can be resumed with and without compiled parts, and its export is a model folder."""
    compiled = {"compile": True, "save_every_steps": 2, "ema_decay": 0.9, "schedule": "constant"}
    train(micro_settings(training={**compiled, "max_steps": 6, "output_dir": str(tmp_path / "whole")}))
    train(micro_settings(training={**compiled, "max_steps": 4}))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(micro_settings(training={**compiled, "max_steps": 6}))
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    train(micro_settings(training={**compiled, "compile": False, "max_steps": 6, "output_dir": str(tmp_path / "other")}))
    assert read_log(tmp_path / "other") == pytest.approx(read_log(tmp_path / "whole"), abs=1e-4)
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("run", "other"))
    assert ours.keys() == theirs.keys()
    LumosPipeline.from_pretrained(tmp_path / "run" / "export")


@pytest.mark.slow
def test_compiled_parts_with_adapters(micro_settings, tmp_path: Path, eager):
    base = train(micro_settings(training={"max_steps": 1, "output_dir": str(tmp_path / "base")}))["export"]
    sections = {"model": {"from": base}, "tokenizer": {"video": None, "text": None}, "lora": {"rank": 2}}
    folders = [
        train_folder(micro_settings(**sections, training={"compile": c, "max_steps": 3, "output_dir": str(tmp_path / str(c))}))
        for c in (False, True)
    ]
    plain, compiled = (read_log(folder) for folder in folders)
    assert compiled == pytest.approx(plain, abs=1e-4)
    ours, theirs = (load_file(folder / "export" / "adapter_model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()


def test_without_a_compiler(micro_settings, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no C++ compiler")))
    with pytest.raises(UserError, match=r"torch\.compile does not work here \(no C\+\+ compiler\); leave compile out"):
        train(micro_settings(training={"compile": True}))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_code_that_a_compiler_made(micro_settings, tmp_path: Path):
    losses = {}
    for compiled in (False, True):
        training = {"compile": compiled, "max_steps": 2, "output_dir": str(tmp_path / str(compiled))}
        losses[compiled] = read_log(train_folder(micro_settings(training=training)))
    torch._dynamo.reset()
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
