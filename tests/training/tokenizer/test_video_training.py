"""Training of the video tokenizer: it learns, resumes exactly, uses no test data, and refuses impossible settings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import MODEL, log_lines, losses_of, small, stop_in_step, stopped_after

from lumos.cli import main
from lumos.errors import RunError, UserError
from lumos.training.engine import make_optimizer, set_learning_rate
from lumos.training.loop import Run, expected_steps
from lumos.training.schedule import learning_rate
from lumos.training.tokenizer.clips import TrainingClips
from lumos.training.tokenizer.settings import loop_settings
from lumos.training.tokenizer.task import TokenizerTask, foreground_weight, train
from tokenizer import VideoTokenizer, VideoTokenizerConfig


@pytest.mark.slow
def test_a_short_training_lowers_the_loss(tmp_path):
    metrics = train(small(tmp_path, steps=40, log_every=5, validate_every=20))
    losses = losses_of(tmp_path)
    assert np.mean(losses[-2:]) < 0.7 * losses[0]
    assert metrics["steps"] == 40
    assert metrics["psnr_worlds"] > 5
    measured = [line for line in log_lines(tmp_path) if "psnr_worlds" in line and "event" not in line]
    assert {line["step"] for line in measured} == {20, 40}
    assert all(0 < line["codes_used"] <= 1 < line["psnr_photographs"] for line in measured)
    folder = tmp_path / "video_tokenizer"
    record = json.loads((folder / "training.json").read_text())
    assert record["settings"]["lr"] == 3e-3
    assert record["metrics"]["psnr_worlds"] == metrics["psnr_worlds"]
    assert record["metrics"]["finished"]
    assert record["metrics"]["step"] == 40
    model = VideoTokenizer.from_pretrained(folder)
    assert model.num_codes == record["metrics"]["codes"] == 100
    assert record["metrics"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert (tmp_path / "samples" / "worlds-000020.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ema_decay", "muon_lr"), [(0.0, 0.0), (0.9, 0.02), pytest.param(0.9, 0.0, marks=pytest.mark.thorough)]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, ema_decay, muon_lr):
    changes = {"ema_decay": ema_decay, "muon_lr": muon_lr, "model": MODEL | {"dropout": 0.1}, "export_dtype": "float32"}
    train(small(tmp_path / "whole", **changes))

    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        assert stopped_after(train(small(tmp_path / "killed", **changes))) == 3
    assert not (tmp_path / "killed" / "video_tokenizer").exists()
    assert train(small(tmp_path / "killed", **changes))["steps"] == 6

    whole, killed = (
        VideoTokenizer.from_pretrained(tmp_path / name / "video_tokenizer").state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("muon_lr", "ema_decay", "micro_batch_size"), [(0.0, 0.0, None), (0.02, 0.9, 2)])
def test_losses_are_those_of_a_plain_loop(tmp_path, muon_lr, ema_decay, micro_batch_size):
    """Settings with scenes, textures and photographs, clips and pictures, clipped gradients and weight decay."""
    settings = small(
        tmp_path, muon_lr=muon_lr, ema_decay=ema_decay, micro_batch_size=micro_batch_size, batch_size=3, pictures_per_batch=2,
        share_worlds=0.5, share_textures=0.5, recolour=True, log_every=1, weight_decay=0.1, steps=5, export_dtype="float32",
        picture_weight=0.7, validation_clips=1,
    )  # fmt: skip
    train(settings)
    losses, weights = plain_training(settings)
    assert losses_of(tmp_path) == pytest.approx(losses, rel=1e-4)
    exported = VideoTokenizer.from_pretrained(tmp_path).state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-2, atol=2e-3)
        far = ((exported[name] - weight).abs() > 1e-3 + 1e-2 * weight.abs()).sum()
        assert far <= 1 + weight.numel() // 1000, name  # AdamW divides a gradient that is nearly zero by its own size


def plain_training(settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process on whole batches by the plain rules; return the losses, and the averaged weights if there are any."""
    torch.manual_seed(settings.seed)
    model = VideoTokenizer(VideoTokenizerConfig.from_dict(settings.model)).train()
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    average = {name: p.detach().clone() for name, p in parameters.items()}
    clips = TrainingClips(
        seed=settings.seed, height=settings.height, width=settings.width, num_frames=settings.num_frames,
        batch_size=settings.batch_size, pictures_per_batch=settings.pictures_per_batch, share_worlds=settings.share_worlds,
        film_sources=settings.films, share_textures=settings.share_textures, recolour=settings.recolour,
    )  # fmt: skip
    losses = []
    for step in range(settings.steps):
        loss = 0.0
        for weight, (video, is_world) in zip((1.0, settings.picture_weight), clips.batch(step).videos("cpu"), strict=True):
            values, _ = model.quantize(model.encode_latent(video))
            error = model.decode_latent(values) - video
            weights = foreground_weight(video, is_world, settings.foreground_weight)
            loss = loss + weight * (weights * (settings.l1_weight * error.abs() + settings.mse_weight * error.square())).mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))
        limits = {"lr": settings.lr, "min_lr": settings.min_lr, "warmup_steps": settings.warmup_steps, "max_steps": settings.steps}
        share = learning_rate(step, **limits) / settings.lr
        with torch.no_grad():
            for name, gradient in gradients.items():
                gradient, p = gradient * min(1.0, settings.max_grad_norm / (float(norm) + 1e-6)), parameters[name]
                is_matrix = p.dim() > 1
                if settings.muon_lr and is_matrix:
                    lr = settings.muon_lr * share
                    first[name] = 0.95 * first[name] + 0.05 * gradient
                    x = (0.05 * gradient + 0.95 * first[name]).view(len(p), -1)
                    x, largest = x / (x.norm() + 1e-7), max(x.shape)
                    for _ in range(5):
                        square = x @ x.T
                        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                    p.mul_(1 - lr * settings.weight_decay).sub_(lr * 0.2 * largest**0.5 * x.view_as(p))
                    continue
                lr, (beta1, beta2) = settings.lr * share, settings.betas
                first[name] = beta1 * first[name] + (1 - beta1) * gradient
                second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
                ahead = first[name] / (1 - beta1 ** (step + 1))
                spread = (second[name] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
                p.mul_(1 - lr * settings.weight_decay * is_matrix).sub_(lr * ahead / spread)
            decay = min(settings.ema_decay, (2 + step) / (11 + step))
            for name, p in parameters.items():
                average[name] = decay * average[name] + (1 - decay) * p if settings.ema_decay else p.detach()
    return losses, average


@pytest.mark.slow
def test_a_run_with_other_settings_does_not_go_on(tmp_path):
    train(small(tmp_path, steps=2))
    with pytest.raises(ValueError, match=r"lr was 0.003, now 0.001"):
        train(small(tmp_path, steps=2, lr=1e-3))


def rewrite_state(folder, change) -> None:
    """Write the state after `change(state)` as an earlier version did, without a checksum."""
    file = folder / "state.json"
    state = json.loads(file.read_text())
    state["format"] = 2
    del state["checksum"]
    change(state)
    file.write_text(json.dumps(state))


@pytest.mark.slow
def test_a_setting_that_an_old_checkpoint_lacks_is_default(tmp_path):
    train(small(tmp_path, steps=2))
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    rewrite_state(folder, lambda state: [state["identity"].pop(newer) for newer in ("train_encoder", "films", "betas")])
    assert train(small(tmp_path, steps=2))["export"]
    with pytest.raises(UserError, match=r"of another run: betas was \[0\.9, 0\.99\], now \[0\.8, 0\.99\]; name another output_dir"):
        train(small(tmp_path, steps=2, betas=[0.8, 0.99]))


@pytest.mark.slow
def test_a_checkpoint_of_the_earlier_loop_is_refused(tmp_path):
    train(small(tmp_path, steps=2))
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    def as_before(state):
        kept = {key: state[key] for key in ("format", "step", "settings", "world", "files")}
        state.clear()
        state.update(kept | {"seconds": 1.0, "meters": {}, "fit_seconds": 0.0})

    rewrite_state(folder, as_before)
    with pytest.raises(UserError, match=r"step-00000002 was written by an earlier version.*; name another output_dir, or move"):
        train(small(tmp_path, steps=2))


@pytest.mark.slow
def test_a_tokenizer_run_is_no_model_to_export(tmp_path, capsys):
    train(small(tmp_path, steps=2))
    for source in (tmp_path, tmp_path / "checkpoints" / "step-00000002"):
        assert main(["export", str(source), "--out", str(tmp_path / "out")]) == 2
        assert "step-00000002 is of a training of the video tokenizer" in capsys.readouterr().err


def optimizer_of(tmp_path, **changes) -> tuple[dict[str, torch.Tensor], torch.optim.AdamW]:
    """Return the weights of a small tokenizer with random gradients, and their optimizer."""
    torch.manual_seed(0)
    model = VideoTokenizer(VideoTokenizerConfig.from_dict(MODEL))
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    settings, cpu = loop_settings(small(tmp_path, lr=1e-3, **changes)), torch.device("cpu")
    return parameters, make_optimizer(model, settings, cpu, TokenizerTask(settings, cpu).muon_matrices(model))


def changes_of(parameters: dict[str, torch.Tensor], optimizer: torch.optim.AdamW, share: float) -> dict[str, torch.Tensor]:
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    set_learning_rate(optimizer, 1e-3 * share)
    optimizer.step()
    return {name: (parameter - before[name]).detach() for name, parameter in parameters.items()}


def test_muon_updates_convolutions_and_adamw_the_rest(tmp_path):
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
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    assert not any(change.any() for change in changes_of(parameters, optimizer, share=0.0).values())


def test_without_muon_adamw_updates_all(tmp_path):
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


@pytest.mark.slow
def test_a_time_budget_ends_the_run(tmp_path):
    metrics = train(small(tmp_path, steps=100_000, max_minutes=0.01))
    assert metrics["export"]
    assert 0 < metrics["steps"] < 100_000


@pytest.mark.parametrize(("step", "share", "expected"), [(1, 0.0, 1000), (30, 0.25, 120), (30, 0.01, 1000), (7, 1.1, 7)])
def test_the_progress_line_counts_to_the_steps_that_fit_in(step, share, expected):
    assert expected_steps(step, share, 1000) == expected


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    errors = TokenizerTask._errors
    monkeypatch.setattr(TokenizerTask, "_errors", lambda *given: errors(*given) * float("nan"))
    with pytest.raises(RunError, match=r"step 1: the loss is nan; the weights were not .*resume with a lower lr or max_grad_norm"):
        train(small(tmp_path))
    (event,) = [line for line in log_lines(tmp_path) if line.get("event") == "not_finite"]
    assert event["clips"] == ["step 0, clip", "step 0, clip", "step 0, picture"]


@pytest.mark.slow
def test_half_precision_trains_and_leaves_whole_weights(tmp_path, monkeypatch):
    formats = set()
    decode = VideoTokenizer.decode_latent

    def watched(self, *args):
        video = decode(self, *args)
        formats.add(video.dtype if self.training else None)
        return video

    monkeypatch.setattr(VideoTokenizer, "decode_latent", watched)
    train(small(tmp_path, precision="bf16", steps=30, log_every=5, muon_lr=0.003))
    losses = losses_of(tmp_path)
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    assert torch.bfloat16 in formats
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    tensors = load_file(checkpoint / "rank-0000.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.startswith("random.")} == {torch.float32}


def test_weights_in_half_precision_need_a_gpu(tmp_path):
    settings = loop_settings(small(tmp_path, precision="bf16", zero_stage=1))
    with pytest.raises(UserError, match=r"zero_stage 1 keeps weights in bf16.*: take precision=fp32, or zero_stage=0"):
        TokenizerTask(settings, torch.device("cpu"))


@pytest.mark.slow
def test_a_time_budget_compresses_the_schedule(tmp_path, monkeypatch):
    """A step takes 6 s of the minute, so each of ten steps has the learning rate at its tenth of the run, also after a resume."""
    clock, step = [0.0], Run._train_step
    monkeypatch.setattr("lumos.training.loop.time.monotonic", lambda: clock[0])

    def slow(self, batch, stop, due):
        told = step(self, batch, self.step == 3, due)
        clock[0] += 6
        return told

    monkeypatch.setattr(Run, "_train_step", slow)
    changes = {"warmup_steps": 0, "log_every": 1}
    limited = small(tmp_path / "limited", steps=100_000, max_minutes=1.0, **changes)
    assert (train(limited)["export"], train(limited)["steps"]) == (None, 10)
    expected = [learning_rate(10_000 * k, lr=3e-3, min_lr=3e-5, max_steps=100_000, warmup_steps=0) for k in range(10)]
    assert [line["lr"] for line in log_lines(tmp_path / "limited") if "lr" in line] == pytest.approx(expected)
    assert train(limited)["steps"] == 10
