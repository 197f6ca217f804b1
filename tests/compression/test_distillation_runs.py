"""Runs of distillation: log, resume, faults and what is exported."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from run_log import read_log
from safetensors.torch import load_file, save_file

from lumos import VideoPipeline
from lumos.cli import main
from lumos.compression import distillation
from lumos.compression.distillation import DistillationTask, distill, make_task
from lumos.errors import RunError, UserError
from lumos.files import write_json
from lumos.training import export
from lumos.training.loop import Run, train

CPU = torch.device("cpu")
TERMS = ("task_loss", "kd_loss", "icd_loss", "mca_loss", "critic_real", "critic_fake")
KEYS = ("loss", "grad_norm", "auxiliary_loss", "auxiliary_grad_norm", *TERMS)


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "rank-0000.safetensors")


def state_of(folder: Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["lumos1", pytest.param("stiv", marks=pytest.mark.thorough)])
def test_a_killed_run_goes_on_bit_by_bit(distilling, tmp_path, monkeypatch, generator):
    training = {"max_steps": 6, "save_every_steps": 2, "ema_decay": 0.9, "micro_batch_size": 3, "log_every": 3}
    distill(distilling(generator, "whole", training=training))
    train_step = Run._train_step

    def killed(run: Run, *args) -> tuple:
        if run.step == 5:
            raise SystemExit("killed")
        return train_step(run, *args)

    parts = distilling(generator, "parts", training=training)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_step", killed)
        with pytest.raises(SystemExit):
            distill(parts)
    distill(parts)
    for key in KEYS:
        assert read_log(tmp_path / "parts", key) == read_log(tmp_path / "whole", key), key
    first, again = (tensors_of(tmp_path / name, 6) for name in ("whole", "parts"))
    assert first.keys() == again.keys()
    assert any(name.startswith("exp_avg_sq/auxiliary.") for name in first)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_the_log_names_all_terms_and_the_student_learns(distilling, tmp_path):
    """The teacher is not trained, so the losses on data would pull the student away from it."""
    weights = {"task": 0.0, "mca": 0.01, "icd_decay": False}
    distill(distilling(data={"scenes": 2}, training={"max_steps": 30, "lr": 3e-3, "eval_every": 30}, distill=weights))
    for key in TERMS:
        assert sorted(read_log(tmp_path / "run", key)) == list(range(1, 31)), key
    kd = read_log(tmp_path / "run", "kd_loss")
    icd = read_log(tmp_path / "run", "icd_loss")
    assert kd[30] < 0.9 * kd[1]
    assert icd[30] < 0.9 * icd[1]
    losses, mca = (read_log(tmp_path / "run", key) for key in ("loss", "mca_loss"))
    # Clips have equally many masked codes only on average, so the total is near this sum.
    assert losses[1] == pytest.approx(kd[1] + 0.1 * icd[1] + 0.01 * mca[1], rel=0.1)
    assert list(read_log(tmp_path / "run", "val_loss_video")) == [30]


@pytest.mark.parametrize("generator", ["lumos1", "stiv"])
def test_the_teacher_stays_as_it_is_over_a_run(distilling, generator):
    """A run with all losses, weight decay and moving averages changes no weight and no buffer of the teacher."""
    kept = []

    def make(*given) -> DistillationTask:
        task = make_task(*given)
        teacher = task.teacher
        kept.append((teacher, {name: x.clone() for name, x in (*teacher.named_parameters(), *teacher.named_buffers())}))
        return task

    train(distilling(generator, training={"max_steps": 3, "weight_decay": 0.5, "ema_decay": 0.9}), make)
    ((teacher, before),) = kept
    after = dict((*teacher.named_parameters(), *teacher.named_buffers()))
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    assert not teacher.training


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["lumos1", "stiv"])
def test_the_export_is_a_smaller_model_with_its_history(distilling, tmp_path, generator):
    settings = distilling(generator, training={"max_steps": 2})
    summary = distill(settings)
    folder = Path(summary["export"])
    record = json.loads((folder / "compression.json").read_text())
    assert (record["plan"], record["kept"], record["steps"]) == ("spaced", [0, 3], 2)
    assert record["recovery"]["distill"]["kd"] == 1.0
    assert len(record["recovery"]["teacher_sha256"]) == 64
    assert set(record["losses"]) == set(TERMS)
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    assert pipe.model.config.num_hidden_layers == 2
    frames = pipe("a red circle", num_inference_steps=1, seed=0, output_type="uint8").frames[0]
    assert frames.ndim == 4
    again = tmp_path / "again"
    assert main(["export", str(settings.output_dir), "--out", str(again)]) == 0
    assert json.loads((again / "compression.json").read_text()) == record
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_command_trains_and_resumes(distilling, tmp_path, capsys):
    import yaml

    settings = distilling(training={"max_steps": 2, "save_every_steps": 1})
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(settings.to_dict()))
    assert main(["compress", "distill", "--config", str(config), "training.max_steps=1"]) == 0
    assert main(["compress", "distill", "--config", str(config), "--json"]) == 0
    said = capsys.readouterr()
    assert "resumed from step 1" in said.err
    assert json.loads(said.out).items() >= {"steps": 2, "export": str(tmp_path / "run" / "export")}.items()
    assert sorted(read_log(tmp_path / "run")) == [1, 2]
    assert main(["compress", "distill", "--config", str(config), "distill.icd=0.2", "training.max_steps=3"]) == 2
    assert "is of another run: distill.icd was 0.1, now 0.2" in capsys.readouterr().err


def test_another_teacher_is_another_run(distilling, tmp_path, pairs):
    distill(distilling(training={"max_steps": 1}))
    other = tmp_path / "other"
    shutil.copytree(pairs("lumos1")["teacher"], other)
    assert make_task(distilling(distill={"teacher": str(other)}), CPU).teacher_sha256 == state_of(
        tmp_path / "run", 1
    )["identity"]["distill.teacher (sha256)"]  # fmt: skip
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is of another run: distill\.teacher \(sha256\) was"):
        distill(distilling(distill={"teacher": str(other)}, training={"max_steps": 2}))


# ---- faults of the critic

def losing(monkeypatch, steps: int) -> None:
    """Make the critic win after `steps` steps."""
    monkeypatch.setattr(distillation, "LOST_STEPS", steps)
    monkeypatch.setattr(distillation, "LOST_BELOW", 1e6)


def test_a_run_whose_critic_has_won_keeps_a_checkpoint(distilling, tmp_path, monkeypatch):
    losing(monkeypatch, 3)
    settings = distilling(training={"max_steps": 9})
    with pytest.raises(RunError, match=r"step 3: the critic has won: D of the student's clips was below .* for 3 steps") as error:
        distill(settings)
    assert "\n" not in str(error.value)
    assert "the checkpoint of this step is kept in" in str(error.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert state_of(tmp_path / "run", 3)["task_state"] == {"low_steps": 3}
    folder, state = export.find_checkpoint(tmp_path / "run")
    export.export_checkpoint(folder, state, tmp_path / "rescued")
    assert (tmp_path / "rescued" / "compression.json").is_file()
    with pytest.raises(RunError, match=r"step 4: the critic has won.* for 4 steps"):  # the count goes on
        distill(settings)


def test_steps_are_counted_only_in_a_row(distilling, monkeypatch):
    losing(monkeypatch, 2)
    monkeypatch.setattr(distillation, "LOST_BELOW", -5.0)
    made = make_task(distilling(), CPU)
    assert [made.fault_after({"critic_fake": value}) is None for value in (-6, -4, -6)] == [True, True, True]
    assert "critic has won" in made.fault_after({"critic_fake": -5.5})
    assert made.state() == {"low_steps": 2}


def test_a_critic_that_is_not_finite_stops_the_run(distilling, tmp_path, monkeypatch):
    losses, calls = DistillationTask.auxiliary_losses, []

    def spoiled(*given):
        calls.append(None)
        return losses(*given) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(DistillationTask, "auxiliary_losses", spoiled)
    with pytest.raises(RunError, match="step 2: the loss of the auxiliary network is nan") as error:
        distill(distilling(training={"save_every_steps": 1}))
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_critic_that_is_not_finite_spoils_no_student(distilling, tmp_path, monkeypatch):
    def spoiled(task: DistillationTask, *rest):
        if task.critic is not None:
            torch.nn.init.constant_(task.critic.spatial[0].score.weight, math.nan)
        return original(task, *rest)

    original = DistillationTask.losses
    monkeypatch.setattr(DistillationTask, "losses", spoiled)
    with pytest.raises(RunError, match="step 1: the loss is nan; the weights were not updated"):
        distill(distilling())


# ---- teachers that cannot be

@pytest.mark.parametrize("generator", ["lumos1", "stiv"])
def test_a_teacher_that_is_the_student(distilling, tmp_path, pairs, generator):
    folder = pairs(generator)["student"]
    with pytest.raises(UserError, match=r"is the student itself \(model\.from\)"):
        make_task(distilling(generator, distill={"teacher": folder}), CPU)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    made = make_task(distilling(generator, distill={"teacher": str(copy), "kept": [0, 1]}), CPU)
    with pytest.raises(UserError, match="has the weights of the student, so there is nothing to learn"):
        made.build_model()


def test_a_teacher_of_another_generator(distilling, pairs):
    with pytest.raises(UserError, match="is a model of the generator stiv, the student one of lumos1"):
        make_task(distilling(distill={"teacher": pairs("stiv")["teacher"]}), CPU)


def test_a_teacher_that_is_no_folder(distilling):
    with pytest.raises(UserError, match="there is no model folder nowhere"):
        make_task(distilling(distill={"teacher": "nowhere"}), CPU)


def test_a_teacher_with_another_tokenizer(distilling, tmp_path, pairs):
    other = tmp_path / "other"
    shutil.copytree(pairs("lumos1")["teacher"], other)
    (file,) = (other / "video_tokenizer").glob("*.safetensors")
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="has another video tokenizer than the student"):
        make_task(distilling(distill={"teacher": str(other)}), CPU)


def test_a_teacher_with_other_codes(distilling, tmp_path, pairs):
    other = tmp_path / "other"
    shutil.copytree(pairs("lumos1")["teacher"], other)
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**config, "visual_token_count": 63})
    with pytest.raises(UserError, match="has visual_token_count 63, but the student has 64"):
        make_task(distilling(distill={"teacher": str(other)}), CPU)


@pytest.mark.parametrize(("kept", "message"), [
    ([0], r"distill\.kept \[0\] does not fit; it must be 2 ascending"), ([3, 0], "does not fit"), ([0, 4], "from 0 to 3"),
])  # fmt: skip
def test_kept_layers_that_cannot_be(distilling, kept, message):
    with pytest.raises(UserError, match=message):
        make_task(distilling(distill={"kept": kept}), CPU)


def test_a_student_that_does_not_say_where_it_came_from(distilling, tmp_path, pairs):
    student = tmp_path / "student"
    shutil.copytree(pairs("lumos1")["student"], student)
    (student / "compression.json").unlink()
    model = {"from": str(student)}
    with pytest.raises(UserError, match=r"nothing says from which of the teacher's 4 layers the student's 2 came.*distill\.kept"):
        make_task(distilling(model=model), CPU)
    assert make_task(distilling(model=model, distill={"kept": [1, 2]}), CPU).kept == [1, 2]
    assert make_task(distilling(model=model, distill={"icd": 0}), CPU).kept == []
    (student / "compression.json").write_text("[1]")
    with pytest.raises(UserError, match=r"compression\.json is damaged"):
        make_task(distilling(model=model), CPU)


def test_places_that_are_not_seen_cannot_be_compared(distilling):
    with pytest.raises(UserError, match=r"mask_ratio is 0\.5, but distillation compares all places.*set mask_ratio=0"):
        make_task(distilling("stiv", mask_ratio=0.5), CPU)


def test_a_student_from_random_weights_of_another_width(distilling, pairs):
    """A student of the plan "scratch" has no features to compare, so it learns from the output and the critic."""
    tokenizers = {kind: f"{pairs('lumos1')['teacher']}/{kind}_tokenizer" for kind in ("video", "text")}
    overrides = {"vocab_size": 1024 + 64, "visual_token_count": 64, "hidden_size": 32, "intermediate_size": 48,
                 "num_hidden_layers": 3, "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    model = {"from": None, "preset": "tiny", "overrides": overrides}
    with pytest.raises(UserError, match=r"the student has hidden_size 32, the teacher 64.*set distill\.icd=0"):
        make_task(distilling(model=model, tokenizer=tokenizers), CPU)
    summary = distill(distilling(model=model, tokenizer=tokenizers, distill={"icd": 0}, training={"max_steps": 1}))
    record = json.loads((Path(summary["export"]) / "compression.json").read_text())
    assert record.keys() == {"recovery", "losses", "steps"}
