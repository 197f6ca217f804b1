"""training.optimizer=adafactor: its updates are torch's, its state is small, planned, stored and read back, and ZeRO is refused."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import Ranks, Runs
from run_log import read_log
from torch import nn

from lumos.errors import RunError, UserError
from lumos.lora import Lora, add_adapters
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.training import model_config
from lumos.models.lumos1.training_cost import LumosTrainingCost
from lumos.models.stiv.cost import training_cost as stiv_cost
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.planning.fixed_memory import optimizer_bytes, update_bytes
from lumos.settings import to_plain
from lumos.training.checkpoint import Stored, save_tensors
from lumos.training.deepspeed_engine import deepspeed_options
from lumos.training.engine import PlainEngine, Slot
from lumos.training.loop import Run, train
from lumos.training.settings import build_settings
from lumos.training.tokenizer.settings import load_settings as load_tokenizer_settings

CPU = torch.device("cpu")
LORA = {"rank": 3, "alpha": 6.0, "targets": ["q_proj", "down_proj"]}
STIV = {"generator": "stiv", "model": {"preset": "stiv-nano"}, "data": {"height": 32, "width": 32, "num_frames": 4}}


class Small(nn.Module):
    """A matrix, a vector, a convolution, a single number, and a matrix that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(6, 4), nn.LayerNorm(4)
        self.picture, self.scale, self.idle = nn.Conv2d(4, 2, 3), nn.Parameter(torch.tensor(1.5)), nn.Linear(2, 2, bias=False)


def give_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("idle"):
            parameter.grad = torch.randn(parameter.shape)


@pytest.fixture
def engine_of(micro_settings):
    def make(model: nn.Module, **training) -> PlainEngine:
        return PlainEngine(model, micro_settings(training={"optimizer": "adafactor", "clip_grad": 0, **training}), CPU)

    return make


def stored_state(engine: PlainEngine, folder: Path, leave: str = "", **changed: torch.Tensor) -> Stored:
    """Return the stored state of an engine, without the tensors whose names begin with `leave`."""
    folder.mkdir()
    tensors = {name: tensor for name, tensor in engine.state().items() if not leave or not name.startswith(leave)}
    save_tensors(folder, 0, tensors | changed)
    return Stored(folder)


# ---- updates


def test_an_update_is_that_of_torchs_adafactor(engine_of):
    engine, plain = engine_of(Small(), weight_decay=0.2, eps=1e-6), Small()
    decayed = [plain.layer.weight, plain.picture.weight, plain.idle.weight]
    others = [p for p in plain.parameters() if not any(p is matrix for matrix in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.Adafactor(groups, eps=(1e-6, 1.0))
    for step, lr in enumerate((0.0, 0.05, 0.02)):
        for model in (engine.module, plain):
            give_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        engine.step(lr)
        optimizer.step()
        for (name, ours), theirs in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert not torch.equal(engine.module.layer.weight, Small().layer.weight)


@pytest.mark.parametrize(("size", "moved"), [(0.0, 0.01), (0.5, 0.01), (3.0, 0.03)])
def test_lr_is_the_size_of_an_update(engine_of, size: float, moved: float):
    """As with AdamW, weights of zeros move too; weights above 1 move relative to their size."""
    engine = engine_of(Small(), weight_decay=0.0)
    weight = nn.init.constant_(engine.module.norm.weight, size)
    give_gradients(engine.module, 1)
    engine.step(0.01)
    assert (weight - size).square().mean().sqrt().item() == pytest.approx(moved, rel=1e-4)


def test_gradients_of_zero_change_nothing(engine_of):
    engine = engine_of(Small(), weight_decay=0.0, eps=1e-18)
    for parameter in engine.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(0.1)
    for ours, before in zip(engine.module.parameters(), Small().parameters(), strict=True):
        assert torch.equal(ours, before)


# ---- checkpoints


@pytest.mark.parametrize("kind", ["small", "decoder", "adapters"])
def test_a_stored_state_goes_on_bitwise(engine_of, micro_settings, tmp_path: Path, kind: str):
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = Small() if kind == "small" else LumosForVideoGeneration(model_config(micro_settings().model))
        if kind == "adapters":
            pytest.importorskip("peft")
            add_adapters(model, Lora(**{"dropout": 0.0, **LORA}))
        return model

    whole = engine_of(made())
    for step in range(2):
        give_gradients(whole.module, step)
        whole.step(0.02)
    again = engine_of(made())
    again.load(stored_state(whole, tmp_path / "stored"), whole.updates)
    assert again.updates == whole.updates == 2
    for engine in (whole, again):
        give_gradients(engine.module, 2)
        engine.step(0.02)
    first, second = whole.state(), again.state()
    assert first.keys() == second.keys()
    assert {name.partition("/")[0] for name in first} >= {"weight", "row_var", "col_var"}
    assert not any("idle" in name for name in first if not name.startswith("weight/"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("leave", "changed", "said"), [
    ("", {"row_var/layer.weight/0": torch.ones(5)}, "has 5 values of row_var layer.weight, the model 4"),
    ("", {"col_var/layer.weight/0": torch.ones(5)}, "5 of the 6 values of col_var layer.weight are there"),
    ("", {"variance/norm.weight/0": torch.ones(9)}, "has 9 values of variance norm.weight, the model 4"),
    ("col_var/layer", {}, "0 of the 6 values of col_var layer.weight are there"),
])  # fmt: skip
def test_stored_tensors_of_a_wrong_size_are_named(engine_of, tmp_path: Path, leave: str, changed: dict, said: str):
    engine = engine_of(Small())
    give_gradients(engine.module, 0)
    engine.step(0.02)
    with pytest.raises(RunError, match=said):
        engine_of(Small()).load(stored_state(engine, tmp_path / "stored", leave, **changed), 1)


class FlatEngine(PlainEngine):
    """An engine that keeps all weights in one flat tensor, as ZeRO does."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in self.module.parameters()]))
        self.inner = torch.optim.AdamW([self.flat])

    def slots(self) -> dict[str, Slot]:
        found, offset = {}, 0
        for name, parameter in self.module.named_parameters():
            found[name] = Slot(self.flat, offset, 0, parameter.numel())
            offset += parameter.numel()
        return found


def test_a_weight_without_state_may_share_a_flat_tensor(engine_of, micro_settings, tmp_path: Path):
    """A run of plain PyTorch has no moments of a weight that no loss reaches; the same run with ZeRO loads its checkpoint."""
    plain = engine_of(Small(), optimizer="adamw")
    give_gradients(plain.module, 0)
    plain.step(0.02)
    flat = FlatEngine(Small(), micro_settings(), CPU)
    flat.load(stored_state(plain, tmp_path / "stored"), 1)
    found = flat.state()
    assert not found.pop("exp_avg/idle.weight/0").any()
    assert not found.pop("exp_avg_sq/idle.weight/0").any()
    expected = plain.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def killed_after(step: int, settings, monkeypatch) -> None:
    report = Run._report

    def killed(run: Run) -> None:
        report(run)
        if run.step == step:
            raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_report", killed)
        with pytest.raises(SystemExit):
            train(settings)


def test_a_killed_run_goes_on_bitwise(micro_settings, tmp_path: Path, monkeypatch):
    def settings(name: str, optimizer: str = "adafactor"):
        return micro_settings(training={
            "optimizer": optimizer, "output_dir": str(tmp_path / name), "save_every_steps": 2, "ema_decay": 0.9,
            "eval_every": 3, "micro_batch_size": 2,
        })  # fmt: skip

    train(settings("whole"))
    killed_after(3, settings("parts"), monkeypatch)
    train(settings("parts"))
    for key in ("loss", "grad_norm", "val_loss_video", "val_loss_video_ema"):
        found = read_log(tmp_path / "parts", key)
        assert found == read_log(tmp_path / "whole", key), key
        assert all(map(math.isfinite, found.values()))
    for optimizer in ("adamw", "muon"):
        with pytest.raises(UserError, match=f"is of another run: training.optimizer was adafactor, now {optimizer}"):
            train(settings("parts", optimizer))


# ---- memory


@pytest.mark.parametrize("kind", ["lumos1", "stiv", "adapters"])
def test_the_state_has_the_planned_bytes(engine_of, micro_settings, kind: str):
    config = model_config(micro_settings().model)
    if kind == "stiv":
        cost = stiv_cost(build_settings(STIV), 7)
        made = lambda: StivForVideoGeneration(cost.config)  # noqa: E731
    else:
        lora = None
        if kind == "adapters":
            pytest.importorskip("peft")
            lora = replace(build_settings({"model": {"from": "x"}, "lora": LORA}).lora)
        cost = LumosTrainingCost.of(config, lora)

        def made() -> nn.Module:
            model = LumosForVideoGeneration(config)
            if lora:
                add_adapters(model, Lora(**to_plain(lora)))
            return model

    held = {}
    for optimizer in ("adafactor", "adamw", "muon"):
        engine = engine_of(made(), optimizer=optimizer)
        give_gradients(engine.module, 0)
        engine.step(0.01)
        held[optimizer] = sum(t.nbytes for state in engine.inner.state.values() for name, t in state.items() if name != "step")
        if optimizer != "muon":  # the generators' own lists of matrices are not those of `layer_matrices`
            assert held[optimizer] == optimizer_bytes(cost, optimizer)
    assert held["adafactor"] < held["adamw"] * (0.5 if kind == "adapters" else 0.1)
    assert update_bytes(cost, "adafactor", muon=0) == 4 * max(p.numel() for p in engine.module.parameters() if p.requires_grad)


# ---- settings


def test_cut_matrices_and_settings_without_effect(micro_settings, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = micro_settings(training={"optimizer": "adafactor", "eps": 1e-18})
    for stage in (1, 2, 3):
        with pytest.raises(UserError, match=f"adafactor, which needs whole matrices, but ZeRO {stage} cuts them; set"):
            deepspeed_options(settings, stage, torch.float32)
    assert deepspeed_options(settings, 0, torch.float32)["zero_optimization"]["stage"] == 0
    assert (settings.zero_stage_with(1), settings.zero_stage_with(2)) == (None, 0)
    with pytest.raises(UserError, match=r"training\.eps is 0\.0; with training\.optimizer=adafactor it must be at least 1e-18"):
        micro_settings(training={"optimizer": "adafactor", "eps": 0})
    with pytest.warns(UserWarning, match="training.betas has no effect with training.optimizer=adafactor: .* no first moment"):
        micro_settings(training={"optimizer": "adafactor", "betas": [0.9, 0.999]})
    with pytest.raises(UserError, match="unknown key optimizer"):  # the choice of a tokenizer's training is muon_lr
        load_tokenizer_settings("configs/tokenizer/tiny.yaml", ["optimizer=adafactor"])


# ---- runs


@pytest.mark.slow
def test_a_small_model_learns(micro_settings, tmp_path: Path):
    train(micro_settings(data={"scenes": 2}, training={"max_steps": 60, "optimizer": "adafactor", "ema_decay": 0.9}))
    losses = read_log(tmp_path / "run")
    assert losses[60] < losses[1] - 1.5


def test_two_processes_train_as_one_and_cuts_are_refused(runs: Runs, ranks: Ranks):
    def settings(name: str):
        made = runs.make(runs.folder / name)
        made.training.optimizer = "adafactor"
        return made

    whole = ranks.finish(settings("adafactor"), "plain", 1)
    spread = settings("adafactor-spread")
    ranks.train(spread, "own", 2, {1: [["kill_after_step", 3]]})  # of itself ZeRO 0
    ranks.finish(spread, "own", 2)
    for key in ("loss", "grad_norm", "val_loss_video_ema"):
        assert read_log(spread.output_dir, key) == pytest.approx(read_log(whole, key), abs=1e-3), key
    for process in ranks.train(settings("adafactor-cut"), "zero2", 2):
        assert process.code == 2
        assert "training.optimizer is adafactor, which needs whole matrices" in process.err
