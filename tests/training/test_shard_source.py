"""Training from shards: the clips of a step, their codes, and resuming."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from shard_folder import write_folder

pytest.importorskip("pyarrow")

from lumos.data.curriculum import Curriculum, StepShape
from lumos.data.shards import format as shards
from lumos.errors import RunError, UserError
from lumos.models.lumos1.sequence import parse_sequence
from lumos.models.lumos1.training import ArdfTask
from lumos.training.loop import train
from lumos.training.sections import StageSettings
from lumos.training.task import IGNORED
from tokenizer.video import VideoTokenizer

CPU = torch.device("cpu")


HALF = {"stages": [{"image_share": 0.5}]}


def test_an_epoch_has_each_clip_once_and_groups_sizes(shard_settings):
    task = ArdfTask(shard_settings(data=HALF), CPU)
    curriculum = Curriculum([StageSettings(image_share=0.5)], 3)
    names, mixed = {"video": [], "image": []}, 0
    for step in range(2 * 63):
        shape = curriculum(step)
        assert task.source.clips_in(shape) == 3
        clips = task.source.clips(step, shape, range(3))
        mixed += len({clip.codes.shape for clip in clips}) > 1
        assert {clip.codes.shape[0] for clip in clips} == {2 if shape.kind == "video" else 1}
        names[shape.kind] += [clip.name for clip in clips]
    assert mixed > 60
    for kind, count in (("video", 18), ("image", 7)):
        thrice = [names[kind][i : i + 3 * count] for i in range(0, 189 - 3 * count + 1, 3 * count)]  # whole steps
        assert all(sorted(Counter(drawn).values()) == [3] * count for drawn in thrice)
        assert thrice[0] != thrice[1]


def test_a_step_is_a_function_of_its_number_seed_and_stage(shard_settings):
    task, again = (ArdfTask(shard_settings(), CPU) for _ in range(2))
    other = ArdfTask(shard_settings(training={"seed": 5}), CPU)
    shapes = [StepShape("video", 6, 0, number) for number in (0, 1, 2, 5007)]

    def names(task, shape, positions=range(6)):
        return [clip.name for clip in task.source.clips(0, shape, positions)]

    for shape in shapes:
        assert names(task, shape) == names(again, shape) == names(again, shape, range(4)) + names(task, shape, range(4, 6))
    assert [names(task, s) for s in shapes] != [names(other, s) for s in shapes]
    assert names(task, shapes[0]) != names(task, StepShape("video", 6, 1, 0))


def test_rows_hold_ingested_codes_and_a_prompt_with_their_size(shard_settings, folder):
    stored = {f"{row['id']}#0": row for row in shards.read_shards(folder)}
    task = ArdfTask(shard_settings(data=HALF, masking={"text_dropout": 0.0}), CPU)
    for shape in (StepShape("video", 4), StepShape("image", 4)):
        batch = task.batch(0, shape, range(4))
        for ids, targets, name in zip(batch.tensors["input_ids"], batch.tensors["targets"], batch.names, strict=True):
            end = int((ids != task.config.pad_token_id).nonzero().max()) + 1
            parsed, row = parse_sequence(ids[:end], task.config), stored[name]
            codes = torch.from_numpy(row["codes"].astype(np.int64))[: 2 if shape.kind == "video" else 1]
            assert torch.equal(torch.where(parsed.codes < 0, codes, parsed.codes), codes)
            assert torch.equal(targets[targets != IGNORED], codes[parsed.codes < 0])
            assert task.text_tokenizer.decode(parsed.text_ids) == row["caption"]
            assert parsed.fps == row["fps"]


def test_without_pictures_the_first_frames_of_clips_serve(shard_settings, micro_tokenizers, tmp_path):
    path = write_folder(tmp_path / "clips", micro_tokenizers["video"], [(3, 4, 4)] * 4)
    task = ArdfTask(shard_settings(path, data=HALF), CPU)
    stored = {f"{row['id']}#0": row["codes"] for row in shards.read_shards(path)}
    for clip in task.source.clips(0, StepShape("image", 4), range(4)):
        assert np.array_equal(clip.codes, stored[clip.name][:1])


def test_validation_clips_are_never_trained_on(shard_settings):
    task = ArdfTask(shard_settings(data={"validation_clips": 4}, training={"eval_every": 2}), CPU)
    held = {clip.name for clip in task.source.clips(1 << 36, StepShape("video", 4), range(4))}
    seen = {clip.name for n in range(60) for clip in task.source.clips(n, StepShape("video", 4, 0, n), range(4))}
    assert len(held) == 4
    assert len(seen) == 14
    assert not held & seen


def test_what_is_held_out_as_a_clip_is_no_training_picture(shard_settings, micro_tokenizers, tmp_path):
    path = write_folder(tmp_path / "clips", micro_tokenizers["video"], [(3, 4, 4)] * 9 + [(2, 4, 4)] * 9)
    task = ArdfTask(shard_settings(path, data={"num_frames": 9, "validation_clips": 2} | HALF, training={"eval_every": 2}), CPU)
    held = {clip.name for kind in ("video", "image") for clip in task.source.clips(1 << 36, StepShape(kind, 2), range(2))}
    assert len(held) == 4  # the first of all are not the first of the long ones
    for kind in ("video", "image"):
        seen = {clip.name for n in range(20) for clip in task.source.clips(n, StepShape(kind, 4, 0, n), range(4))}
        assert not held & seen


@pytest.mark.slow
def test_resumed_training_from_shards_has_the_same_losses(shard_settings, tmp_path):
    def run(name, steps):
        settings = shard_settings(
            data=HALF | {"validation_clips": 3},
            training={"max_steps": steps, "eval_every": 2, "schedule": "constant", "output_dir": str(tmp_path / name)},
        )
        return train(settings)

    whole = run("whole", 4)
    run("parts", 2)
    assert run("parts", 4)["loss"] == whole["loss"]
    assert (tmp_path / "whole" / "export" / "config.json").is_file()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"num_frames": 13}}, "has 0 clips of at least 13 frames .the longest of its 25 has 9.*lower data.num_frames"),
        ({"data": {"validation_clips": 18}, "training": {"eval_every": 1}}, "18 clips of at least 5.*18 kept for validation"),
        ({"data": {"height": 32}}, "data.height has no effect with data.source=shards"),
        ({"data": {"source": "worlds", "height": 32}}, "data.source is worlds and data.path is"),
        ({"data": {"path": None}}, "data.source is shards and data.path is None"),
        ({"data": {"path": "nowhere"}}, "nowhere holds no ingested clips"),
    ],
)
def test_settings_that_do_not_fit_the_shards(shard_settings, sections: dict, words: str):
    with pytest.raises(UserError, match=words):
        ArdfTask(shard_settings(**sections), CPU)


def test_shards_of_another_tokenizer(shard_settings, micro_tokenizers, tmp_path):
    other = VideoTokenizer.from_pretrained(micro_tokenizers["video"])
    other.encoder.conv_in[0].conv3d.weight.data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"tokenizer\.video is another video tokenizer than the one that made the shards"):
        ArdfTask(shard_settings(tokenizer={**micro_tokenizers, "video": str(tmp_path / "other")}), CPU)


def test_a_shard_cut_off_is_found_at_the_start(shard_settings, micro_tokenizers, tmp_path):
    path = write_folder(tmp_path / "clips", micro_tokenizers["video"], [(2, 4, 4)] * 7)
    cut = shards.shard_paths(path)[1]
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"shard-000001\.parquet is damaged or cut off"):
        ArdfTask(shard_settings(path), CPU)
