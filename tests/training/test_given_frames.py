"""Training of Lumos-1 on given frames: rows against a plain form, micro-batches, shards, and clips of the trained model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_log import read_log

from lumos import LumosPipeline
from lumos.data.curriculum import StepShape
from lumos.data.seeding import drawn_name, sample_generator, sample_index
from lumos.data.source import TrainingClip
from lumos.errors import UserError
from lumos.models.lumos1.distillation import MASK, DistillableLumos, visual_features
from lumos.models.lumos1.sequence import code_mask, parse_layout
from lumos.models.lumos1.settings import MASK_KINDS
from lumos.models.lumos1.training import ArdfTask
from lumos.training.loop import train
from lumos.training.task import IGNORED

CPU = torch.device("cpu")
VIDEO, IMAGE = StepShape("video", 8), StepShape("image", 8)
SHARES = {"none": 0.3, "first": 0.2, "prediction": 0.2, "ends": 0.3}
GIVEN = {"patterns": SHARES, "dropout": {"image": 0.4}}
NINE = {"num_frames": 9}
FEW_NUMBERS = {"vocab_size": 2024, "visual_token_count": 1000, "number_token_count": 9}


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_rows_are_those_without_given_frames_but_for_these(micro_settings, kind: str):
    """Compares with the row of the same clip in a run without patterns, changed code by code as the pattern says."""
    task, plain = (ArdfTask(micro_settings(data=NINE, masking={"kind": kind}, **more), CPU) for more in (GIVEN, {}))
    with torch.no_grad():
        task.video_tokenizer.quant_conv.conv3d.weight.mul_(10)  # different codes for different pictures
    plain.video_tokenizer = task.video_tokenizer
    config, seen, differ = task.config, Counter(), 0
    for step in range(4):
        batch, twin = (of.batch(step, VIDEO, range(8)) for of in (task, plain))
        assert batch.supervised == int((batch.tensors["targets"] != IGNORED).sum())
        assert batch.rows["layouts"] == parse_layout(batch.tensors["input_ids"], config)
        assert torch.equal(batch.tensors["mask_ratios"], twin.tensors["mask_ratios"])
        for i in range(8):
            pattern = drawn_name(sample_generator(0, step, i, "pattern"), SHARES)
            hide = bool(torch.rand((), generator=sample_generator(0, step, i, "image dropout")) < 0.4)
            seen[pattern, hide] += 1
            layout, of_twin = batch.rows["layouts"][i], twin.rows["layouts"][i]
            ids, targets = (batch.tensors[name][i] for name in ("input_ids", "targets"))
            twin_ids, twin_targets = (twin.tensors[name][i] for name in ("input_ids", "targets"))
            assert batch.lengths[i] == twin.lengths[i] + (layout.frames[0].end - layout.frames[0].start + 1) * (pattern == "ends")
            clip = torch.from_numpy(task.source.clip(sample_index(step, i), 9).frames)
            codes, picture = task._encode(clip[None])[0], task._encode(clip[None, -1:])[0]
            differ += not torch.equal(codes[-1], picture[0])
            given = {"none": 0, "first": 1, "prediction": 2, "ends": 2}[pattern]
            places = [codes[0], picture[0], *codes[1:]] if pattern == "ends" else codes
            assert len(layout.frames) == len(places)
            is_code = code_mask([layout], len(ids))[0]
            for k, (frame, its_codes) in enumerate(zip(layout.frames, places, strict=True)):
                content = slice(frame.content_start, frame.end - 1)
                if k < given:
                    shown = torch.full_like(its_codes, config.mask_token_id) if hide else its_codes + config.visual_token_start
                    newlines = torch.full((len(shown), 1), config.newline_token_id)
                    assert ids[content].tolist() == torch.cat([shown, newlines], 1).flatten().tolist()
                    assert (targets[content] == IGNORED).all()
                else:
                    other = of_twin.frames[k - (pattern == "ends")]
                    there = slice(other.content_start, other.end - 1)
                    assert torch.equal(ids[content], twin_ids[there])
                    assert torch.equal(targets[content], twin_targets[there])
            assert (targets[~is_code] == IGNORED).all()
    assert len(seen) >= 7
    assert differ >= 16


def test_validation_keeps_given_frames(micro_settings):
    task = ArdfTask(micro_settings(data=NINE, patterns={"first": 1.0}, dropout={"image": 1.0}), CPU)
    for dropout, hidden in ((True, True), (False, False)):
        batch = task.batch(0, VIDEO, range(8), dropout=dropout)
        for row, layout in zip(batch.tensors["input_ids"], batch.rows["layouts"], strict=True):
            frame = layout.frames[0]
            assert (row[frame.start : frame.end] == task.config.mask_token_id).any() == hidden


def test_pictures_have_no_given_frames(micro_settings):
    task, plain = (ArdfTask(micro_settings(data=NINE, **more), CPU) for more in ({"patterns": {"ends": 1.0}}, {}))
    batch, twin = (of.batch(0, IMAGE, range(8)) for of in (task, plain))
    assert all(torch.equal(batch.tensors[name], twin.tensors[name]) for name in twin.tensors)


@pytest.mark.parametrize("with_codes", [False, True])
def test_a_short_step_is_the_beginning_of_the_whole_one(micro_settings, monkeypatch, with_codes: bool):
    """The last frame is the last one of the whole clip, at its time, and equal codes have equal losses."""
    task = ArdfTask(micro_settings(data={"num_frames": 13}, patterns={"first": 0.5, "ends": 0.5}), CPU)
    if with_codes:
        codes = np.random.default_rng(0).integers(0, 1000, (8, 5, 4, 4)).astype(np.uint16)
        clips = [TrainingClip(None, "a red circle", 8, str(i), made[:4], last=made[4]) for i, made in enumerate(codes)]
        monkeypatch.setattr(task.source, "clips", lambda step, shape, positions: [clips[i] for i in positions])
    model = task.build_model().eval()
    whole, short = (task.batch(3, replace(VIDEO, first_frames=n), range(8)) for n in (None, 5))
    assert {layout.times for layout in short.rows["layouts"]} == {(0, 1), (0, 3, 1)}
    of_whole, of_short = (task.losses(model, batch.whole) for batch in (whole, short))
    torch.testing.assert_close(of_short[0], of_whole[0][of_whole[1]["frame"] < 2], atol=1e-5, rtol=1e-5)
    assert of_whole[1]["frame"].unique().tolist() == [1, 2, 3]
    for i, length in enumerate(short.lengths):
        for name in ("input_ids", "targets"):
            assert torch.equal(short.tensors[name][i, :length], whole.tensors[name][i, :length])
    if with_codes:
        shown = 0
        for ids, layout, made in zip(whole.tensors["input_ids"], whole.rows["layouts"], codes, strict=True):
            frame = layout.frames[1]
            content = ids[frame.content_start : frame.end - 1].view(4, 5)[:, :4]
            if layout.times[1] == 3 and (content != task.config.mask_token_id).all():
                shown += 1
                assert torch.equal(content - task.config.visual_token_start, torch.from_numpy(made[4].astype(np.int64)))
        assert shown


@pytest.mark.slow
def test_losses_do_not_depend_on_micro_batches_or_processes(micro_settings, tmp_path: Path):
    task = ArdfTask(micro_settings(data=NINE, **GIVEN), CPU)
    whole, parts = task.batch(2, VIDEO, range(8)), [task.batch(2, VIDEO, range(i, i + 2)) for i in range(0, 8, 2)]
    for i, length in enumerate(whole.lengths):
        part = parts[i // 2]
        assert part.lengths[i % 2] == length
        for name in ("input_ids", "targets"):
            assert torch.equal(part.tensors[name][i % 2, :length], whole.tensors[name][i, :length])
    assert sum(part.supervised for part in parts) == whole.supervised
    assert sum(part.flops for part in parts) == pytest.approx(whole.flops)
    logs = []
    for size in (None, 1, 3):
        training = {"micro_batch_size": size, "output_dir": str(tmp_path / str(size)), "max_steps": 3}
        train(micro_settings(data=NINE, training=training, **GIVEN))
        logs.append(read_log(tmp_path / str(size)))
    assert logs[1] == pytest.approx(logs[0], abs=1e-4)
    assert logs[2] == pytest.approx(logs[0], abs=1e-4)


@pytest.mark.slow
def test_runs_on_given_frames_resume_as_such(micro_settings, tmp_path: Path):
    sections = {"data": NINE, **GIVEN}
    train(micro_settings(**sections, training={"max_steps": 4, "schedule": "constant", "output_dir": str(tmp_path / "whole")}))
    train(micro_settings(**sections, training={"max_steps": 2, "schedule": "constant"}))
    for changed in ({"patterns": SHARES | {"ends": 0.2}}, {"dropout": {"image": 0.3}}, {"patterns": {"none": 0.3}, "dropout": {}}):
        with pytest.raises(UserError, match=r"patterns|dropout"):
            train(micro_settings(**sections | changed, training={"max_steps": 4, "schedule": "constant"}))
    train(micro_settings(**sections, training={"max_steps": 4, "schedule": "constant"}))
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_older_runs_had_no_given_frames(micro_settings):
    """The fingerprint of a run with default settings equals an older one with the defaults added."""
    task = ArdfTask(micro_settings(), CPU)
    found, added = task.resume_fingerprint(), task.fingerprint_defaults()
    assert added == {"patterns": ["none"], "patterns.none": 1.0, "dropout.image": 0.08, "data.replay": []}
    assert found == found | added


def test_compression_compares_what_the_model_makes(micro_settings):
    """Given frames have no output and stay as they are for the critic, which sees no picture of the last frame."""
    task = ArdfTask(micro_settings(data={"num_frames": 13}, **GIVEN), CPU)
    prepared, model = task.prepare(1, VIDEO, range(8)), task.build_model().eval()
    batch = task.encode(prepared)
    found = task.forward(model, batch.whole)
    losses, by_group = task.losses(model, batch.whole)
    torch.testing.assert_close(found.losses, losses)
    outputs = iter(found.outputs())
    for layout, targets in zip(batch.rows["layouts"], batch.tensors["targets"], strict=True):
        made = [n for n, f in zip(layout.times, layout.frames, strict=True) if (targets[f.start : f.end] != IGNORED).any()]
        assert next(outputs).frames.tolist() == made
    assert ((found.places["frames"] == 0) == (by_group["frame"] == 0)).all()

    hidden = DistillableLumos(task).draws(1, range(8), prepared).tensors[MASK]
    for row, layout, targets in zip(hidden, batch.rows["layouts"], batch.tensors["targets"], strict=True):
        for frame in layout.frames:
            span = slice(frame.start, frame.end)
            assert row[span].any() == (targets[span] != IGNORED).any()
    states = torch.arange(batch.tensors["input_ids"].numel()).view(8, -1, 1)
    (features,) = visual_features([states], batch.rows["layouts"])
    assert features.blocks[0].shape == (8, 4, 4, 4, 1)
    for number, layout in enumerate(batch.rows["layouts"]):
        starts = [frame.content_start for frame in layout.frames if frame.stated_time is None]
        assert (features.blocks[0][number, :, 0, 0, 0] - states[number, 0, 0]).tolist() == starts


@pytest.mark.slow
def test_an_export_takes_the_frames_that_it_was_trained_on(micro_settings, tmp_path: Path):
    """A fine-tune of it stores its own patterns; a training of adapters does not change the config."""
    ends = {"data": NINE, "patterns": {"none": 0.5, "ends": 0.5}}
    samples = {"every": 2, "prompts": ["a red circle"], "options": {"num_inference_steps": 2}}
    folder = train(micro_settings(**ends, samples=samples, training={"max_steps": 2}))["export"]
    pipe = LumosPipeline.from_pretrained(folder, device="cpu")
    assert pipe.model.config.patterns == ["none", "ends"]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    clip = pipe("a red circle", image=pictures[0], last_image=pictures[1], seed=1, num_inference_steps=2)
    assert clip.frames[0].shape == (9, 32, 32, 3)
    base = {"model": {"from": folder}, "tokenizer": {"video": None, "text": None}, "data": NINE}
    training = {"max_steps": 1, "output_dir": str(tmp_path / "again")}
    with pytest.warns(UserWarning, match="will refuse clips of the patterns ends, which .* takes: this run trains on first only"):
        again = train(micro_settings(**base, patterns={"first": 1.0}, training=training))["export"]
    assert LumosPipeline.from_pretrained(again, device="cpu").takes == ()
    task = ArdfTask(micro_settings(**base, patterns={"first": 1.0}, lora={"rank": 2}), CPU)
    assert task.config.patterns == ["none", "ends"]


@pytest.mark.parametrize(("sections", "words"), [
    ({"patterns": {"views": 1.0}}, "patterns.'views' is unknown; allowed: none, first, prediction, ends"),
    ({"patterns": {"first": -1}}, "patterns.first -1 is not allowed; give a share from 0"),
    ({"patterns": {"first": 0}}, "patterns {'first': 0} has no share above 0; give at least one, such as none: 1"),
    ({"dropout": {"image": 0.2}}, "dropout.image has no effect, because patterns give no frames"),
    ({"patterns": {"ends": 1.0}, "lora": {"rank": 2}, "model": {"from": "x"}}, "patterns.ends teaches .* leave lora.rank out"),
    ({"patterns": {"first": 1.0}, "data": {"stages": [{"image_share": 1.0}]}}, "this run trains on pictures only"),
    ({"patterns": {"prediction": 1.0}}, "patterns.prediction gives all frames of a clip: data.num_frames is 5; raise it"),
    ({"patterns": {"ends": 1.0}, "data": {"num_frames": 37}, "model": {"preset": "tiny", "overrides": FEW_NUMBERS}},
     "the last latent frame 9 has no number token; allowed: up to 8"),
    ({"model": {"preset": "tiny", "overrides": {"patterns": ["ends"]}}}, "model.overrides.patterns has no effect; leave it out"),
])  # fmt: skip
def test_settings_that_cannot_be(micro_settings, sections: dict, words: str):
    with pytest.raises(UserError, match=words):
        ArdfTask(micro_settings(**sections), CPU)
