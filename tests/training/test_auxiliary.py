"""A task with a second network: the loop trains, saves and resumes both networks, and knows neither."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from run_log import read_log
from safetensors.torch import load_file
from toy_task import Critic, ToySettings, ToyTask, Velocity

from lumos import registry
from lumos.data.curriculum import StepShape
from lumos.errors import RunError, UserError
from lumos.training.auxiliary import Auxiliary
from lumos.training.loop import Run, train
from lumos.training.settings import build_settings

CPU = torch.device("cpu")
KEYS = ("loss", "grad_norm", "time_loss_video", "auxiliary_loss", "auxiliary_grad_norm")


@pytest.fixture(autouse=True)
def toy_generator(monkeypatch):
    monkeypatch.setattr(registry, "PACKAGES", [*registry.PACKAGES, "toy_task"])


def toy(folder: Path, critic: dict | None = None, **training) -> ToySettings:
    raw = {
        "generator": "toy",
        "data": {"workers": 0},
        "training": {
            "max_steps": 8, "batch_size": 6, "warmup_steps": 2, "lr": 1e-2, "log_every": 1, "save_every_minutes": 0,
            "device": "cpu", "ema_decay": 0.9, "clip_grad": 0.5, "output_dir": str(folder), **training,
        },
        "critic": critic or {},
        "logging": {"peak_tflops": 0.1},
    }  # fmt: skip
    return build_settings(raw)


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "rank-0000.safetensors")


def test_both_networks_learn_as_in_a_plain_loop(tmp_path, monkeypatch):
    """The model's losses use the critic before its update, the critic's losses the updated model; neither changes the other."""
    monkeypatch.setattr(Velocity, "forward", no_dropout(Velocity.forward))
    settings = toy(tmp_path, max_steps=5, micro_batch_size=2)
    train(settings)
    task = ToyTask(settings, CPU)
    model, critic = task.build_model(), task.build_auxiliary()
    first = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}], betas=(0.9, 0.95),
    )  # fmt: skip
    second = torch.optim.AdamW(critic.parameters(), betas=(0.5, 0.9), weight_decay=0.0)
    losses, auxiliary = {}, {}
    for step in range(5):
        whole = task.batch(step, StepShape("video", 6), range(6)).whole
        rate = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 1) / 3)) / 2
        for optimizer, lr in ((first, 1e-2 * rate), (second, 2e-3 * min(1, (step + 1) / 2))):
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss = task.losses(model, whole)[0].mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        first.step()
        critic.zero_grad()
        mean = task.auxiliary_losses(model, critic, whole).mean()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
        second.step()
        losses[step + 1], auxiliary[step + 1] = loss.item(), mean.item()
    assert read_log(tmp_path) == pytest.approx(losses, rel=1e-5)
    assert read_log(tmp_path, "auxiliary_loss") == pytest.approx(auxiliary, rel=1e-5)
    stored = tensors_of(tmp_path, 5)
    for prefix, network in (("", model), ("auxiliary.", critic)):
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(stored[f"weight/{prefix}{name}/0"], parameter.detach().flatten(), rtol=1e-4, atol=1e-5)
    assert not [name for name in stored if name.startswith("average/auxiliary.")]
    assert all(name.partition("/")[2].removesuffix("/0") in dict(model.named_parameters()) for name in stored if name[:4] == "aver")


def test_neither_loss_has_a_gradient_for_the_other_network(tmp_path, monkeypatch):
    """Even where a task forgets to detach what one network hands to the other."""
    asked = []

    def watched(name: str, other: int):
        original = getattr(ToyTask, name)

        def losses(task: ToyTask, *given):
            network = task.critic if other is None else given[other]
            asked.append((name, any(p.requires_grad for p in network.parameters())))
            return original(task, *given)

        monkeypatch.setattr(ToyTask, name, losses)

    watched("losses", None)
    watched("auxiliary_losses", 0)
    train(toy(tmp_path, max_steps=2))
    assert asked == 2 * [("losses", False), ("auxiliary_losses", False)]


def no_dropout(forward):
    def evaluated(self, *args):
        self.layers[2].p = 0.0
        return forward(self, *args)

    return evaluated


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, monkeypatch, optimizer):
    settings = toy(tmp_path / "whole", save_every_steps=3, optimizer=optimizer)
    train(settings)
    report = Run._report

    def killed(run: Run) -> None:
        report(run)
        if run.step == 5:
            raise SystemExit("killed")

    parts = toy(tmp_path / "parts", save_every_steps=3, optimizer=optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_report", killed)
        with pytest.raises(SystemExit):
            train(parts)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-00000003"]
    train(parts)
    for key in KEYS:
        assert read_log(tmp_path / "parts", key) == read_log(tmp_path / "whole", key), key
    whole, again = (tensors_of(tmp_path / name, 8) for name in ("whole", "parts"))
    assert whole.keys() == again.keys()
    assert any(name.startswith(("exp_avg_sq/auxiliary.", "row_var/auxiliary.")) for name in whole)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    exported = load_file(tmp_path / "parts" / "export" / "model.safetensors")
    assert exported.keys() == dict(Velocity().named_parameters()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_processes_train_as_one_and_go_on_after_a_kill(tmp_path, ranks: Ranks, monkeypatch, stage):
    """With an odd number of clips, one process has an idle micro-batch."""
    options = {"save_every_steps": 2, "micro_batch_size": 2, "max_steps": 5}
    plain = toy(tmp_path / "plain", **options)
    monkeypatch.setattr(Velocity, "__init__", without_dropout(Velocity.__init__))
    train(plain)
    spread = toy(tmp_path / "spread", **options)
    faults = [["toy_without_dropout"]]
    ended = ranks.train(spread, f"zero{stage}", 2, {0: faults, 1: [*faults, ["kill_after_step", 3]]})
    assert ended[1].code == -9, ended[1].err
    ranks.finish(spread, f"zero{stage}", 2, faults={0: faults, 1: faults})
    for key in ("loss", "grad_norm", "auxiliary_loss", "auxiliary_grad_norm"):
        assert read_log(tmp_path / "spread", key) == pytest.approx(read_log(tmp_path / "plain", key), rel=1e-4), key
    # A checkpoint of one engine goes on with another.
    more = dataclasses.replace(spread, training=dataclasses.replace(spread.training, max_steps=7))
    train(more)
    train(dataclasses.replace(plain, training=dataclasses.replace(plain.training, max_steps=7)))
    for key in ("loss", "auxiliary_loss"):
        assert read_log(tmp_path / "spread", key) == pytest.approx(read_log(tmp_path / "plain", key), rel=1e-3), key


@pytest.mark.slow
def test_processes_end_together_when_time_is_over(tmp_path, ranks: Ranks):
    settings = toy(tmp_path, max_steps=10**6, max_minutes=0.02)
    for process in ranks.train(settings, "zero0", 2):
        assert process.code == 0, process.err
    assert 0 < len(read_log(tmp_path)) < 10**6
    assert (tmp_path / "export" / "model.safetensors").is_file()


def without_dropout(make):
    def made(self, *args):
        make(self, *args)
        self.layers[2].p = 0.0

    return made


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_critic_whose_loss_is_not_finite(tmp_path, monkeypatch, allowed):
    losses, calls = ToyTask.auxiliary_losses, []

    def spoiled(*given):
        calls.append(None)
        return losses(*given) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(ToyTask, "auxiliary_losses", spoiled)
    settings = toy(tmp_path, skip_not_finite=allowed, max_steps=4)
    if not allowed:
        with pytest.raises(RunError, match="step 2: the loss of the auxiliary network is nan; the weights of the aux"):
            train(settings)
        return
    train(settings)
    assert sorted(read_log(tmp_path)) == [1, 2, 3, 4]
    assert sorted(read_log(tmp_path, "auxiliary_loss")) == [1, 3, 4]
    state = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert (state["updates"], state["auxiliary_updates"], state["skipped"]) == (4, 3, 1)
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path, 4).values() if tensor.is_floating_point())


def test_a_run_without_a_critic_does_not_go_on_with_one(tmp_path):
    train(toy(tmp_path, {"weight": 0}, max_steps=1))
    assert "auxiliary_updates" not in json.loads((tmp_path / "checkpoints" / "step-00000001" / "state.json").read_text())
    with pytest.raises(UserError, match=r"is of another run: critic.weight was 0\.0, now 0\.1"):
        train(toy(tmp_path, max_steps=2))


def test_a_critic_that_an_older_version_did_not_train(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyTask, "resume_fingerprint", lambda task: {})
    train(toy(tmp_path, {"weight": 0}, max_steps=1))
    with pytest.raises(UserError, match="is of another run, without an auxiliary network"):
        train(toy(tmp_path, max_steps=2))


def test_losses_of_a_critic_are_one_a_clip(tmp_path, monkeypatch):
    losses = ToyTask.auxiliary_losses
    monkeypatch.setattr(ToyTask, "auxiliary_losses", lambda *given: losses(*given)[1:])
    with pytest.raises(TypeError, match=r"ToyTask\.auxiliary_losses gave 5 losses for 6 clips"):
        train(toy(tmp_path, max_steps=1))


def test_stage_three_holds_no_critic(tmp_path):
    settings = toy(tmp_path)
    settings.deepspeed.zero_stage = 3
    with pytest.raises(UserError, match=r"toy has a second network, which ZeRO 3 cannot hold; set deepspeed\.zero_stage=2"):
        Auxiliary(Critic(), ToyTask(settings, CPU), settings, CPU)
