"""Trainings with the same settings are done once over all studies."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from lumos.evaluation.experiments import runs
from lumos.evaluation.experiments.reuse import copy_trained, key_file, mark, settings_key
from lumos.evaluation.experiments.settings import Experiment, Training, Variant, load

BASE = "configs/experiments/stiv-base.yaml"


@pytest.fixture(autouse=True)
def in_repo(monkeypatch, repo: Path) -> None:
    monkeypatch.chdir(repo)


def train(*overrides: str) -> tuple[str, ...]:
    return ("train", "--config", BASE, *overrides)


def test_a_key_is_of_settings_and_not_of_words():
    plain = settings_key(train("training.seed=1", "training.output_dir=runs/a"))
    assert settings_key(train("training.max_steps=800", "training.seed=1", "training.output_dir=runs/b")) == plain
    assert settings_key(train("training.seed=2", "training.output_dir=runs/a")) != plain
    assert settings_key(train("training.seed=x")) is None
    assert settings_key(("evaluate", "prompts")) is None


@pytest.mark.parametrize(("study", "arm"), [
    ("stiv-mask", "no mask"), ("stiv-start", "scratch"), ("stiv-given-time", "clean"), ("stiv-given-time", "same"),
    ("compare-systems", "transformer, half trained"),
    *(("stiv-image-dropout", arm) for arm in ("text alone", "0 % text", "8 % text", "50 % text")),
])  # fmt: skip
def test_studies_share_a_training(study: str, arm: str, tmp_path: Path):
    """The text to video of stiv-norms is trained once for each seed; others copy its arm, or begin with it."""
    shared, found = (first_keys(name, of, tmp_path) for name, of in (("stiv-norms", "flow"), (study, arm)))
    assert len(set(shared)) == 3  # one for each seed
    assert found == shared


def first_keys(study: str, arm: str, folder: Path) -> list[str | None]:
    found = [job for job in runs.jobs(load(f"configs/experiments/{study}.yaml"), folder / study) if job.name == arm]
    return [settings_key(job.before[0][1] if job.before else job.train) for job in found]


def test_a_trained_model_is_copied_and_not_trained_again(tmp_path: Path, monkeypatch, caplog):
    ran = []

    def fake(command, **_) -> subprocess.CompletedProcess:
        ran.append(command)
        made = Path(command[-1].partition("=")[2])
        (made / "export").mkdir(parents=True)
        (made / "checkpoints").mkdir()
        (made / "export" / "config.json").write_text("{}")
        (made / "log.jsonl").write_text(json.dumps({"step": 1, "seed": command[-2]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=fake, STDOUT=subprocess.STDOUT))
    caplog.set_level("INFO", "lumos")
    for study, same in (("one", "training.max_steps=7"), ("two", "training.max_steps=7"), ("three", "training.max_steps=8")):
        experiment = Experiment(train=Training(BASE), variants={"a": Variant(train=[same])}, seeds=[0, 1])
        jobs = runs.jobs(experiment, tmp_path / study)
        runs.run(jobs, 1, lambda: None)
        assert not [command for job in jobs for command in job.missing()]
    assert len(ran) == 4
    copied = tmp_path / "two" / "a-1" / "train"
    assert sorted(path.name for path in copied.iterdir()) == ["export", "log.jsonl"]
    assert json.loads((copied / "log.jsonl").read_text())["seed"] == "training.seed=1"
    assert f"{copied} has the settings of {tmp_path / 'one' / 'a-1' / 'train'}, which is copied" in caplog.text


def test_a_training_that_is_not_whole_is_not_copied(tmp_path: Path):
    folder = tmp_path / "one" / "a-0" / "train"
    (folder / "export").mkdir(parents=True)
    (folder / "log.jsonl").write_text("")
    mark(folder, "k")
    assert key_file(folder).read_text() == "k"
    assert copy_trained("k", tmp_path / "two" / "a-0" / "train", tmp_path) is None
    (folder / "export" / "config.json").write_text("{}")
    assert copy_trained("k", folder, tmp_path) is None  # not onto itself
    assert copy_trained("other", tmp_path / "two" / "a-0" / "train", tmp_path) is None
    assert copy_trained("k", tmp_path / "two" / "a-0" / "train", tmp_path) == folder


def test_a_training_that_outlived_its_experiment_is_copied_too(tmp_path: Path, monkeypatch):
    """The experiment was killed and its training went on, so nobody wrote the key beside it."""
    experiment = Experiment(train=Training(BASE), variants={"a": Variant()}, seeds=[0])
    (job,) = runs.jobs(experiment, tmp_path / "one")
    made = job.folder / "train"
    (made / "export").mkdir(parents=True)
    (made / "export" / "config.json").write_text("{}")
    (made / "log.jsonl").write_text("")
    job.command_file("train").write_text(shlex.join(job.train))
    monkeypatch.setattr(runs, "subprocess", None)  # nothing is left to run
    runs.run([job], 1, lambda: None)
    assert key_file(made).read_text() == settings_key(job.train)
    (other,) = runs.jobs(experiment, tmp_path / "two")
    runs.run([other], 1, lambda: None)
    assert (other.folder / "train" / "export" / "config.json").is_file()
