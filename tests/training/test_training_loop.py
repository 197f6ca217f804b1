from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from run_log import read_log
from safetensors.torch import load_file, save_file

from lumos import LumosForVideoGeneration
from lumos.data.curriculum import StepShape
from lumos.data.synthetic.sampling import captions
from lumos.errors import RunError, UserError
from lumos.files import only_writer
from lumos.models.lumos1.training import ArdfTask
from lumos.settings import to_plain
from lumos.training import checkpoint
from lumos.training import signals as interrupt
from lumos.training.ema import Ema
from lumos.training.engine import parameter_groups, pick_precision
from lumos.training.loop import Run, train
from tokenizer.text import TextTokenizer

CPU = torch.device("cpu")
JOINT = {"stages": [{"steps": 2, "image_share": 1.0, "image_batch_size": 6}, {"image_share": 0.5}]}


class Killed(Exception):
    """Stands for a kill: after it, only the log is closed."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, where: str = "_report") -> None:
    original = getattr(Run, where)

    def killed(self: Run, *args, **kwargs):
        if self.step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Run, where, killed)


@pytest.mark.slow
def test_a_run_learns_logs_and_exports(micro_settings, tmp_path: Path):
    settings = micro_settings(
        data={"scenes": 2, **JOINT}, training={"max_steps": 60, "log_every": 1, "eval_every": 30, "ema_decay": 0.9}
    )
    summary = train(settings)
    losses = read_log(tmp_path / "run")
    assert sorted(losses) == list(range(1, 61))
    assert losses[1] == pytest.approx(math.log(1000), abs=0.3)
    assert losses[60] < losses[1] - 1.5
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start"
    assert lines[0]["settings"] == settings.to_dict()
    assert lines[-1]["event"] == "end"
    video = next(line for line in lines if line.get("step") == 3 and "loss_video" in line)
    fields = {"lr", "grad_norm", "tokens_per_second", "flops", "mfu", "seconds", "data_wait", "memory_bytes"}
    assert fields | {"mask_ratio_loss_video"} <= video.keys()
    assert len(video["frame_loss_video"]) == 2
    assert min(video["frame_loss_video"]) <= video["loss"] <= max(video["frame_loss_video"])
    evaluation = next(line for line in lines if line.get("step") == 60 and "val_loss_video" in line)
    assert {"val_loss_image", "val_loss_image_ema", "val_loss_video_ema"} <= evaluation.keys()
    assert (summary["steps"], summary["stopped_by"]) == (60, None)
    folder = Path(summary["export"])
    assert json.loads((folder / "training.json").read_text())["steps"] == 60
    model = LumosForVideoGeneration.from_pretrained(folder)
    saved = load_file(checkpoint.tensor_file(Path(summary["checkpoint"]), 0))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), saved[f"average/{name}/0"])
        assert not torch.equal(parameter.flatten(), saved[f"weight/{name}/0"])


def test_the_export_is_a_model_folder_that_generates(micro_settings):
    from lumos import LumosPipeline

    folder = train(micro_settings(training={"max_steps": 2, "export_dtype": "float16"}))["export"]
    assert next(iter(load_file(Path(folder) / "model.safetensors").values())).dtype == torch.float16
    clip = LumosPipeline.from_pretrained(folder)(
        "a red circle", num_frames=5, height=32, width=32, num_inference_steps=2, seed=0
    ).frames[0]
    assert clip.shape == (5, 32, 32, 3)


def gradients(settings) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step that the optimizer would get."""
    run = Run(settings, ArdfTask(settings, CPU), CPU)
    found = {}

    def keep(lr: float) -> float:
        found.update({name: p.grad.clone() for name, p in run.engine.module.named_parameters()})
        raise Killed

    run.engine.step = keep
    with pytest.raises(Killed):
        run.train()
    run.log.close()
    return found


@pytest.mark.slow
def test_gradients_do_not_depend_on_micro_batches(micro_settings):
    whole, *others = (gradients(micro_settings(training={"micro_batch_size": size})) for size in (None, 3, 2, 1))
    for other in others:
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_mean_is_over_positions_not_over_micro_batches(micro_settings):
    """Samples have different numbers of supervised positions, so a mean of means would differ."""
    settings = micro_settings(training={"max_steps": 1, "micro_batch_size": 1})
    task = ArdfTask(settings, CPU)
    batch = task.batch(0, StepShape("video", 4), range(4))
    model = task.build_model()
    with torch.no_grad():
        losses = [task.losses(model, micro)[0] for micro in batch.micro_batches(1)]
    train(settings)
    logged = read_log(settings.output_dir)[1]
    assert logged == pytest.approx(float(torch.cat(losses).mean()), abs=1e-6)
    assert abs(logged - float(torch.stack([part.mean() for part in losses]).mean())) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{"data": {"workers": 2, "prefetch": 3}}, {"training": {"eval_every": 1, "ema_decay": 0.9}}])
def test_losses_do_not_depend_on_workers_or_validation(micro_settings, tmp_path: Path, variant: dict):
    train(micro_settings(data=JOINT))
    other = {**variant, "data": {**JOINT, **variant.get("data", {})}}
    other["training"] = {**variant.get("training", {}), "output_dir": str(tmp_path / "other")}
    train(micro_settings(**other))
    for key in ("loss", "grad_norm"):
        assert read_log(tmp_path / "run", key) == read_log(tmp_path / "other", key)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "where"), [
    (4, "save"), (6, "export"), *(pytest.param(step, "_report", marks=pytest.mark.thorough) for step in (4, 6)),
])  # fmt: skip
def test_a_killed_run_continues_bitwise(micro_settings, tmp_path: Path, monkeypatch, step: int, where: str):
    options = {"max_steps": 6, "save_every_steps": 2, "ema_decay": 0.9, "log_every": 3, "eval_every": 3}
    train(micro_settings(data=JOINT, training=options))
    broken = micro_settings(data=JOINT, training={**options, "output_dir": str(tmp_path / "broken")})
    with monkeypatch.context() as patch:
        kill_at(patch, step, where)
        with pytest.raises(Killed):
            train(broken)
    torch.manual_seed(99)
    train(broken)
    fields = ("loss", "loss_image", "loss_video", "grad_norm", "lr", "frame_loss_video", "mask_ratio_loss_image")
    for key in (*fields, "val_loss_video", "val_loss_video_ema", "val_mask_ratio_loss_video"):
        assert read_log(tmp_path / "run", key) == read_log(tmp_path / "broken", key)
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("run", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_second_run_in_the_same_folder_is_refused(micro_settings, tmp_path: Path):
    settings = micro_settings(training={"max_steps": 1})
    with only_writer(settings.output_dir, "training"), pytest.raises(RunError, match="another training is writing into"):
        train(settings)
    assert train(settings)["steps"] == 1


def test_a_lost_launcher_stops_the_run_as_a_signal_does(micro_settings, monkeypatch):
    """deepspeed's processes continue when the command ends; the parent of their launcher then changes."""
    answers = iter([(10, 20)] * 3)
    monkeypatch.setattr(interrupt, "_launcher", lambda: next(answers, (10, 1)))
    summary = train(micro_settings())
    assert summary["stopped_by"] == "a lost launcher"
    assert 0 < summary["steps"] < 6
    assert train(micro_settings())["steps"] == 6


def test_sprites_without_pictures_are_told_at_the_start(micro_settings, no_sprite_pictures, tmp_path: Path):
    with pytest.raises(UserError, match=r"LUMOS_SPRITES.*data.options.kinds=\[shapes,digits\]"):
        ArdfTask(micro_settings(data={"options": {"kinds": ["sprites"]}}), CPU)


def test_clips_that_the_model_could_not_generate(micro_settings):
    model = to_plain(micro_settings().model)
    model["overrides"]["max_position_embeddings"] = 40
    with pytest.raises(UserError, match="need 48 tokens beside their text, but the model has max_position_embeddings 40"):
        ArdfTask(micro_settings(model=model), CPU)
    task = ArdfTask(micro_settings(), CPU)
    task.source.most_codes = {"image": 4, "video": 10**6}  # as shards of several sizes may have
    with pytest.raises(UserError, match="the largest clip has 1,000,000 codes, but the model has max_position_embeddings"):
        task._check_length()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_save_and_leave(micro_settings, tmp_path: Path, monkeypatch, number: signal.Signals):
    train(micro_settings())
    settings = micro_settings(training={"output_dir": str(tmp_path / "stopped")})
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        original = Run._report
        patch.setattr(Run, "_report", lambda self: (original(self), os.kill(os.getpid(), number) if self.step == 2 else None))
        summary = train(settings)
    assert summary["stopped_by"] == number.name
    assert summary["export"] is None
    assert 2 <= summary["steps"] < 6
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert Path(summary["checkpoint"]).is_dir()
    assert train(settings)["steps"] == 6
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "run")


def spoil_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Make the loss of these steps, or only its gradient, not a finite number."""
    original, step_of = ArdfTask.losses, Run._train_step
    current = [0]

    def train_step(self: Run, *args):
        current[0] = self.step + 1
        return step_of(self, *args)

    def losses(self, model, micro):
        values, frames = original(self, model, micro)
        if model.training and current[0] in steps:
            # A finite loss with a gradient that is not: the square root's slope at 0. A loss whose gradient is: a constant.
            values = {"loss": values + math.inf, "nan": values * math.nan, "gradient": values + (values * 0).sqrt()}[what]
        return values, frames

    monkeypatch.setattr(Run, "_train_step", train_step)
    monkeypatch.setattr(ArdfTask, "losses", losses)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "nan", "gradient"])
def test_not_finite_stops_before_the_update(micro_settings, tmp_path: Path, monkeypatch, what: str):
    settings = micro_settings(training={"save_every_steps": 1, "micro_batch_size": 2})
    spoil_steps(monkeypatch, {3}, what)
    run = Run(settings, ArdfTask(settings, CPU), CPU)
    with pytest.raises(RunError, match=r"step 3.*not updated.*log\.jsonl"):
        run.train()
    run.log.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "not_finite"
    assert lines[-1]["clips"] == [f"worlds/0/{2 * 65536 + i}" for i in range(4)]
    saved = load_file(checkpoint.tensor_file(checkpoint.checkpoint_folder(run.checkpoints, 2), 0))
    for name, parameter in run.engine.module.named_parameters():
        assert torch.equal(parameter.flatten(), saved[f"weight/{name}/0"])
    assert checkpoint.latest(run.checkpoints)[1]["step"] == 2


@pytest.mark.slow
def test_updates_left_out_are_counted_through_a_resume(micro_settings, tmp_path: Path, monkeypatch, caplog):
    """Two such steps are allowed, checkpoints keep their count, and weights, averages and AdamW do not change in them."""
    training = {"max_steps": 8, "save_every_steps": 1, "keep_last": 9, "skip_not_finite": 2, "ema_decay": 0.9, "log_every": 2}
    spoil_steps(monkeypatch, {1, 3, 4}, "loss")
    settings = micro_settings(training=training)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train(settings)
    with pytest.raises(RunError, match=r"step 4: the loss is inf.*as in 2 steps before \(training\.skip_not_finite\)"):
        train(settings)
    folders = [checkpoint.checkpoint_folder(tmp_path / "run" / "checkpoints", step) for step in (1, 2, 3)]
    first, second, third = (checkpoint.read_state(folder) for folder in folders)
    assert [(s["updates"], s["skipped"]) for s in (first, second, third)] == [(0, 1), (1, 1), (1, 2)]
    before, after = (load_file(checkpoint.tensor_file(folder, 0)) for folder in folders[1:])
    assert all(torch.equal(before[key], after[key]) for key in before if "/" in key)
    assert "step 3: the loss is inf; update left out, 2 of 2 allowed" in caplog.text
    train(micro_settings(training={**training, "skip_not_finite": 3}))
    assert sorted(read_log(tmp_path / "run")) == [2, 6, 8]


@pytest.mark.slow
def test_checkpoints_that_are_kept(micro_settings, tmp_path: Path):
    train(micro_settings(training={"max_steps": 7, "save_every_steps": 1, "keep_last": 2, "keep_every": 3}))
    root = tmp_path / "run" / "checkpoints"
    kept = checkpoint.list_checkpoints(root)
    assert [checkpoint.step_of(folder) for folder in kept] == [3, 6, 7]
    left = [root / ".removing-step-00000005", root / ".writing-00000007"]  # of kills in a save; no other save follows
    for folder in left:
        folder.mkdir()
    train(micro_settings(training={"max_steps": 7, "save_every_steps": 1, "keep_last": 2, "keep_every": 3}))
    assert sorted(root.iterdir()) == kept


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(micro_settings, tmp_path: Path, monkeypatch):
    settings = micro_settings(training={"save_every_steps": 2})

    def save_file(tensors, path):
        if "00000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(tensors, path)

    original = checkpoint.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(RunError, match=r"step 4 cannot be written.*No space left"):
            train(settings)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints")[1]["step"] == 2
    assert train(settings)["steps"] == 6


@pytest.mark.slow
def test_fine_tuning_starts_from_a_folder_and_its_tokenizers(micro_settings, tmp_path: Path):
    first = train(micro_settings())["export"]
    settings = micro_settings(
        model={"from": first}, tokenizer={"video": None, "text": None}, training={"output_dir": str(tmp_path / "tuned"), "lr": 0.0}
    )
    second = train(settings)["export"]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fine_tuning_with_another_shape(micro_settings):
    first = train(micro_settings(training={"max_steps": 1}))["export"]
    settings = micro_settings(model={"from": first, "overrides": {"vocab_size": 3000}}, tokenizer={"video": None, "text": None})
    with pytest.raises(UserError, match=r"model\.overrides .*do not fit the weights of model\.from: .*has shape \[2024, 64\]"):
        train(settings)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(micro_settings):
    train(micro_settings(training={"max_steps": 2}))
    codes = {"vocab_size": 2024, "visual_token_count": 1000}
    other = {"preset": "tiny", "overrides": {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, **codes}}
    with pytest.raises(UserError, match=r"another run: hidden_size was 64, now 32; name another training\.output_dir.*start over"):
        train(micro_settings(model=other))
    with pytest.raises(UserError, match=r"past training\.max_steps"):
        train(micro_settings(training={"max_steps": 1}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("masking", {"min_ratio": 0.5}, r"masking\.min_ratio was 0\.7, now 0\.5"),
        ("data", {"options": {"share_two": 0.5}}, r"data\.options was \{\}, now \{'share_two': 0\.5\}"),
        ("data", {"height": 40}, r"data\.height was 32, now 40"),
        ("data", {"scenes": 4}, r"data\.scenes was None, now 4"),
        ("data", JOINT, r"data\.stages was \[\], now \[\{'steps': 2"),
        ("training", {"seed": 1}, r"training\.seed was 0, now 1"),
        ("training", {"batch_size": 8}, r"training\.batch_size was 4, now 8"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(micro_settings, section: str, change: dict, words: str):
    train(micro_settings(training={"max_steps": 1}))
    with pytest.raises(UserError, match=words + r".*training\.output_dir.*start over"):
        train(micro_settings(**{"training": {"max_steps": 2}, section: change}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["video", "text"])
def test_a_run_does_not_go_on_with_another_tokenizer(micro_settings, micro_tokenizers, tmp_path: Path, kind: str):
    """A tokenizer of the same sizes and place with other weights is refused; a copy is the same tokenizer."""
    folder = tmp_path / kind
    shutil.copytree(micro_tokenizers[kind], folder)
    train(micro_settings(training={"max_steps": 1}))
    settings = micro_settings(tokenizer={kind: str(folder)}, training={"max_steps": 2})
    train(settings)
    if kind == "video":
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1e-3
        save_file(tensors, folder / "model.safetensors")
    else:
        symbols = [f"<special{i}>" for i in range(1, 255)]
        TextTokenizer.train(captions(1, 300), 900, reserved_symbols=symbols).save_pretrained(folder)
    with pytest.raises(UserError, match=rf"tokenizer\.{kind} \(sha256\) was [0-9a-f]{{64}}, now [0-9a-f]{{64}}"):
        train(settings)


def test_a_resume_prints_changed_settings(micro_settings, tmp_path: Path, caplog):
    caplog.set_level("INFO", "lumos")
    train(micro_settings(training={"max_steps": 1}))
    assert f"checkpoints, log and export go to {tmp_path / 'run'}" in caplog.text
    caplog.clear()
    train(micro_settings(training={"max_steps": 2, "lr": 1e-3, "ema_decay": 0.9}))
    said = caplog.text
    for change in ("max_steps was 1, now 2", "lr was 0.003, now 0.001", "ema_decay was 0.0, now 0.9"):
        assert f"changed since that checkpoint: training.{change}" in said
    assert said.count("changed since") == 3


@pytest.mark.slow
def test_the_place_in_frame_loss_is_the_frame(micro_settings, tmp_path: Path, monkeypatch):
    """Frame 0 of the clip has no supervised position here, and a picture counts separately."""
    original = ArdfTask.losses

    def without_first_frame(self, model, micro):
        losses, places = original(self, model, micro)
        later = places["frame"] > 0
        return losses[later], {"frame": places["frame"][later]}

    train(micro_settings(data={"stages": [{"image_share": 1.0}]}, training={"max_steps": 1, "output_dir": str(tmp_path / "image")}))
    assert '"frame_loss' not in (tmp_path / "image" / "log.jsonl").read_text()
    monkeypatch.setattr(ArdfTask, "losses", without_first_frame)
    train(micro_settings(training={"max_steps": 1}))
    first, second = read_log(tmp_path / "run", "frame_loss_video")[1]
    assert first is None
    assert second > 0


def test_an_output_folder_that_cannot_be_written(micro_settings, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        train(micro_settings(training={"output_dir": str(tmp_path / "file" / "run")}))


def test_which_parameters_decay(micro_settings):
    model = ArdfTask(micro_settings(), CPU).build_model()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = parameter_groups(model, 0.1, "matrices")
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in names[id(p)] for p in rest["params"])
    assert not [names[id(p)] for p in decayed["params"] if "norm" in names[id(p)]]
    (everything,) = parameter_groups(model, 0.1, "all")
    assert len(everything["params"]) == len(names) == len(decayed["params"]) + len(rest["params"])


def test_averaged_weights_follow_the_rule():
    weights = {"w": torch.zeros(2)}
    ema, expected = Ema(weights, 0.6), 0.0
    for step in range(1, 20):
        weights["w"].fill_(step)
        ema.update(weights, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.average["w"].tolist() == pytest.approx([expected] * 2)
    ema.swap(weights)
    assert weights["w"].tolist() == pytest.approx([expected] * 2)
    ema.swap(weights)
    assert weights["w"].tolist() == [19, 19]
    nothing = Ema({}, 0.6)  # of a process whose share is but padding
    nothing.update({}, 1)
    assert nothing.average == {}


def test_precision_follows_the_device():
    assert pick_precision("auto", CPU) == torch.float32
    assert pick_precision("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_precision("bf16", CPU) == torch.bfloat16


@pytest.mark.slow
def test_bf16_and_recomputation_run(micro_settings, tmp_path: Path):
    train(micro_settings(training={"max_steps": 2}))
    for name, options in {"recomputed": {"activation_checkpointing": True}, "bf16": {"precision": "bf16"}}.items():
        train(micro_settings(training={"max_steps": 2, "output_dir": str(tmp_path / name), **options}))
        assert read_log(tmp_path / name)[2] == pytest.approx(
            read_log(tmp_path / "run")[2], rel=1e-6 if name == "recomputed" else 0.01
        )
