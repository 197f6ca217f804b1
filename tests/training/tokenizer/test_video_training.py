"""Training the video tokenizer: it learns, resumes exactly, keeps test material out, and refuses what it cannot do."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_training import MODEL, log_lines, small

from lumos.data.synthetic.render import Worlds
from lumos.errors import RunError, UserError
from lumos.training.schedule import learning_rate
from lumos.training.tokenizer import loop as tokenizer_training
from lumos.training.tokenizer.clips import TrainingClips, films, held_out_photographs, held_out_worlds, photographs, to_video
from lumos.training.tokenizer.loop import _Optimizer, foreground_weight, train, validate
from lumos.video.io import write_video
from tokenizer import VideoTokenizer, VideoTokenizerConfig
from tokenizer.resizing import double, same_codes


def test_a_short_training_lowers_the_loss_and_leaves_a_tokenizer(tmp_path):
    metrics = train(small(tmp_path, steps=40, log_every=5, validate_every=20))
    losses = [line["loss"] for line in log_lines(tmp_path) if "loss" in line]
    assert np.mean(losses[-2:]) < 0.7 * losses[0]
    assert metrics["finished"]
    assert metrics["psnr_worlds"] > 5
    folder = tmp_path / "video_tokenizer"
    record = json.loads((folder / "training.json").read_text())
    assert record["settings"]["lr"] == 3e-3
    assert record["metrics"]["psnr_worlds"] == metrics["psnr_worlds"]
    model = VideoTokenizer.from_pretrained(folder)
    assert model.num_codes == metrics["codes"] == 100
    assert (tmp_path / "samples" / "worlds-000020.png").is_file()


@pytest.mark.parametrize(("ema_decay", "muon_lr"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.02)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, ema_decay, muon_lr):
    changes = {"ema_decay": ema_decay, "muon_lr": muon_lr, "model": MODEL | {"dropout": 0.1}, "export_dtype": "float32"}
    train(small(tmp_path / "whole", **changes))

    calls = []
    loss_of = tokenizer_training.batch_loss

    def kill_in_step_three(*args):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_of(*args)

    monkeypatch.setattr(tokenizer_training, "batch_loss", kill_in_step_three)
    assert train(small(tmp_path / "killed", **changes)) == {"finished": False, "step": 3}
    assert not (tmp_path / "killed" / "video_tokenizer").exists()
    metrics = train(small(tmp_path / "killed", **changes))
    assert len(calls) == 6
    assert metrics["step"] == 6

    whole, killed = (
        VideoTokenizer.from_pretrained(tmp_path / name / "video_tokenizer").state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    logs = [[(line["step"], line.get("loss")) for line in log_lines(tmp_path / name)] for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_a_run_with_other_settings_does_not_go_on(tmp_path):
    train(small(tmp_path, steps=2))
    with pytest.raises(ValueError, match=r"lr was 0.003, now 0.001"):
        train(small(tmp_path, steps=2, lr=1e-3))


def rewrite_state(folder, change) -> None:
    """As an earlier version wrote the state, without a checksum, after `change(state)`."""
    file = folder / "state.json"
    state = json.loads(file.read_text())
    state |= {"format": 2, "world": state.pop("processes")}
    del state["checksum"]
    change(state)
    file.write_text(json.dumps(state))


def test_a_setting_that_is_newer_than_the_checkpoint_was_as_usual(tmp_path):
    train(small(tmp_path, steps=2))
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    rewrite_state(folder, lambda state: [state["settings"].pop(newer) for newer in ("train_encoder", "films", "betas")])
    assert train(small(tmp_path, steps=2))["finished"]


def test_a_run_with_another_number_of_processes_does_not_go_on(tmp_path):
    train(small(tmp_path, steps=2))
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    rewrite_state(folder, lambda state: state.update(world=2))
    with pytest.raises(UserError, match=r"made with 2 processes, this run has 1: start as many, or take another output_dir"):
        train(small(tmp_path, steps=2))


def optimizer_of(tmp_path, **changes) -> tuple[dict[str, torch.Tensor], _Optimizer]:
    """The weights of a small tokenizer with random gradients, and their optimizer."""
    torch.manual_seed(0)
    parameters = dict(VideoTokenizer(VideoTokenizerConfig.from_dict(MODEL)).named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    return parameters, _Optimizer(parameters, small(tmp_path, lr=1e-3, **changes))


def changes_of(parameters: dict[str, torch.Tensor], optimizer: _Optimizer, share: float) -> dict[str, torch.Tensor]:
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step(share)
    return {name: (parameter - before[name]).detach() for name, parameter in parameters.items()}


def test_muon_turns_the_convolutions_and_adamw_the_rest(tmp_path):
    parameters, optimizer = optimizer_of(tmp_path, muon_lr=0.02, weight_decay=0.0)
    changes = changes_of(parameters, optimizer, share=0.5)
    kinds = {name: parameters[name].dim() for name in changes}
    assert {"encoder.conv_in.0.conv3d.weight", "decoder.conv_out.0.conv3d.weight"} <= {n for n, d in kinds.items() if d > 1}
    for name, change in changes.items():
        if kinds[name] > 1:
            # Orthogonal steps: all singular values alike, at 0.5 * muon_lr, larger for large matrices. AdamW's are not.
            matrix = change.flatten(1)
            step = 0.01 * 0.2 * max(matrix.shape) ** 0.5
            values = torch.linalg.svdvals(matrix) / step
            assert 0.6 < values.median() <= values.max() < 1.3, name
        else:
            torch.testing.assert_close(change, -0.5e-3 * parameters[name].grad.sign(), rtol=1e-3, atol=1e-6)
    assert not any(change.any() for change in changes_of(parameters, optimizer, share=0.0).values())


def test_without_muon_adamw_takes_all(tmp_path):
    parameters, optimizer = optimizer_of(tmp_path, weight_decay=0.0)
    for name, change in changes_of(parameters, optimizer, share=0.5).items():
        torch.testing.assert_close(change, -0.5e-3 * parameters[name].grad.sign(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("muon_lr", "lr"), [(0.0, 1e-3), (0.02, 0.02)])
def test_only_matrices_decay(tmp_path, muon_lr, lr):
    parameters, optimizer = optimizer_of(tmp_path, muon_lr=muon_lr, weight_decay=0.5)
    for parameter in parameters.values():
        parameter.grad.zero_()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, change in changes_of(parameters, optimizer, share=1.0).items():
        kept = lr * 0.5 if before[name].dim() > 1 else 0.0
        torch.testing.assert_close(change, -kept * before[name], rtol=1e-3, atol=1e-7)


def test_a_time_budget_ends_the_run(tmp_path):
    metrics = train(small(tmp_path, steps=100_000, max_minutes=0.01))
    assert metrics["finished"]
    assert 0 < metrics["step"] < 100_000


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "batch_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(RunError, match=r"loss is nan at step 0"):
        train(small(tmp_path))


@pytest.mark.parametrize("weight", [13, 13.0])
def test_foreground_counts_as_often_as_it_is_told(weight):
    video = torch.full((2, 3, 1, 8, 8), -0.5)
    video[:, :, :, 2:4, 2:4] = 0.5
    weights = foreground_weight(video, torch.tensor([True, False]), weight)
    inside, outside = weights[0, 0, 0, 2, 2], weights[0, 0, 0, 0, 0]
    assert inside / outside == pytest.approx(13)
    assert weights.mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1, 1])
    assert (weights[1] == 1).all()


def test_a_gradient_is_no_foreground():
    video = torch.linspace(-1, 1, 8)[:, None].expand(1, 3, 2, 8, 8).clone()
    video[..., 3, 2:4] += 0.4
    weights = foreground_weight(video, torch.tensor([True]), 13)
    assert (weights > weights.min()).sum() == 2 * 2
    assert weights.max() / weights.min() == pytest.approx(13)


def clips_of(**changes) -> TrainingClips:
    options = {
        "seed": 0,
        "height": 16,
        "width": 24,
        "num_frames": 5,
        "batch_size": 4,
        "pictures_per_batch": 3,
        "share_worlds": 0.5,
        "film_sources": [],
    }
    return TrainingClips(**(options | changes))


def test_batches_are_a_pure_function_of_the_step():
    clips = clips_of()
    later = clips.batch(7)
    again = clips_of().batch(7)
    assert later.clips.shape == (4, 5, 16, 24, 3)
    assert later.pictures.shape == (3, 1, 16, 24, 3)
    assert all(torch.equal(a, b) for a, b in zip(vars(later).values(), vars(again).values(), strict=True))
    assert not torch.equal(later.clips, clips.batch(8).clips)
    (videos, worlds), (pictures, _) = later.videos("cpu")
    assert torch.equal(videos, to_video(later.clips.numpy()))
    assert torch.equal(worlds, later.clip_is_world)
    assert pictures.shape == (3, 3, 1, 16, 24)
    assert -1 <= videos.min() < videos.max() <= 1


def test_worlds_and_real_material_are_mixed_as_told():
    clips = clips_of()
    flags = torch.cat([clips.batch(step).clip_is_world for step in range(20)])
    assert 20 <= flags.sum() <= 60
    assert clips_of(share_worlds=1.0).batch(0).clip_is_world.all()
    only_real = clips_of(share_worlds=0.0)
    assert not only_real.batch(0).clip_is_world.any()
    assert only_real.real_names
    moves = [(clip[0].float() - clip[-1]).abs().mean() for clip in only_real.batch(0).clips]
    assert min(moves) > 0


def test_sprites_are_trained_on_where_asked():
    options = {"kinds": ["sprites"], "share_two": 1.0}
    batch = clips_of(share_worlds=1.0, world_options=options).batch(2)
    worlds = Worlds(seed=0, num_frames=5, height=16, width=24, **options)
    for slot in range(4):
        assert np.array_equal(batch.clips[slot], worlds[2 * (4 + 3) + slot][0])
    held_out = held_out_worlds(2, 5, 16, 24, **options)
    assert torch.equal(held_out[1], to_video([replace(worlds, seed=10_007, split="held_out")[1][0]])[0])


def test_a_run_with_sprites_goes_on_with_the_same_worlds_only(tmp_path):
    changes = {"worlds": {"kinds": ["sprites"]}, "steps": 2}
    assert train(small(tmp_path, **changes))["finished"]
    record = json.loads((tmp_path / "video_tokenizer" / "training.json").read_text())
    assert record["settings"]["worlds"] == {"kinds": ["sprites"]}
    assert train(small(tmp_path, **changes))["step"] == 2
    with pytest.raises(UserError, match=r"worlds was \{'kinds': \['sprites'\]\}, now \{\}"):
        train(small(tmp_path, steps=2))


def test_missing_pictures_end_the_run_before_it_begins(no_sprite_pictures, tmp_path):
    with pytest.raises(UserError, match="LUMOS_SPRITES names this folder: unset it"):
        train(small(tmp_path / "run", worlds={"kinds": ["sprites"]}))
    assert not (tmp_path / "run").exists()


def test_test_material_is_never_trained_on(tmp_path):
    for name in ("carphone_pristine.mp4", "street.mp4"):
        write_video(tmp_path / name, np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), np.uint8), fps=8)
    assert [path.name for path in films([str(tmp_path)])] == ["street.mp4"]
    assert [path.name for path in films([str(tmp_path)], held_out=True)] == ["carphone_pristine.mp4"]
    names = clips_of(film_sources=[str(tmp_path)]).real_names
    assert "street.mp4" in names
    assert not {"astronaut.png", "coffee.png", "china.jpg", "carphone_pristine.mp4"} & set(names)
    assert {path.name for path in photographs(held_out=True)}.isdisjoint(path.name for path in photographs())
    with pytest.raises(UserError, match=r"'nowhere\.mp4' does not exist"):
        films(["nowhere.mp4"])


def test_held_out_photographs_fill_the_size():
    pictures = held_out_photographs(16, 24)
    assert pictures.shape == (3, 3, 1, 16, 24)
    assert pictures.std(dim=(1, 2, 3, 4)).min() > 0.1


def test_films_shorter_than_a_clip_are_left_out(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.gif")
    assert clips_of(film_sources=[str(tmp_path)]).films == []


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
def test_processes_draw_what_the_run_itself_would(tmp_path, monkeypatch):
    """Also after a signal to all of them."""
    changes = {"model": MODEL | {"dropout": 0.1}, "share_textures": 0.5, "recolour": True, "share_worlds": 0.5}
    train(small(tmp_path / "itself", **changes))
    report = tokenizer_training._Run._one_step

    def signal_in_step_two(self, *args):
        report(self, *args)
        if self.step == 2:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_training._Run, "_one_step", signal_in_step_two)
        assert train(small(tmp_path / "drawn", processes=2, **changes)) == {"finished": False, "step": 2}
    assert not multiprocessing.active_children()
    train(small(tmp_path / "drawn", processes=1, **changes))
    losses = [[(line["step"], line.get("loss")) for line in log_lines(tmp_path / name)] for name in ("itself", "drawn")]
    assert losses[0] == losses[1]
    assert not multiprocessing.active_children()


def test_a_killed_process_ends_the_run(tmp_path, monkeypatch):
    step = tokenizer_training._Run._one_step

    def kill(self, *args):
        step(self, *args)
        for process in multiprocessing.active_children()[:1]:
            process.kill()

    monkeypatch.setattr(tokenizer_training._Run, "_one_step", kill)
    with pytest.raises(RunError, match="a process that makes batches ahead was killed"):
        train(small(tmp_path, processes=2, steps=200))
    assert not multiprocessing.active_children()


def test_a_run_starts_from_another_one(tmp_path):
    """It begins at that one's quality, with all of its weights to be trained; another shape is refused."""
    first = train(small(tmp_path / "first", steps=40, export_dtype="float32"))
    folder = tmp_path / "first" / "video_tokenizer"
    again = {"start_from": str(folder), "steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "export_dtype": "float32"}
    second = train(small(tmp_path / "second", lr=1e-9, min_lr=0.0, **again))
    assert second["psnr_worlds"] == pytest.approx(first["psnr_worlds"], abs=1e-3)
    train(small(tmp_path / "third", lr=1e-3, **again))
    before, after = (
        VideoTokenizer.from_pretrained(tmp_path / name / "video_tokenizer").state_dict() for name in ("first", "third")
    )
    model = VideoTokenizer.from_pretrained(folder).train().requires_grad_(True)
    tokenizer_training.batch_loss(model, clips_of().batch(0), small(tmp_path), torch.device("cpu")).backward()
    # What attention asks with has no gradient where there is but one key, nor has what is the same for all keys.
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None and "attn" not in name}
    assert len(used) > 30
    assert {name for name in used if torch.equal(before[name], after[name])} == set()
    other = {**again, "model": MODEL | {"channels": 16}}
    with pytest.raises(UserError, match=r"start_from .* has another config than model: channels 8 there, 16 here"):
        train(small(tmp_path / "fourth", **other))
    with pytest.raises(UserError, match="start_from nowhere cannot be read"):
        train(small(tmp_path / "fifth", **{**again, "start_from": "nowhere"}))


def test_a_run_for_twice_the_size_learns_what_is_sharp_and_keeps_the_codes(tmp_path, monkeypatch):
    """It starts from a tokenizer of the size; a run stopped in between ends with the same weights."""
    model = MODEL | {"pointwise_ends": True}
    train(small(tmp_path / "first", steps=40, export_dtype="float32", model=model))
    start = VideoTokenizer.from_pretrained(tmp_path / "first")
    wide = {
        "model": model | {"spatial_patch_size": 2, "spatial_compression": 16, "resolution": 2048},
        "start_from": str(tmp_path / "first" / "video_tokenizer"),
        "train_encoder": False,
        "height": 32,
        "width": 32,
        "steps": 30,
        "ema_decay": 0.5,
        "export_dtype": "float32",
    }
    trained = train(small(tmp_path / "wide", **wide))
    before = validate(double(start), held_out_worlds(2, 5, 32, 32), torch.empty(0, 3, 1, 32, 32))[0]
    assert trained["psnr_worlds"] > before["psnr_worlds"] + 0.1
    found = VideoTokenizer.from_pretrained(tmp_path / "wide")
    assert same_codes(start, found)
    assert found.decoder.conv_out.conv3d.weight.unflatten(0, (64, 4, 3))[:, 1:].abs().max() > 1e-3

    one_step = tokenizer_training._Run._one_step

    def stop_after_eleven(run, *args):
        one_step(run, *args)
        run.stop_requested = run.step == 11

    monkeypatch.setattr(tokenizer_training._Run, "_one_step", stop_after_eleven)
    assert train(small(tmp_path / "again", **wide)) == {"finished": False, "step": 11}
    train(small(tmp_path / "again", **wide))
    again = VideoTokenizer.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in found.state_dict().items())


def test_an_encoder_stays_only_where_there_is_one_that_is_always_the_same(tmp_path):
    train(small(tmp_path / "first", steps=2, model=MODEL | {"dropout": 0.1}))
    start = {"start_from": str(tmp_path / "first" / "video_tokenizer"), "model": MODEL | {"dropout": 0.1}}
    with pytest.raises(UserError, match=r"model.dropout 0.1 is not possible with train_encoder=false"):
        train(small(tmp_path / "second", train_encoder=False, **start))
    assert train(small(tmp_path / "second", train_encoder=False, **(start | {"model": MODEL})))["finished"]
    assert same_codes(*(VideoTokenizer.from_pretrained(tmp_path / name / "video_tokenizer") for name in ("first", "second")))
    with pytest.raises(UserError, match="train_encoder False is not possible: allowed is true without start_from"):
        small(tmp_path, train_encoder=False)


def test_half_precision_trains_on_a_cpu_and_leaves_whole_weights(tmp_path, monkeypatch):
    formats = set()
    decode = VideoTokenizer.decode_latent

    def watched(self, *args):
        video = decode(self, *args)
        formats.add(video.dtype if self.training else None)
        return video

    monkeypatch.setattr(VideoTokenizer, "decode_latent", watched)
    train(small(tmp_path, precision="bf16", steps=30, log_every=5, muon_lr=0.003))
    losses = [line["loss"] for line in log_lines(tmp_path) if "loss" in line]
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    assert torch.bfloat16 in formats
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    assert {tensor.dtype for tensor in load_file(checkpoint / "rank-0000.safetensors").values()} == {torch.float32}


def test_a_time_budget_compresses_the_schedule(tmp_path, monkeypatch):
    """A step takes 6 s of the minute: each of the ten has the learning rate of its tenth of all steps, also in two parts."""
    clock, step = [0.0], tokenizer_training._Run._one_step
    monkeypatch.setattr(tokenizer_training, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(self, *args):
        step(self, *args)
        clock[0] += 6
        self.stop_requested = self.step == 4

    monkeypatch.setattr(tokenizer_training._Run, "_one_step", slow)
    changes = {"warmup_steps": 0, "log_every": 1}
    limited = small(tmp_path / "limited", steps=100_000, max_minutes=1.0, **changes)
    assert not train(limited)["finished"]
    assert train(limited)["step"] == 10
    expected = [learning_rate(10_000 * k, lr=3e-3, min_lr=3e-5, max_steps=100_000, warmup_steps=0) for k in range(10)]
    assert [line["lr"] for line in log_lines(tmp_path / "limited") if "lr" in line] == pytest.approx(expected)
