"""The training of STIV: draws, losses, resume, initialization and export, with tiny parts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lumos import VideoPipeline
from lumos.data.curriculum import StepShape
from lumos.data.source import TrainingClip
from lumos.errors import UserError
from lumos.models.stiv import flow
from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.draws import drawn_clip
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.patterns import given_frames
from lumos.models.stiv.training import StivTask
from lumos.training.loop import train
from lumos.training.settings import build_settings, load_settings
from tokenizer import VideoTokenizer
from tokenizer.fsq import NoQuantizer
from tokenizer.pictures import picture_encoder

CPU = torch.device("cpu")
TINY = {
    "hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3, "latent_channels": 3, "text_width": 64, "text_layers": 1,
}  # fmt: skip
LATENTS = {"mean": [0.0, 0.1, 0.2], "std": [0.5, 0.6, 0.7]}
VIDEO = StepShape("video", 4)


@pytest.fixture
def make(micro_folder, tmp_path):
    """A function that makes settings of a run of two steps on clips of 5 frames of 16 x 32 pixels."""

    def settings(run: str = "run", training: dict | None = None, overrides: dict | None = None, **sections):
        tokenizers = {kind: str(micro_folder / f"{kind}_tokenizer") for kind in ("video", "text")}
        stated = {
            "generator": "stiv", "model": {"preset": "stiv-nano", "overrides": TINY | (overrides or {})}, "tokenizer": tokenizers,
            "data": {"num_frames": 5, "height": 16, "width": 32, "workers": 0, "validation_clips": 2},
            "latents": LATENTS,
            "training": {"max_steps": 2, "batch_size": 4, "warmup_steps": 1, "lr": 1e-3, "log_every": 1, "save_every_steps": 1,
                         "device": "cpu", "output_dir": str(tmp_path / run), **(training or {})},
            "logging": {"peak_tflops": 0.1},
        }  # fmt: skip
        return build_settings(stated | sections)

    return settings


@pytest.fixture
def task(make):
    return lambda **more: StivTask(make(**more), CPU)


def logged(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "event" not in line]


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with no weight at 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


# ---- the encoder of single pictures

@pytest.mark.parametrize("patch", [1, 2])
def test_folded_encoder_gives_the_latents_of_single_frames(micro_folder, patch):
    tokenizer = VideoTokenizer.from_pretrained(micro_folder)
    config = replace(tokenizer.config, spatial_patch_size=patch, pointwise_ends=patch == 2, spatial_compression=8 * patch)
    torch.manual_seed(0)
    tokenizer = perturbed(VideoTokenizer(config)).eval()
    video = torch.rand(2, 3, 3, 16 * patch, 24 * patch) * 2 - 1
    assert torch.equal(picture_encoder(tokenizer)(video), tokenizer.encode_frames(video))
    tokenizer.quantizer = NoQuantizer()
    latents = picture_encoder(tokenizer)(video)
    assert latents.shape == (2, 3, 3, 2, 3)
    assert latents.std() > 0.01
    assert torch.allclose(latents, tokenizer.encode_frames(video), atol=1e-6)


# ---- draws

@pytest.mark.slow
def test_dropout_has_its_shares_and_is_the_same_for_a_seed(make, micro_stiv_config):
    settings = make(patterns={"first": 1.0})
    config, count = micro_stiv_config(), 5_000
    drawn = [drawn_clip(settings, config, i // 4096, i % 4096, (2, 2, 2), True) for i in range(count)]
    text = np.array([draws.no_text for draws in drawn])
    image = np.array([draws.pattern == "none" for draws in drawn])
    shares = {"neither": ~text & ~image, "text": ~text & image, "image": text & ~image, "both": text & image}
    wanted = {"neither": 0.828, "text": 0.072, "image": 0.092, "both": 0.008}
    for name, found in shares.items():
        p = wanted[name]
        assert abs(found.mean() - p) < 4 * (p * (1 - p) / count) ** 0.5, name
    again = drawn_clip(settings, config, 1, 7, (2, 2, 2), True)
    before = drawn[4096 + 7]
    assert (again.pattern, again.no_text, again.time) == (before.pattern, before.no_text, before.time)
    assert torch.equal(again.noise, before.noise)


def test_a_draw_does_not_depend_on_other_settings(make, micro_stiv_config):
    plain, other = make(), make(patterns={"none": 1, "ends": 1}, given_noise=0.3, mask_ratio=0.5)
    first, second = (drawn_clip(settings, micro_stiv_config(), 3, 2, (5, 4, 4), True) for settings in (plain, other))
    assert first.time == second.time
    assert torch.equal(first.noise, second.noise)
    assert first.no_text == second.no_text
    assert first.keep is None
    assert second.keep.tolist() == sorted(second.keep.tolist())
    assert len(second.keep) == 2


@pytest.mark.slow
def test_strides_have_their_shares_and_reach_the_network(task):
    strided = task(strides={1: 1, 4: 3}, patterns={"none": 1, "ends": 1})
    batch = strided.batch(0, StepShape("video", 64), range(64))
    found = batch.tensors["stride"].tolist()
    assert set(found) == {1.0, 4.0}
    assert 36 <= found.count(4.0) <= 58
    usual = task(patterns={"none": 1, "ends": 1}).batch(0, StepShape("video", 64), range(64))
    assert usual.tensors["stride"].tolist() == [1.0] * 64
    assert torch.equal(usual.tensors["patterns"], batch.tensors["patterns"])
    pictures = strided.batch(0, StepShape("image", 4), range(4))
    assert pictures.tensors["stride"].tolist() == [1.0] * 4


def test_dropped_images_are_supervised_and_given_ones_are_not(task):
    trained = task(patterns={"first": 1.0}, dropout={"image": 1.0})
    assert trained.config.patterns == ["first", "none"]
    assert trained.pattern_names == ["none", "first"]
    assert trained.batch(0, VIDEO, range(4)).supervised == 20
    assert trained.batch(0, VIDEO, range(4), dropout=False).supervised == 16


def test_pictures_are_trained_beside_a_pattern_without_dropout(task):
    data = {"num_frames": 5, "height": 16, "width": 32, "workers": 0, "stages": [{"image_share": 0.5}]}
    trained = task(patterns={"first": 1.0}, dropout={"image": 0.0}, data=data)
    assert trained.config.patterns == ["first", "none"]
    for kind, name in (("image", "none"), ("video", "first")):
        batch = trained.batch(0, StepShape(kind, 4), range(4))
        assert {trained.pattern_names[place] for place in batch.tensors["patterns"]} == {name}


# ---- losses

def test_losses_do_not_depend_on_processes_or_micro_batches(task):
    trained = task(patterns={"none": 1, "first": 1, "interpolation": 1}, given_noise=0.4, mask_ratio=0.25)
    model = perturbed(trained.build_model()).eval()
    whole, _ = trained.losses(model, trained.batch(1, VIDEO, range(4)).whole)
    halves = [trained.batch(1, VIDEO, range(rank, 4, 2)) for rank in range(2)]
    parts = [trained.losses(model, micro)[0] for batch in halves for micro in batch.micro_batches(1)]
    assert sum(batch.supervised for batch in halves) == len(whole) == sum(map(len, parts))
    assert torch.allclose(torch.cat(parts).sort().values, whole.sort().values, atol=1e-5)


def test_losses_are_those_of_the_formula(task):
    trained = task(patterns={"ends": 1.0}, dropout={"text": 0.0, "image": 0.0})
    model = perturbed(trained.build_model()).eval()
    batch = trained.batch(0, VIDEO, range(4))
    losses, places = trained.losses(model, batch.whole)
    expected = []
    for i in range(4):
        x1, eps, t = batch.rows["latents"][i], batch.rows["noise"][i], batch.tensors["times"][i]
        x = t * x1 + (1 - t) * eps
        given = torch.tensor([True, False, False, False, True])
        x[given] = x1[given]
        text = {name: batch.tensors[name][i : i + 1] for name in ("text_ids", "text_mask")}
        v = model(x[None], t[None], **text, given=given[None]).sample[0]
        expected += [(v[frame] - (x1 - eps)[frame]).square().mean() for frame in (1, 2, 3)]
        assert set(places["time"][3 * i : 3 * i + 3].tolist()) == {int(t * 10)}
    assert torch.allclose(losses, torch.stack(expected), atol=1e-5)
    assert places["pattern"].tolist() == [0] * 12
    assert trained.pattern_names == ["ends"]


def test_nan_in_targets_of_given_frames_has_no_effect(task, monkeypatch):
    trained = task(patterns={"first": 1.0}, dropout={"image": 0.0})
    model = perturbed(trained.build_model()).eval()
    batch = trained.batch(0, VIDEO, range(4))
    before, _ = trained.losses(model, batch.whole)

    def with_nan(latents, noise):
        target = latents - noise
        target[:, 0] = torch.nan
        return target

    monkeypatch.setattr("lumos.models.stiv.losses.target_velocity", with_nan)
    after, _ = trained.losses(model, batch.whole)
    assert torch.equal(before, after)


def test_scale_of_the_loss_does_not_depend_on_the_pattern(task):
    for pattern in ("none", "first", "interpolation"):
        trained = task(run=pattern, patterns={pattern: 1.0}, dropout={"image": 0.0})
        batch = trained.batch(0, VIDEO, range(4))
        off = [latents - noise + 2.0 for latents, noise in zip(batch.rows["latents"], batch.rows["noise"], strict=True)]

        def model(x, *_, **__):
            return type("Output", (), {"sample": torch.stack(off)})  # noqa: B023

        losses, _ = trained.losses(model, batch.whole)
        assert float(losses.sum() / batch.supervised) == pytest.approx(4.0, abs=1e-4)


def test_an_idle_micro_batch_has_no_losses_but_gradients(task):
    trained = task()
    model = trained.build_model()
    *_, idle = trained.batch(0, VIDEO, range(2)).micro_batches(1, share=3)
    losses, _ = trained.losses(model, idle)
    assert len(losses) == 0
    losses.sum().backward()
    assert not model.patch_in.weight.grad.any()


def test_min_snr_weights_have_mean_one_and_keep_the_order():
    t = (torch.arange(100_000) + 0.5) / 100_000
    for gamma in (0.3, 1.0, 5.0):
        weights = flow.min_snr_weights(t, gamma)
        assert float(weights.mean()) == pytest.approx(1, abs=1e-3)
        assert float(t[weights.argmax()]) == pytest.approx(gamma**0.5 / (1 + gamma**0.5), abs=1e-3)


def test_clips_of_two_sizes_have_the_losses_of_each_alone(task, monkeypatch):
    trained = task(patterns={"first": 1.0})
    sizes = [(16, 32), (32, 16), (16, 32), (32, 16)]

    def clips(step, shape, positions):
        draws = np.random.default_rng(0)
        made = [TrainingClip(draws.integers(0, 255, (5, *size, 3), np.uint8), f"a red circle {size}", 8, str(i))
                for i, size in enumerate(sizes)]  # fmt: skip
        return [made[i] for i in positions]

    monkeypatch.setattr(trained.source, "clips", clips)
    model = perturbed(trained.build_model()).eval()
    whole, _ = trained.losses(model, trained.batch(0, VIDEO, range(4)).whole)
    alone = [trained.losses(model, trained.batch(0, VIDEO, range(i, i + 1)).whole)[0] for i in range(4)]
    assert torch.allclose(whole.sort().values, torch.cat(alone).sort().values, atol=1e-5)


# ---- runs

@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pictures", "clips", "patterns"])
def test_killed_run_goes_on_bitwise(make, tmp_path, stage, caplog):
    sections = {
        "pictures": {"overrides": {"temporal_attention": False},
                     "data": {"num_frames": 5, "height": 16, "width": 32, "workers": 0, "stages": [{"image_share": 1.0}]}},
        "clips": {"latents": {"statistics_clips": 3}, "mask_ratio": 0.5},
        "patterns": {"patterns": {"none": 1, "first": 1, "ends": 1}, "given_noise": 0.2},
    }[stage]  # fmt: skip
    common = {"ema_decay": 0.9, "optimizer": "adafactor" if stage == "clips" else "muon", "micro_batch_size": 3}
    train(make("whole", common, **sections))
    settings = make("again", common, **sections)
    caplog.set_level("INFO", "lumos")
    train(settings)
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000002")
    shutil.rmtree(tmp_path / "again/export")
    train(settings)
    assert "resumed from step 1" in caplog.text
    assert "changed since that checkpoint" not in caplog.text
    assert logged(tmp_path / "again") == logged(tmp_path / "whole")
    ours, theirs = (StivForVideoGeneration.from_pretrained(tmp_path / run / "export") for run in ("again", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.slow
def test_measured_statistics_normalise_the_latents_and_stay(make, tmp_path, monkeypatch):
    settings = make(latents={"statistics_clips": 6}, training={"max_steps": 1})
    trained = StivTask(settings, CPU)
    latents = torch.cat([trained.batch(step, VIDEO, range(4)).rows["latents"][i][None] for step in range(2) for i in range(4)][:6])
    varies = latents.var(dim=(0, 1, 3, 4)) > 1e-6
    assert varies.any()
    assert torch.allclose(latents.mean(dim=(0, 1, 3, 4)), torch.zeros(3), atol=2e-3)
    assert torch.allclose(latents.var(dim=(0, 1, 3, 4))[varies], torch.ones(()), atol=2e-2)
    train(settings)
    monkeypatch.setattr("lumos.models.stiv.training.measure_statistics", lambda _: pytest.fail("measured again"))
    assert StivTask(settings, CPU).config.latent_mean == trained.config.latent_mean


@pytest.mark.slow
def test_three_stages_each_begin_with_the_one_before(make, tmp_path):
    pictures = {"num_frames": 5, "height": 16, "width": 32, "workers": 0, "stages": [{"image_share": 1.0}]}
    train(make("t2i", overrides={"temporal_attention": False}, data=pictures))
    second = make("t2v", init={"image": str(tmp_path / "t2i/export")}, latents={}, tokenizer={})
    task = StivTask(second, CPU)
    model, before = task.build_model(), StivForVideoGeneration.from_pretrained(tmp_path / "t2i/export")
    assert task.config.latent_mean == before.config.latent_mean == [0.0, 0.1, 0.2]
    assert not any(block.temporal_gain.any() for block in model.blocks)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.state_dict().items())
    train(second)
    made = json.loads((tmp_path / "t2v/export/training.json").read_text())
    assert made["settings"]["init"]["image"] == str(tmp_path / "t2i/export")
    larger = {"num_frames": 5, "height": 32, "width": 32, "workers": 0}
    third = make("stiv", model={"from": str(tmp_path / "t2v/export")}, patterns={"first": 1, "ends": 1}, latents={}, tokenizer={},
                 data=larger)  # fmt: skip
    config = StivTask(third, CPU).config
    assert config.position_scale == {"time": 1.0, "rows": 0.5, "columns": 1.0}
    assert config.trained_grid == {"time": 5, "rows": 2, "columns": 2}
    assert config.patterns == ["ends", "first", "none"]
    train(third)
    clip = VideoPipeline.from_pretrained(tmp_path / "stiv/export", device="cpu")("a red circle", seed=1, num_inference_steps=2)
    assert clip.frames.shape == (1, 5, 32, 32, 3)
    less = make("less", model={"from": str(tmp_path / "stiv/export")}, patterns={"first": 1}, latents={}, tokenizer={}, data=larger)
    with pytest.warns(UserWarning, match="will refuse clips of the patterns ends, .*: this run trains on first, none only"):
        StivTask(less, CPU).build_model()


@pytest.mark.slow
def test_adapters_train_alone_and_load(make, tmp_path):
    pytest.importorskip("peft")
    train(make("base"))
    base = str(tmp_path / "base/export")
    train(make("lora", model={"from": base}, lora={"rank": 2}, latents={}, tokenizer={}))
    pipe = VideoPipeline.from_pretrained(base, lora=tmp_path / "lora/export", device="cpu")
    assert pipe("a red circle", seed=1, num_inference_steps=2).frames.shape == (1, 5, 16, 32, 3)


@pytest.mark.slow
def test_four_clips_are_learned_and_sampled_back(make, tmp_path, times):
    made = train(make(
        "four",
        {"max_steps": times(200, 400), "batch_size": 8, "lr": 4e-3, "optimizer": "muon", "log_every": 50, "save_every_steps": 0},
        data={"num_frames": 5, "height": 16, "width": 32, "workers": 0, "scenes": 4}, dropout={"text": 0.0, "image": 0.0},
        latents={"statistics_clips": 4},
    ))  # fmt: skip
    assert logged(tmp_path / "four")[-1] < 0.15 * logged(tmp_path / "four")[0]
    pipe = VideoPipeline.from_pretrained(made["export"], device="cpu")
    task = StivTask(make("look", data={"num_frames": 5, "height": 16, "width": 32, "workers": 0, "scenes": 4}), CPU)
    for clip in task.source.clips(0, VIDEO, range(4)):
        wanted = pipe.space.encode(clip.frames[None])
        found = pipe(clip.caption, seed=1, guidance_scale=1.0, output_type="latent", num_inference_steps=24).frames[0]
        wanted, found = (pipe.space.network.nearest_codes((x * pipe.space._scale + pipe.space._shift).transpose(1, 2))
                         for x in (wanted, torch.as_tensor(found)[None]))  # fmt: skip
        digits = [pipe.space.network.values(codes) for codes in (wanted, found)]
        assert (digits[0] - digits[1]).abs().max() <= 0.5 + 1e-6  # neighbouring values of 4 levels
        assert (digits[0] != digits[1]).float().mean() < 0.1


# ---- settings

@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"patterns": {"fist": 1}}, "patterns.'fist' is unknown, did you mean first\\? allowed: none, first"),
        ({"patterns": {"first": -1}}, r"patterns.first -1 is not allowed"),
        ({"patterns": {"first": 0}}, "no share above 0"),
        ({"patterns": {"first": True}}, "patterns.first True is not allowed"),
        ({"strides": {0: 1}}, "strides.0 is not allowed; give strides from 1"),
        ({"strides": {1: 0}}, "no share above 0"),
        ({"strides": {"a": 1}}, "strides.'a' is not allowed"),
        ({"given_noise": 0.5}, "given_noise 0.5 has no effect"),
        ({"flow": {"gamma": 3.0}}, "flow.gamma has no effect with flow.weighting=none"),
        ({"flow": {"std": 2.0}}, "flow.std has no effect with flow.times=uniform"),
        ({"masked_loss_weight": 0.5}, "masked_loss_weight has no effect with mask_ratio 0"),
        ({"training": {"attention": "dense"}}, "training.attention has no effect on STIV"),
        ({"data": {"pad_to": 8}}, "data.pad_to has no effect on STIV"),
        ({"init": {"temporal": "x"}}, "init.temporal needs init.image"),
        ({"latents": {"mean": [0.0, 0.0, 0.0]}}, "latents.mean and latents.std belong together"),
        ({"init": {"image": "x"}, "model": {"from": "y"}}, "init.image and model.from both"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(make, sections, said):
    with pytest.raises(UserError, match=said):
        make(**sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"overrides": {"latents": "causal"}}, "model.overrides may not hold latents; it is set by latents.kind"),
        ({"overrides": {"hiden_size": 64}}, "model.overrides.hiden_size is unknown"),
        ({"overrides": {"temporal_attention": False}}, "trains on pictures only"),
        ({"overrides": {"temporal_patch_size": 2}}, "data.num_frames 5: 5 latents along time are no multiple"),
        ({"overrides": {"latent_channels": 5}, "latents": {}}, "has latent_channels 3, the model 5"),
        ({"overrides": {"spatial_compression": 16}}, "has spatial_compression 8, the model 16"),
        ({"latents": {"kind": "causal"}, "patterns": {"interpolation": 1}}, "pattern interpolation needs latents of single frames"),
        ({"latents": {"kind": "causal"}, "patterns": {"ends": 1}}, "pattern ends needs latents of single frames"),
        ({"latents": {"kind": "continuous"}}, "latents continuous cannot be made by this video tokenizer"),
        ({"data": {"num_frames": 4, "height": 16, "width": 32}, "patterns": {"prediction": 1}}, "data.num_frames 4: pattern pred"),
        ({"data": {"num_frames": 5, "height": 24, "width": 32}}, "height 24 of clips is not allowed; give a multiple of 16"),
        ({"data": {"num_frames": 5, "height": 16, "width": 32, "stages": [{"image_share": 1}]}, "patterns": {"first": 1}},
         "trains on pictures only; set patterns"),
        ({"init": {"image": "nowhere"}}, "init.image: nowhere is no model folder"),
    ],
)  # fmt: skip
def test_runs_that_cannot_work_are_refused_before_they_start(make, sections, said):
    with pytest.raises(UserError, match=said):
        StivTask(make(**sections), CPU)


def test_shards_need_latents_of_codes(make):
    data = {"source": "shards", "path": "shards", "num_frames": 5}
    with pytest.raises(UserError, match="latents continuous are made from frames, and shards hold codes"):
        StivTask(make(data=data, latents={"kind": "continuous"}), CPU)


@pytest.mark.slow
def test_causal_latents_train_and_export(make, tmp_path):
    made = train(make(latents={"kind": "causal"}, patterns={"none": 1, "first": 1}))
    config = StivConfig.from_pretrained(made["export"])
    assert config.latents == "causal"
    assert config.trained_grid["time"] == 2
    assert VideoPipeline.from_pretrained(made["export"], device="cpu")("x", seed=0, num_inference_steps=1).frames.shape[1] == 5


def test_what_shards_tell_of_the_source_reaches_the_network(task, monkeypatch):
    """A source of 60 x 100 pixels is scaled to 32 x 53; 32 columns stay, and 10 on the left are cut off."""
    trained = task(data={"num_frames": 5, "height": 32, "width": 32, "workers": 0}, patterns={"none": 1, "first": 1})
    plain, clips = trained.batch(0, VIDEO, range(2)), trained.source.clips(0, VIDEO, range(2))
    told = [replace(clips[0], original_size=(60, 100), stride=2.5), clips[1]]
    monkeypatch.setattr(trained.source, "clips", lambda *_: told)
    batch = trained.batch(0, VIDEO, range(2))
    assert plain.tensors["original_size"].tolist() == [[32, 32], [32, 32]]
    assert batch.tensors["original_size"].tolist() == [[60, 100], [32, 32]]
    assert batch.tensors["crop"].tolist() == [[0, 10], [0, 0]]
    assert batch.tensors["stride"].tolist() == [2.5, trained.config.micro_stride]
    model = trained.build_model()
    for layer in (model.patch_out, model.final_modulation):
        torch.nn.init.normal_(layer.weight)
    losses = [trained.losses(model, found.whole)[0] for found in (plain, batch)]
    same = torch.isclose(*losses).unflatten(0, (2, -1)).all(1)
    assert same.tolist() == [False, True]


def test_short_steps_train_on_the_first_frames(task):
    trained = task(data={"num_frames": 5, "height": 16, "width": 32, "workers": 0,
                         "stages": [{"first_frames": 3, "short_share": 0.5}]}, patterns={"none": 1, "first": 1})  # fmt: skip
    short = trained.batch(0, replace(VIDEO, first_frames=3), range(4))
    assert [len(latents) for latents in short.rows["latents"]] == [3] * 4
    assert short.tensors["num_frames"].tolist() == [3.0] * 4
    whole = trained.batch(0, VIDEO, range(4))
    assert torch.equal(short.rows["latents"][0], whole.rows["latents"][0][:3])


def test_kept_latents_are_those_of_a_new_run_and_are_made_once(task, monkeypatch):
    data = {"num_frames": 5, "height": 16, "width": 32, "workers": 0, "scenes": 6}
    kept, resumed, plain = (task(data=data, latents=LATENTS | {"kept_clips": n}) for n in (5, 5, 0))
    first, second = (kept.batch(step, VIDEO, range(4)) for step in (0, 1))  # scenes 0 to 3, then 4, 5, 0, 1
    assert len(kept.kept_latents) == 5
    again = resumed.batch(1, VIDEO, range(4))
    assert all(torch.equal(a, b) for a, b in zip(second.rows["latents"], again.rows["latents"], strict=True))
    for step, batch in enumerate((first, second)):
        wanted = plain.batch(step, VIDEO, range(4)).rows["latents"]
        for latents, want in zip(batch.rows["latents"], wanted, strict=True):
            torch.testing.assert_close(latents, want)
    encoded = []
    monkeypatch.setattr(kept.space, "encode", lambda clip: encoded.append(len(clip)) or torch.zeros(1, 5, 3, 4, 8))
    kept.batch(2, VIDEO, range(4))  # scenes 2 to 5, of which the last had no room
    assert encoded == [1]


def test_muon_has_the_matrices_of_the_blocks(task):
    trained = task()
    model = trained.build_model()
    names = trained.muon_matrices(model)
    assert "blocks.0.cross.o_proj.weight" in names
    assert "text_encoder.blocks.0.up_proj.weight" in names
    assert not any(part in name for name in names for part in ("modulation", "patch", "conditions", "embedding", "norm"))
    assert len(names) == 3 * 14 + 6


def test_prediction_pattern_gives_what_its_name_says():
    assert given_frames("prediction", 5) == {0, 1, 2, 3}
    assert given_frames("prediction", 3, "causal") == {0, 1}


def test_shipped_recipes_are_valid(repo, monkeypatch):
    monkeypatch.chdir(repo)
    files = sorted(Path("configs/stiv").glob("*.yaml"))
    assert len(files) >= 10
    assert all(load_settings(file).generator == "stiv" for file in files)
