"""The discriminator scores patches at several scales; its training acts on the tokenizer, and resumes exactly."""

from __future__ import annotations

import pytest
import torch
from small_training import log_lines, losses_of, small, stop_in_step, stopped_after

from lumos.data.curriculum import StepShape
from lumos.training.adversarial import critic_losses
from lumos.training.tokenizer.discriminator import Discriminator, mean_loss
from lumos.training.tokenizer.settings import loop_settings
from lumos.training.tokenizer.task import TokenizerTask, train
from tokenizer import VideoTokenizer


def test_each_scale_scores_the_patches_of_all_frames():
    network = Discriminator(channels=4)
    assert [tuple(s.shape) for s in network(torch.zeros(2, 3, 5, 64, 32))] == [(2, 5 * 8 * 4), (2, 5 * 4 * 2), (2, 5 * 2 * 1)]
    assert len(network(torch.zeros(1, 3, 1, 16, 16))) == 2  # a quarter of 16 pixels is too small for a patch


def test_clips_are_scored_apart():
    network, video = Discriminator(channels=4), torch.randn(3, 3, 2, 32, 32)
    alone = torch.cat([mean_loss(network(part)) for part in video.split(1)])
    torch.testing.assert_close(mean_loss(network(video)), alone)


def test_scales_weigh_the_same():
    scores = [torch.tensor([[0.0, 2.0]]), torch.tensor([[5.0]])]
    assert mean_loss(scores).tolist() == [3.0]


def test_a_discriminator_learns_to_tell_light_from_dark():
    torch.manual_seed(0)
    network = Discriminator(channels=4)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        real, fake = (light + 0.1 * torch.randn(4, 3, 1, 16, 16) for light in (0.5, -0.5))
        loss = mean_loss([critic_losses(a, b) for a, b in zip(network(real), network(fake), strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # 2 at the start


def task_of(tmp_path, **changes) -> TokenizerTask:
    return TokenizerTask(loop_settings(small(tmp_path, share_worlds=0.5, **changes)), torch.device("cpu"))


def test_the_two_networks_have_losses_of_their_own(tmp_path):
    task = task_of(tmp_path, adversarial_weight=0.5, discriminator_channels=4)
    plain = task_of(tmp_path)
    model, network = task.build_model(), task.build_auxiliary()
    assert plain.build_auxiliary() is None
    micro = task.batch(0, StepShape("video", 3), range(3)).whole
    expected, _ = plain.losses(model, dict(micro))
    losses, _ = task.losses(model, micro)
    assert losses.shape == (3,)
    assert not torch.allclose(losses, expected)
    (losses - expected).sum().backward()
    assert model.encoder.conv_in[0].conv3d.weight.grad.norm() > 0
    network.zero_grad()
    judged = task.auxiliary_losses(model, network, micro)
    assert judged.shape == (3,)
    assert judged.mean().item() == pytest.approx(2, abs=1)
    model.zero_grad()
    judged.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in network.scales[0].parameters())


def test_an_idle_part_of_a_step_has_no_losses(tmp_path):
    task = task_of(tmp_path, adversarial_weight=0.5, discriminator_channels=4)
    model, network = task.build_model(), task.build_auxiliary()
    idle = task.batch(0, StepShape("video", 3), range(1)).micro_batches(1, share=2)[1]
    assert task.losses(model, idle)[0].shape == (0,)
    losses = task.auxiliary_losses(model, network, idle)
    assert losses.shape == (0,)
    losses.sum().backward()  # in step with other processes


@pytest.mark.slow
def test_a_killed_adversarial_run_goes_on_exactly(tmp_path, monkeypatch):
    changes = {
        "adversarial_weight": 0.5, "discriminator_channels": 4, "ema_decay": 0.9, "muon_lr": 0.02, "export_dtype": "float32",
        "precision": "bf16", "micro_batch_size": 2,
    }  # fmt: skip
    train(small(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        assert stopped_after(train(small(tmp_path / "killed", **changes))) == 3
    assert train(small(tmp_path / "killed", **changes))["steps"] == 6
    folders = [tmp_path / name for name in ("whole", "killed")]
    whole, killed = (VideoTokenizer.from_pretrained(folder / "video_tokenizer").state_dict() for folder in folders)
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert losses_of(folders[0]) == losses_of(folders[1])
    assert all(line["auxiliary_loss"] > 0 for line in log_lines(folders[0]) if "loss" in line and "event" not in line)
