from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.data.curriculum import Curriculum, StepShape
from lumos.data.prefetch import prefetched
from lumos.data.seeding import VALIDATION_STEP, sample_generator, sample_index
from lumos.data.source import TrainingClip
from lumos.errors import RunError, UserError
from lumos.models.lumos1.masking import mask_sequence
from lumos.models.lumos1.sequence import build_sequence, clip_header, parse_layout, parse_sequence, prompt_text
from lumos.models.lumos1.settings import MASK_KINDS
from lumos.models.lumos1.training import ArdfTask
from lumos.training.sections import StageSettings
from lumos.training.task import IGNORED

CPU = torch.device("cpu")
VIDEO, IMAGE = StepShape("video", 4), StepShape("image", 4)


@given(st.integers(0, 100), st.integers(0, 300), st.integers(1, 50))
def test_curriculum_spreads_images_evenly(percent: int, steps: int, first: int):
    share = percent / 100
    curriculum = Curriculum([StageSettings(steps=first, image_share=1.0), StageSettings(image_share=share)], 8)
    kinds = [curriculum(step).kind for step in range(first + steps)]
    assert kinds[:first] == ["image"] * first
    for n in range(0, steps + 1, 10):
        assert kinds[first : first + n].count("image") == n * percent // 100


def test_curriculum_sizes_and_alternation():
    curriculum = Curriculum([StageSettings(steps=2, image_share=1.0, image_batch_size=32), StageSettings(image_share=0.5)], 16)
    shapes = [(s.kind, s.batch_size) for s in map(curriculum, range(6))]
    assert shapes == [("image", 32)] * 2 + [("video", 16), ("image", 16)] * 2
    assert [(s.stage, s.number) for s in map(curriculum, range(6))] == [(0, 0), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]
    assert curriculum.shapes == {StepShape("image", 32), StepShape("image", 16), StepShape("video", 16)}
    assert curriculum.kinds == ["image", "video"]
    assert Curriculum([], 3)(10**6) == StepShape("video", 3, stage=0, number=10**6)
    assert Curriculum([StageSettings(image_share=1.0)], 3).kinds == ["image"]


def test_curriculum_spreads_short_steps_among_those_of_clips():
    curriculum = Curriculum([StageSettings(image_share=0.5, first_frames=5, short_share=0.75)], 4)
    shapes = [curriculum(step) for step in range(16)]
    assert [(s.kind, s.first_frames) for s in shapes[::2]] == [("video", None), *[("video", 5)] * 3] * 2
    assert {s.kind for s in shapes[1::2]} == {"image"}
    assert [s.number for s in shapes] == [n for n in range(8) for _ in range(2)]
    assert curriculum.shapes == {VIDEO, IMAGE, replace(VIDEO, first_frames=5)}
    only = Curriculum([StageSettings(first_frames=5)], 4)
    assert only.shapes == {only(0)} == {replace(VIDEO, first_frames=5)}


def test_every_sample_has_its_own_number_and_randomness():
    pairs = [(step, position) for step in range(50) for position in range(20)]
    assert len({sample_index(*pair) for pair in pairs}) == len(pairs)
    draws = {
        float(torch.rand((), generator=sample_generator(seed, *pair, purpose)))
        for seed in (0, 1)
        for pair in pairs[:100]
        for purpose in ("a", "b")
    }
    assert len(draws) == 400
    with pytest.raises(ValueError, match="position"):
        sample_index(0, 1 << 16)


@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 12))
@settings(deadline=None)
def test_prefetched_keeps_order(workers: int, depth: int, steps: int):
    assert list(prefetched(lambda step: step * 2, range(steps), workers=workers, depth=depth)) == [s * 2 for s in range(steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetching_raises_at_its_step_and_ends_threads(workers: int):
    def make(step: int) -> int:
        if step == 3:
            raise UserError("broken clip")
        return step

    seen = []
    with pytest.raises(UserError, match="broken clip"):
        seen.extend(prefetched(make, range(9), workers=workers, depth=2))
    batches = prefetched(make, range(3), workers=workers, depth=2)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_a_batch_is_a_pure_function_of_its_step_and_positions(micro_settings):
    task = ArdfTask(micro_settings(), CPU)
    whole, again = (task.batch(7, VIDEO, range(4)) for _ in range(2))
    assert all(torch.equal(whole.tensors[k], again.tensors[k]) for k in whole.tensors)
    halves = [task.batch(7, VIDEO, positions) for positions in (range(2), range(2, 4))]
    for i, row in enumerate(whole.tensors["input_ids"]):
        part = halves[i // 2].tensors["input_ids"][i % 2]
        length = len(part)
        assert torch.equal(row[:length], part)
        assert (row[length:] == task.config.pad_token_id).all()
    assert sum(half.supervised for half in halves) == whole.supervised
    assert [name for half in halves for name in half.names] == whole.names
    assert not torch.equal(task.batch(8, VIDEO, range(4)).tensors["targets"], whole.tensors["targets"])


def test_rows_hold_the_clip_its_caption_and_masked_targets(micro_settings):
    task = ArdfTask(micro_settings(masking={"text_dropout": 0.0}), CPU)
    config = task.config
    for shape, frames, header in ((VIDEO, 2, (1, 8)), (IMAGE, 1, (1, 1))):
        batch = task.batch(0, shape, range(4))
        assert batch.tokens == int((batch.tensors["input_ids"] != 0).sum()) + 4  # bos has the padding's id
        for position in range(4):
            ids, targets = (batch.tensors[k][position] for k in ("input_ids", "targets"))
            end = int((ids != config.pad_token_id).nonzero().max()) + 1
            parsed = parse_sequence(ids[:end], config)
            clip = task.source.clip(sample_index(0, position), 5 if shape is VIDEO else 1)
            assert task.text_tokenizer.decode(parsed.text_ids) == clip.caption
            assert (parsed.duration, parsed.fps) == header
            codes = task._encode(torch.from_numpy(clip.frames)[None])[0]
            assert parsed.codes.shape == codes.shape == (frames, 4, 4)
            assert torch.equal(torch.where(parsed.codes < 0, codes, parsed.codes), codes)
            assert torch.equal(targets[targets != IGNORED], codes[parsed.codes < 0])


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("with_codes", [False, True])
def test_a_short_step_is_the_beginning_of_the_whole_one(micro_settings, monkeypatch, kind: str, with_codes: bool):
    """The same text, header, masks and codes give the same loss of each code."""
    task = ArdfTask(micro_settings(data={"num_frames": 13}, masking={"kind": kind}), CPU)
    if with_codes:
        codes = np.random.default_rng(0).integers(0, 1000, (3, 4, 4, 4)).astype(np.uint16)
        clips = [TrainingClip(None, "a red circle " * (i + 1), 8, str(i), made) for i, made in enumerate([*codes, codes[0, :1]])]
        monkeypatch.setattr(task.source, "clips", lambda step, shape, positions: [clips[i] for i in positions])
    model = task.build_model().eval()
    whole, short = (task.batch(3, replace(VIDEO, first_frames=n), range(4)) for n in (None, 5))
    assert short.supervised < whole.supervised
    assert short.flops < whole.flops
    of_whole, of_short = (task.losses(model, batch.whole) for batch in (whole, short))
    torch.testing.assert_close(of_short[0], of_whole[0][of_whole[1]["frame"] < 2], atol=1e-5, rtol=1e-5)
    for i, length in enumerate(short.lengths):
        for name in ("input_ids", "targets"):
            assert torch.equal(short.tensors[name][i, :length], whole.tensors[name][i, :length])
        frames = whole.rows["layouts"][i].frames
        assert length == (frames[1].end if len(frames) > 1 else whole.lengths[i])


def names_of(source, shape: StepShape, steps: range) -> list[str]:
    return [clip.name for step in steps for clip in source.clips(step, shape, range(shape.batch_size))]


@pytest.mark.parametrize("scenes", [3, 64, 100])
def test_every_scene_is_seen_before_one_repeats(micro_settings, scenes):
    shape = StepShape("image", 5)
    source = ArdfTask(micro_settings(data={"scenes": scenes}), CPU).source
    names = names_of(source, shape, range(2 * scenes))
    assert len(set(names[:scenes])) == len(set(names)) == scenes


def test_validation_clips_are_never_training_clips(micro_settings):
    shape = StepShape("image", 5)
    source = ArdfTask(micro_settings(data={"scenes": 3}), CPU).source
    seen = set(names_of(source, shape, range(5)))
    held_back = {clip.name for clip in source.clips(VALIDATION_STEP, shape, range(8))}
    assert len(held_back) == 8
    assert not seen & held_back


@pytest.mark.slow
def test_text_dropout_drops_all_that_stands_before_the_video(micro_settings):
    task = ArdfTask(micro_settings(masking={"text_dropout": 0.5}), CPU)
    start = task.config.video_start_token_id
    first = torch.cat([task.batch(step, IMAGE, range(4)).tensors["input_ids"][:, 0] for step in range(40)])
    assert 50 < int((first == start).sum()) < 110  # 80 expected of 160, 6 sigma is 38
    assert set(first.tolist()) == {start, task.config.bos_token_id}
    kept = task.batch(0, IMAGE, range(4), dropout=False).tensors["input_ids"]
    assert (kept[:, 0] == task.config.bos_token_id).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"num_frames": 6}}, "data.num_frames is 6; it must be 1 \\+ a multiple of 4"),
        ({"data": {"stages": [{"first_frames": 4}]}}, r"data.stages\[0\].first_frames is 4; it must be 1 \+ a multiple of 4"),
        ({"data": {"height": 36}}, "data.height is 36; it must be a multiple of 8"),
        ({"data": {"options": {"colours": 3}}}, "data.options.*share_digits"),
        ({"data": {"options": {"seed": 3}}}, "data.options may not hold seed; it is set by training.seed"),
        ({"data": {"options": {"height": 64}}}, "data.options may not hold height; it is set by data.height"),
        ({"data": {"options": {"split": "all"}}}, "data.options may not hold split"),
        ({"tokenizer": {"video": "nowhere"}}, "tokenizer.video.*nowhere.*train-tokenizer"),
        ({"tokenizer": {"text": None}}, "tokenizer.text is missing"),
        ({"model": {"preset": "huge"}}, "unknown preset 'huge'; known presets: tiny"),
        ({"model": {"preset": "tiny", "overrides": {"hidden": 64}}}, "overrides.hidden is unknown, did you mean hidden_.*allowed"),
        ({"model": {"preset": "tiny", "overrides": {"hidden_size": 100}}}, "model: "),
        ({"model": {"preset": "tiny", "overrides": {"visual_token_count": 500}}}, "has 1000 codes"),
        ({"model": {"from": "nowhere"}}, "model.from: nowhere is no model folder"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(micro_settings, sections: dict, words: str):
    with pytest.raises(UserError, match=words):
        ArdfTask(micro_settings(**sections), CPU)


def test_codes_that_the_model_does_not_have(micro_settings, monkeypatch):
    task = ArdfTask(micro_settings(), CPU)
    codes = np.zeros((2, 4, 4), np.uint16)
    clips = [TrainingClip(None, "x", 8, name, codes + number) for name, number in (("good", 999), ("bad", 1000))]
    monkeypatch.setattr(task.source, "clips", lambda step, shape, positions: clips)
    with pytest.raises(RunError, match="bad has the code 1000; allowed: 0 to 999; ingest it again"):
        task.prepare(0, VIDEO, range(2))
    clips[1] = clips[0]
    assert task.batch(0, VIDEO, range(2)).supervised > 0


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_a_batch_encoded_later_equals_one_masked_with_codes(micro_settings, monkeypatch, kind: str):
    """Rows of different sizes and lengths equal single rows that are built and masked in one step."""
    task = ArdfTask(micro_settings(masking={"kind": kind, "text_dropout": 0.5}), CPU)
    config, rng = task.config, np.random.default_rng(0)
    grids = [(2, 4, 4), (1, 2, 6), (3, 4, 2), (2, 4, 4)]
    codes = [rng.integers(0, 1000, grid).astype(np.uint16) for grid in grids]
    clips = [TrainingClip(None, f"a red circle {i}", 8, str(i), made) for i, made in enumerate(codes)]
    monkeypatch.setattr(task.source, "clips", lambda step, shape, positions: [clips[i] for i in positions])
    batch = task.batch(5, VIDEO, range(4))
    for i, clip in enumerate(clips):
        num_frames = (grids[i][0] - 1) * 4 + 1
        drop = torch.rand((), generator=sample_generator(0, 5, i, "text")) < 0.5
        size = {"height": grids[i][1] * 8, "width": grids[i][2] * 8}
        text = prompt_text(config, clip.caption, num_frames=num_frames, fps=8, **size)
        duration, fps = clip_header(num_frames, 8)
        ids = build_sequence(
            None if drop else task.text_tokenizer.encode(text), torch.from_numpy(clip.codes.astype(np.int64)), fps=fps,
            duration=duration, config=config,
        )  # fmt: skip
        masked = mask_sequence(ids, config, kind=kind, min_ratio=0.7, generator=sample_generator(0, 5, i, "mask"))
        n = len(ids)
        assert torch.equal(batch.tensors["input_ids"][i, :n], masked.input_ids)
        assert torch.equal(batch.tensors["targets"][i, :n], masked.targets)
        assert (batch.tensors["targets"][i, n:] == IGNORED).all()
        assert batch.tensors["mask_ratios"][i, : grids[i][0]].tolist() == pytest.approx(masked.ratios)
    assert batch.supervised == int((batch.tensors["targets"] != IGNORED).sum())
    assert batch.rows["layouts"] == parse_layout(batch.tensors["input_ids"], config)
    assert batch.rows["layouts"][0] is not batch.rows["layouts"][1]
