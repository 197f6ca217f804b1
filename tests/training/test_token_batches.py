"""Steps of different clips by a budget of codes: their content, their division over processes, and their losses."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from run_log import read_log
from shard_folder import write_folder

pytest.importorskip("pyarrow")

from lumos.data.curriculum import Curriculum, StepShape, check_shares
from lumos.errors import UserError
from lumos.models.lumos1.training import ArdfTask
from lumos.training.loop import train
from lumos.training.sections import StageSettings
from lumos.training.settings import build_settings, load_settings
from lumos.training.task import IGNORED

CPU = torch.device("cpu")
LENGTHS = [(4, 4, 4)] * 6 + [(3, 4, 6)] * 5 + [(2, 6, 4)] * 7 + [(1, 4, 4)] * 5 + [(1, 6, 4)] * 3
BY_TOKENS = {
    "data": {"num_frames": 13, "min_frames": 5, "shuffle_shards": 2, "stages": [{"image_share": 0.5}]},
    "training": {"batch_size": None, "tokens_per_batch": 200},
}


@pytest.fixture
def token_settings(shard_settings, micro_tokenizers, tmp_path):
    path = write_folder(tmp_path / "lengths", micro_tokenizers["video"], LENGTHS)

    def make(**training):
        return shard_settings(path, data=BY_TOKENS["data"], training=BY_TOKENS["training"] | training)

    return make


@pytest.mark.slow
def test_a_step_has_about_so_many_codes_of_clips_of_all_lengths(token_settings):
    source = ArdfTask(token_settings(), CPU).source
    assert source.most_codes == {"video": 72, "image": 24}
    total, shapes = Counter(), set()
    for step in range(60):
        shape = Curriculum([StageSettings(image_share=0.5)], None, 200)(step)
        clips = source.clips(step, shape, range(source.clips_in(shape)))
        sizes = [clip.codes.size for clip in clips]
        assert sizes == sorted(sizes, reverse=True)
        assert abs(sum(sizes) - 200) < source.most_codes[shape.kind]
        total[shape.kind] += sum(sizes)
        shapes |= {clip.codes.shape for clip in clips}
    assert all(abs(codes - 30 * 200) < source.most_codes[kind] for kind, codes in total.items())
    assert shapes == set(LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_step_does_not_depend_on_processes_or_micro_batches(token_settings, kind: str):
    task = ArdfTask(token_settings(), CPU)
    model = task.build_model()
    shape = StepShape(kind, None, 0, 3, 200)
    count = task.source.clips_in(shape)
    assert count % 2 or count % 3
    whole = task.batch(3, shape, range(count))
    assert len({len(row) for row in map(torch.nonzero, whole.tensors["input_ids"])}) > 1

    def gradient(processes: int, micro_batch_size: int | None) -> torch.Tensor:
        model.zero_grad()
        names, rounds = {}, set()
        for rank in range(processes):
            positions = range(rank, count, processes)
            batch = task.batch(3, shape, positions)
            names |= dict(zip(positions, batch.names, strict=True))
            parts = batch.micro_batches(micro_batch_size, math.ceil(count / processes))
            rounds.add(len(parts))
            assert sum(int((part["targets"] != IGNORED).sum()) for part in parts) == batch.supervised
            for part in parts:
                assert len(part["targets"]) <= (micro_batch_size or count)
                assert (part["input_ids"][:, -1] != task.config.pad_token_id).any()
                (task.losses(model, part)[0].sum() / whole.supervised).backward()
        assert [names[position] for position in range(count)] == whole.names
        assert len(rounds) == 1  # ZeRO would wait for ever
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    one = gradient(1, None)
    losses = task.losses(model, whole.tensors)[0]
    alone = [task.losses(model, task.batch(3, shape, range(p, p + 1)).tensors)[0] for p in range(count)]
    assert torch.allclose(losses, torch.cat(alone), atol=1e-5)
    for processes, size in ((1, 1), (1, 2), (2, None), (2, 1), (3, 1), (3, 2)):
        assert torch.allclose(gradient(processes, size), one, atol=1e-6), (processes, size)


def test_scenes_by_tokens(micro_settings):
    task = ArdfTask(micro_settings(training=BY_TOKENS["training"], data={"stages": [{"image_share": 0.5}]}), CPU)
    for kind, frames in (("video", 2), ("image", 1)):
        shape = StepShape(kind, None, tokens=200)
        batch = task.batch(0, shape, range(task.source.clips_in(shape)))
        clip = task.source.clip(0, 4 * frames - 3)
        assert task._encode(torch.from_numpy(clip.frames)[None]).numel() == frames * 16
        assert 200 - frames * 16 < len(batch.names) * frames * 16 <= 200


@pytest.mark.slow
def test_a_run_by_tokens_resumes_bitwise(token_settings, tmp_path):
    def run(name: str, steps: int) -> dict:
        settings = token_settings(max_steps=steps, eval_every=2, schedule="constant", micro_batch_size=2)
        settings.training.output_dir = str(tmp_path / name)
        return train(settings)

    run("whole", 6)
    run("parts", 3)
    run("parts", 6)
    for key in ("loss", "grad_norm", "val_loss_video"):
        assert read_log(tmp_path / "parts", key) == read_log(tmp_path / "whole", key)
        assert read_log(tmp_path / "whole", key)


def test_two_processes_share_uneven_steps(token_settings, ranks, tmp_path):
    """ZeRO-3 gathers weights in every forward pass, so it hangs unless both processes do equally many."""
    settings = token_settings(max_steps=4, micro_batch_size=1)
    source, curriculum = ArdfTask(settings, CPU).source, Curriculum(settings.data.stages, None, 200)
    assert {source.clips_in(curriculum(step)) % 2 for step in range(4)} == {0, 1}
    train(settings)
    settings.training.output_dir = str(tmp_path / "two")
    ranks.finish(settings, "zero3")
    for key in ("loss", "grad_norm"):
        assert read_log(tmp_path / "two", key) == pytest.approx(read_log(tmp_path / "run", key), abs=1e-4)


@pytest.mark.parametrize("recipe", ["0.5b-stage2", "1b-stage2", "1b-384p", "3b-stage2", "3b-384p"])
def test_the_published_joint_training(repo, recipe: str):
    """Reference, sections 8.4 and 9: a clip and 6 pictures in turn on each process; 48 of them."""
    settings = load_settings(repo / "configs" / "lumos1" / f"{recipe}.yaml")
    curriculum = Curriculum(settings.data.stages, settings.training.batch_size)
    steps = [curriculum(step) for step in range(8)]
    assert [(s.kind, s.batch_size // 48) for s in steps] == [("video", 1), ("image", 6)] * 4
    check_shares(curriculum, {}, 48)
    with pytest.raises(UserError, match="is 48; it must be a multiple of the 36 processes"):
        check_shares(curriculum, {}, 36)


def test_a_stage_by_clips_within_a_run_by_tokens():
    stages = [StageSettings(steps=2, image_share=1.0, image_batch_size=6), StageSettings(steps=2, batch_size=4), StageSettings()]
    curriculum = Curriculum(stages, None, 500)
    shapes = [(s.kind, s.batch_size, s.tokens) for s in map(curriculum, range(5))]
    assert shapes == [("image", 6, None)] * 2 + [("video", 4, None)] * 2 + [("video", None, 500)]
    check_shares(curriculum, {"video": 250}, 2)
    with pytest.raises(UserError, match=r"tokens_per_batch 500 is too few: the largest video has 251 codes.* at least 502"):
        check_shares(curriculum, {"video": 251}, 2)


@pytest.mark.parametrize(
    ("training", "data", "words"),
    [
        ({"tokens_per_batch": 100}, {}, "training.batch_size is 16 and training.tokens_per_batch 100; one of them must be null"),
        ({"batch_size": None}, {}, "training.batch_size is None and training.tokens_per_batch None"),
        ({"batch_size": None, "tokens_per_batch": 9}, {"stages": [{"batch_size": 4}]}, "every stage has a batch_size"),
        ({}, {"source": "shards", "path": "x", "min_frames": 33}, "min_frames 33 is above data.num_frames 17"),
        ({}, {"min_frames": 5}, "data.min_frames has no effect with data.source=worlds"),
        ({}, {"shuffle_shards": 5}, "data.shuffle_shards has no effect with data.source=worlds"),
        ({}, {"source": "shards", "path": "x", "cache_gb": 1}, "data.cache_gb has no effect with the local data.path x"),
    ],
)
def test_settings_that_contradict_each_other(training: dict, data: dict, words: str):
    with pytest.raises(UserError, match=words):
        build_settings({"model": {"preset": "tiny"}, "training": training, "data": data})
