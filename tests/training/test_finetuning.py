"""Settings that a fine-tuning takes over from a model's earlier training, and training on clips and scenes in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")

from lumos import registry
from lumos.compression.auto import recovery_settings
from lumos.compression.networks import network_of
from lumos.data.curriculum import Curriculum
from lumos.errors import UserError
from lumos.models.lumos1.training import ArdfTask
from lumos.pipeline.defaults import ClipDefaults
from lumos.training.finetuning import clip_size, finetune_settings, own_data, stages, usual_lr
from lumos.training.record import training_record
from lumos.training.settings import build_settings

CLIP = ClipDefaults(17, 128, 128, 8, None)


def record(**data) -> dict:
    return {"settings": {"data": data, "training": {"activation_checkpointing": True}}}


def settings_of(name: str, before: dict, lora: bool = False) -> dict:
    return finetune_settings(
        registry.generator(name), "checkpoints/lumos-tiny", CLIP, before, shards=Path("out/shards"), out=Path("out"), steps=100,
        lora=lora, replay=0.5, parameters=13_600_000, dtype="F16",
    )  # fmt: skip


def test_own_data_are_those_of_the_record(tmp_path):
    assert own_data({}) == ([], [])
    assert own_data(record(source="films")) == ([], ["the source films"])
    scenes = {"source": "worlds", "options": {"kinds": ["digits"]}}
    assert own_data(record(**scenes, path=None)) == ([{"share": 1.0, **scenes}], [])
    here, gone = {"source": "shards", "path": str(tmp_path)}, {"source": "shards", "path": str(tmp_path / "gone")}
    assert own_data(record(**here, options={})) == ([{"share": 1.0, **here}], [])
    assert own_data(record(**gone, options={})) == ([], [gone["path"]])
    earlier = [{"share": 0.4, "path": None, **scenes}]
    both, _ = own_data(record(**here, options={}, replay=earlier))
    assert both == [{"share": 0.6, **here}, {"share": 0.4, **scenes}]
    assert own_data(record(**gone, options={}, replay=earlier)) == ([{"share": 1.0, **scenes}], [gone["path"]])


def test_settings_of_a_model_like_its_own_training():
    last = {"steps": 5, "image_share": 0.25, "batch_size": 512, "image_batch_size": 512, "first_frames": 5, "short_share": 0.6}
    before = record(source="worlds", options={"share_two": 0.5}, stages=[{"steps": 9}, last])
    before["settings"] |= {"masking": {"min_ratio": 0.4}, "generation": {"temperature": 2.0}, "name": "x", "samples": {"every": 1}}
    found = settings_of("lumos1", before)
    assert found["masking"] == {"min_ratio": 0.4}
    assert found["data"]["stages"] == [{"image_share": 0.25, "first_frames": 5, "short_share": 0.6}]
    assert found["data"]["replay"] == [{"share": 0.5, "source": "worlds", "options": {"share_two": 0.5}}]
    assert found.keys() == {"generator", "name", "model", "data", "masking", "training"}
    assert found["training"]["export_dtype"] == "float16"
    assert found["training"]["activation_checkpointing"] is True
    assert build_settings(found).training.lr == 4e-4
    assert settings_of("lumos1", before, lora=True)["training"]["lr"] == 2e-3


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["lumos1", "stiv"])
def test_settings_that_shards_cannot_have_are_left_out(name, lora):
    before = record(source="worlds", options={}, stages=[])
    before["settings"] |= {"patterns": {"none": 0.5, "first": 0.2, "ends": 0.3}}
    if name == "stiv":
        before["settings"] |= {"strides": {1: 0.8, 2: 0.2}, "latents": {"kept_clips": 100}}
    found = build_settings(settings_of(name, before, lora))
    assert found.patterns["first"] == 0.2
    assert found.patterns["ends"] == (0.0 if lora and name == "lumos1" else 0.3)


@pytest.mark.parametrize("patterns", [{"none": 0.5, "ends": 0.5}, {"ends": 1.0}, {"none": 0.0, "ends": 1.0}])
def test_adapters_of_a_model_of_ends_have_no_given_frames(patterns):
    before = record(source="worlds", options={}, stages=[])
    before["settings"] |= {"patterns": patterns, "dropout": {"image": 0.1}}
    found = build_settings(settings_of("lumos1", before, lora=True))
    assert (found.patterns, found.dropout.image) == ({"none": 1.0}, 0.08)


@pytest.mark.parametrize(("name", "data"), [("stiv-tiny", "worlds"), ("stiv-tiny", "somewhere"), ("lumos-tiny", "somewhere")])
def test_records_of_shipped_models_become_settings(repo, tmp_path, name, data):
    """The settings of a fine-tuning, and of the recovery that `compress auto` writes, are valid on scenes and on shards."""
    folder = repo / "checkpoints" / name
    before = training_record(folder)
    found = build_settings(settings_of(registry.generator_of(folder).name, before))
    assert found.data.replay[0].options == before["settings"]["data"]["options"]
    recovery = recovery_settings(network_of(folder), tmp_path / "pruned", data, 10, tmp_path / "run", before)
    recovery.pop("distill")
    recovered = build_settings(recovery)
    assert recovered.data.source == ("worlds" if data == "worlds" else "shards")
    if name == "stiv-tiny":
        assert recovered.strides == ({1: 0.84, 2: 0.04, 4: 0.04, 8: 0.04, 16: 0.04} if data == "worlds" else {1: 1.0})


def test_stages_fit_the_clips_of_the_model():
    short = {"stages": [{"first_frames": 9, "short_share": 0.6, "image_share": 0.0}]}
    assert stages(short, CLIP) == [{"image_share": 0.0, "first_frames": 9, "short_share": 0.6}]
    assert stages(short, ClipDefaults(9, 64, 64, 8, None)) == []
    assert stages(short, ClipDefaults(1, 64, 64, 1, None)) == [{"image_share": 1.0}]
    assert stages({"stages": [{"image_share": 1.0}]}, CLIP) == []
    assert stages({}, CLIP) == []


def test_larger_models_learn_at_lower_rates():
    assert usual_lr(13_600_000, False) == usual_lr(1000, False) == 4e-4
    rates = [usual_lr(parameters, False) for parameters in (509_000_000, 1_500_000_000, 3_610_000_000)]
    assert rates == sorted(rates, reverse=True)
    assert all(2.4e-5 < rate < 1e-4 for rate in rates)


def test_clips_have_the_size_of_the_model():
    assert clip_size(CLIP) == "128x128"
    assert clip_size(ClipDefaults(25, 384, 672, 12, 528)) == "384p"


@pytest.mark.parametrize(("replay", "message"), [
    ([{"share": 0.5, "source": "shards"}], r"data.replay\[0\] has source shards, path None and 0 options; shards need a path"),
    ([{"share": 0.5, "path": "x"}], r"data.replay\[0\] has source worlds, path x"),
    ([{"share": 0.5, "source": "shards", "path": "x", "options": {"kinds": []}}], "and 1 options; shards need a path and have no"),
    ([{"share": 0.6}, {"share": 0.4}], "the shares of data.replay have the sum 1; it must be below 1"),
    ([{"share": 0}], r"data.replay\[0\].share is 0"),
])  # fmt: skip
def test_replay_is_checked(micro_settings, replay, message):
    with pytest.raises(UserError, match=message):
        micro_settings(data={"replay": replay})


def test_steps_have_clips_and_scenes_in_turn(shard_settings):
    settings = shard_settings(data={"replay": [{"share": 0.5, "options": {"kinds": ["digits"]}}]}, training={"batch_size": 2})
    task, alone = (ArdfTask(s, torch.device("cpu")) for s in (settings, shard_settings(training={"batch_size": 2})))
    curriculum, names = Curriculum([], 2), []
    for step in range(6):
        batch = task.batch(step, curriculum(step), range(2))
        names.append(batch.names)
        assert batch.tensors["input_ids"].shape[0] == 2
    assert [name.startswith("worlds/") for of_step in names for name in of_step] == [False, False, True, True] * 3
    assert [names[0], names[2], names[4]] == [alone.batch(step, curriculum(step), range(2)).names for step in range(3)]
    (scene,) = task.source.clips(1, curriculum(1), range(1))
    assert "digit" in scene.caption
    shape = task.source.usual_shape
    assert scene.frames.shape == (shape["num_frames"], shape["height"], shape["width"], 3)
    assert task.resume_fingerprint()["data.replay"][0]["share"] == 0.5
    assert alone.fingerprint_defaults()["data.replay"] == alone.resume_fingerprint()["data.replay"] == []
