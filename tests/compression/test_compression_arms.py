"""A study of compression: each variant prunes a model, recovers it, and is judged, on tiny models."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import pytest
import yaml
from experiment_jobs import run_in_this_process
from small_networks import lumos_folder

from lumos.cli import main
from lumos.commands import compress_prune
from lumos.compression.recipes import read_recipe
from lumos.evaluation.experiments import runs
from lumos.evaluation.experiments.settings import load

pytest.importorskip("matplotlib")
REPO = Path(__file__).parents[2]
LOSSES = {"none": (1, 0, 0, 0), "KD": (0.1, 1, 0, 0), "ICD": (1, 0, 0.1, 0), "MCA": (1, 0, 0, 0.1), "ICD+MCA": (1, 0, 0.1, 0.1),
          "all": (0.1, 1, 0.1, 0.1)}  # fmt: skip
"""Weights of task, kd, icd and mca in the arms of both shipped studies."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(lumos_folder(tmp_path_factory.mktemp("models") / "lumos"))


@pytest.fixture
def study(model, tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    config = {
        "distill": {"critic_width": 8, "critic_warmup": 0},
        "data": {"num_frames": 5, "height": 16, "width": 24, "fps": 8, "workers": 0, "validation_clips": 1},
        "training": {"max_steps": 2, "batch_size": 2, "eval_every": 1, "warmup_steps": 0, "save_every_minutes": 0, "device": "cpu"},
        "logging": {"peak_tflops": 0.1},
    }
    Path("distill.yaml").write_text(yaml.safe_dump(config))
    return {
        "question": "Which loss?", "compress": {"model": model, "prune": ["--keep", "2"]}, "train": {"config": "distill.yaml"},
        "prompts": ["--count", "1", "--kinds", "one", "--num-inference-steps", "1"], "curves": ["val_loss_video"], "seeds": [4],
        "variants": {
            "none spaced": {"prune": ["--plan", "spaced"],
                            "train": [f"distill.{name}=0" for name in ("kd", "icd", "mca", "critic_warmup")] + ["distill.task=1"]},
            "all scratch": {"prune": ["--plan", "scratch"]},
        },
    }  # fmt: skip


def run(study: dict, *more: str) -> int:
    Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return main(["experiment", "study.yaml", "--runs", "runs", "--out", "out", *more])


@pytest.mark.slow
def test_two_arms_are_pruned_recovered_and_judged_once(study, model, monkeypatch, capsys):
    run_in_this_process(monkeypatch)
    assert run(study, "--list") == 0
    commands = [line.split()[3:5] for line in capsys.readouterr().out.splitlines()]
    assert commands == 2 * [["compress", "prune"], ["compress", "distill"], ["evaluate", "prompts"]]
    assert run(study) == 0
    result = json.loads(Path("out.json").read_text())
    assert result["compress"] == study["compress"]
    for name, losses in (("none spaced", {"task_loss"}), ("all scratch", {"task_loss", "kd_loss", "icd_loss", "mca_loss"})):
        row = result["variants"][name]
        assert row["prune"] == study["variants"][name]["prune"]
        assert [step for step, _ in row["runs"][0]["curves"]["val_loss_video"]] == [1, 2]
        assert 0 <= row["runs"][0]["shares"]["all"] <= 1
        folder = Path("runs") / f"{name}-4"
        record = json.loads((folder / "train" / "export" / "compression.json").read_text())
        assert (record["kept"], record["plan"]["plan"], record["plan"]["seed"]) == ([0, 3], name.split()[1], 4)
        assert losses <= {key for key, value in record["losses"].items() if value}
        assert record["recovery"]["distill"]["teacher"] == model
        assert {path.name for path in folder.glob("*.command")} == {"prune.command", "distill.command", "evaluate.command"}
    assert Path("out.png").is_file()
    capsys.readouterr()
    assert run(study, "--list") == 0
    assert capsys.readouterr().out == ""


def test_without_a_recovery_the_pruned_model_is_judged(study):
    study |= {"train": {}, "curves": [], "variants": {"a": {"prune": ["--plan", "deep"]}}}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    (job,) = runs.jobs(load("study.yaml"), Path("runs"))
    assert job.train is None
    assert job.prompts[job.prompts.index("--model") + 1] == "runs/a-4/pruned"
    assert job.prune[:6] == ("compress", "prune", "--model", study["compress"]["model"], "--out", "runs/a-4/pruned")


@pytest.mark.parametrize(("name", "plans"), [
    ("compression-arms", ("spaced", "least", "shallow", "scratch")),
    ("compression-arms-stiv", ("spaced", "shallow", "scratch")),  # the blocks of the least loss are the shallow ones
])  # fmt: skip
def test_the_shipped_studies_have_all_arms_with_equal_steps(name, plans, monkeypatch):
    monkeypatch.chdir(REPO)
    file = Path(f"configs/experiments/{name}.yaml")
    study = load(file)
    assert list(study.variants) == [f"{loss} {plan}" for plan in plans for loss in LOSSES]
    assert (len(study.seeds), study.over) == (3, "flops")
    equal = set()
    for job in runs.jobs(study, Path("runs")):
        loss, plan = job.name.split()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            settings, _ = read_recipe(job.train[3], job.train[4:])
        assert all("teacher, because kd, icd and mca are 0" in str(warning.message) for warning in said)
        assert bool(said) == (loss == "none")
        distill, training = settings.distill, settings.training
        assert (distill.task, distill.kd, distill.icd, distill.mca) == LOSSES[loss]
        equal.add((distill.teacher, training.max_steps, training.batch_size, training.lr, settings.data.path))
        parser = argparse.ArgumentParser()
        compress_prune.add_arguments(parser)
        words = parser.parse_args(job.prune[2:])
        if plan == "least":  # a file that a command at the head of the YAML makes
            assert f"--keep 5 --plan least --dry-run --plan-out {words.plan}" in file.read_text()
        else:
            assert (words.keep, words.plan) == (5, plan)
    assert len(equal) == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"compress": {}}, "variants.none spaced.prune has no effect without compress.model; leave it out"),
    ({"compress": {"prune": ["--keep", "2"]}, "variants": {"a": {}}}, "compress.prune has no effect without compress.model"),
    ({"compress": {"model": "m", "prune": ["--seed=2"]}}, "compress.prune: the experiment sets --seed itself for each run"),
    ({"model": "m"}, "model has no effect where compress.model is pruned; leave it out"),
    ({"prompts": ["--model", "m"]}, "prompts: --model has no effect where variants are trained"),
])  # fmt: skip
def test_what_a_study_of_compression_refuses(study, change, message, capsys):
    assert run(study | change) == 2
    assert message in capsys.readouterr().err
