"""`experiment`, from YAML to JSON and PNG."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from experiment_jobs import run_in_this_process

from lumos.cli import main
from lumos.compression.settings import load_settings as compression_settings
from lumos.evaluation.experiments import intervals, results, runs
from lumos.evaluation.experiments.settings import Experiment, load
from lumos.models.lumos1.training import model_config
from lumos.training.settings import load_settings
from lumos.video.io import read_image

pytest.importorskip("matplotlib")


def write(path: Path, **keys) -> str:
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return str(path)


@pytest.fixture
def trained(micro_settings, tmp_path: Path) -> str:
    """Two variants with one seed, which are trained and judged."""
    base = micro_settings(training={"max_steps": 2, "eval_every": 1}, samples={"every": 0})
    return write(
        tmp_path / "rates.yaml", question="Which rate?", seeds=[3], curves=["val_loss_video", "val_frame_loss_video"],
        train={"config": write(tmp_path / "base.yaml", **base.to_dict())}, prompts=["--count", "1", "--num-inference-steps", "1"],
        variants={"slow": {"train": ["training.lr=1e-4"], "x": 1}, "fast": {"train": ["training.lr=1e-2"], "x": 2}},
    )  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    run_in_this_process(monkeypatch)


@pytest.fixture
def forked(monkeypatch, forks) -> None:
    """Run jobs in processes of their own that start without the seconds of their imports."""

    def run(command, *, stdout, **_) -> subprocess.CompletedProcess:
        assert command[:3] == [sys.executable, "-m", "lumos"]
        done = forks.run(command[1:])
        stdout.write(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


def test_variants_are_trained_judged_and_drawn_once(forked, trained: str, tmp_path: Path, capsys):
    places = [trained, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out" / "rates")]
    assert main(["experiment", *places, "--list"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [command.split()[3] for command in commands] == ["train", "evaluate", "train", "evaluate"]
    assert not (tmp_path / "runs").exists()
    assert main(["experiment", *places, "--parallel", "2"]) == 0
    result = json.loads((tmp_path / "out" / "rates.json").read_text())
    slow, fast = (result["variants"][name] for name in ("slow", "fast"))
    for row in (slow, fast):
        (run,) = row["runs"]
        assert [step for step, _ in run["curves"]["val_loss_video"]] == [1, 2]
        assert row["summary"]["val_loss_video"] == [pytest.approx(run["curves"]["val_loss_video"][-1][1], abs=1e-4), 0.0]
        assert 0 <= run["shares"]["motion"] <= 1
    assert slow["summary"]["val_loss_video"] != fast["summary"]["val_loss_video"]
    assert read_image(tmp_path / "out" / "rates.png").shape[:2] == (924, 1980)  # five panels in two rows
    capsys.readouterr()
    assert main(["experiment", *places, "--list"]) == 0
    assert capsys.readouterr().out == ""


def test_a_run_that_fails_is_named_and_the_others_are_kept(in_this_process, trained: str, tmp_path: Path, capsys):
    raw = yaml.safe_load(Path(trained).read_text()) | {"prompts": None}
    raw["variants"]["slow"]["train"] = ["training.lr=-1"]
    path = write(Path(trained), **raw)
    places = [path, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(["experiment", *places]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "training.lr=-1" in error
    assert "ended with 2: error: training.lr" in error
    assert main(["experiment", *places, "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {}}, "no variants"),
        ({"train": {}, "prompts": None}, "neither trains"),
        ({"variants": {"a": {"prompts": ["--count", "2"]}}, "prompts": None}, "variants.a.prompts has no effect"),
        ({"variants": {"a": {"train": ["x.y=1"]}}, "train": {}}, "variants.a.train has no effect"),
        ({"variants": {"a/b": {}}}, "cannot name a folder"),
        ({"variants": {"a": {"trian": []}}}, "did you mean train"),
        ({"model": "m"}, "model has no effect"),
        ({"train": {}}, "curves has no effect"),
        ({"figures": ["all of two"], "prompts": ["--kinds", "one"]}, "'all of two' is of a kind that is not asked for"),
        ({"over": "hours"}, "over: 'hours' is not allowed; allowed: step, flops"),
        ({"seeds": []}, "seeds [] are not allowed"),
        ({"seeds": [0, 0]}, "each once"),
        ({"seeds": [-3]}, "none below 0"),
        ({"seeds": [2**32]}, "seeds is 4294967296; it must be a finite number, at most 4294967295"),
        ({"figures": ["colr"]}, "figures: 'colr' is unknown; allowed: all, colour"),
        ({"figures": ["all of 5"], "prompts": ["--count", "5"]}, "'all of 5' is of a kind that is not asked for"),
        ({"variants": {"": {}}}, "variant '' cannot name a folder"),
        ({"prompts": ["--seed", "5"]}, "prompts: the experiment sets --seed itself for each run"),
        ({"variants": {"a": {"prompts": ["--output=x.json"]}}}, "prompts: the experiment sets --output itself for each run"),
        ({"prompts": ["--model", "m"]}, "--model has no effect where variants are trained"),
        ({"train": {"overrides": ["x.y=1"]}, "curves": []}, "train.overrides has no effect without train.config"),
    ],
)
def test_mistakes_in_the_file(change: dict, message: str, tmp_path: Path, capsys):
    good = {"train": {"config": "c.yaml"}, "prompts": [], "curves": ["loss"], "variants": {"a": {}}}
    assert main(["experiment", write(tmp_path / "x.yaml", **(good | change))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_results_of_other_settings_are_not_taken_for_these(in_this_process, trained: str, tmp_path: Path, capsys):
    places = [trained, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "found.v2")]
    assert main(["experiment", *places]) == 0
    assert sorted(path.name for path in tmp_path.glob("found*")) == ["found.v2.json", "found.v2.png"]
    raw = yaml.safe_load(Path(trained).read_text())
    raw["variants"]["fast"]["prompts"] = ["--temperature", "0.5"]
    write(Path(trained), **raw)
    capsys.readouterr()
    assert main(["experiment", *places]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'runs' / 'fast-3'} was made by the command in" in error
    assert "--temperature 0.5" in error
    shutil.rmtree(tmp_path / "runs" / "fast-3")
    assert main(["experiment", *places]) == 0
    (tmp_path / "runs" / "slow-3" / "evaluate.command").unlink()
    assert main(["experiment", *places]) == 2
    assert "was made by an unknown command" in capsys.readouterr().err


def test_a_kind_may_be_named_with_an_equals_sign(tmp_path: Path):
    path = write(tmp_path / "x.yaml", prompts=["--kinds=two"], figures=["all of two"], variants={"a": {}})
    assert load(path).figures == ["all of two"]


@pytest.mark.slow
def test_curves_may_run_over_flops(in_this_process, trained: str, tmp_path: Path):
    raw = yaml.safe_load(Path(trained).read_text()) | {"prompts": None, "over": "flops"}
    assert main(["experiment", write(Path(trained), **raw), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "x")]) == 0
    run = json.loads((tmp_path / "x.json").read_text())["variants"]["slow"]["runs"][0]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "slow-3" / "train" / "log.jsonl").read_text().splitlines()]
    spent = sum(line["flops"] for line in lines if "flops" in line)
    assert run["curves"]["val_loss_video"][-1][0] == pytest.approx(spent)
    sparse = [{"step": 2, "flops": 10.0}, {"step": 3, "val_loss_video": 1.0}, {"step": 4, "flops": 20.0}]
    assert [results.flops_until(step, sparse) for step in (1, 2, 3, 4, 5)] == [10, 20, 40, 60, 80]


def test_a_figure_may_be_of_one_kind(tmp_path: Path):
    job = runs.ExperimentJob("a", 0, tmp_path, None, ("evaluate",))
    judged = {"shares": {"one": {"all": 0.5}, "two": {"all": 0.25}}, "seconds": 1.0, "count": 4}
    (tmp_path / "prompts.json").write_text(json.dumps(judged))
    found = results.results_of(job, Experiment(figures=["all", "all of two"]))
    assert found["shares"] == {"all": 0.375, "all of two": 0.25}


def test_a_busy_seed_does_not_move_the_time_of_a_clip():
    from lumos.evaluation.experiments.plots import times_of

    def row(x: float, **times: list[float]) -> dict:
        named = [dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)]
        return {"x": x, "runs": [{"clips": 2, **run} for run in named]}

    rows = [row(2.0, seconds=[2, 2, 2]), row(1.0, seconds=[1, 1, 90])]
    assert times_of(rows) == ([(1.0, 0.5, 0.0), (2.0, 1.0, 0.0)], "seconds")
    rows = [row(1.0, seconds=[1, 90, 90], cpu_seconds=[2, 2, 2]), row(2.0, seconds=[2, 2, 2], cpu_seconds=[4, 4, 4])]
    assert times_of(rows) == ([(1.0, 1.0, 0.0), (2.0, 2.0, 0.0)], "CPU seconds")


def test_means_and_spread_over_seeds():
    runs = [{"curves": {"loss": [[1, 3.0], [2, value]]}, "shares": {"all": share}} for value, share in ((1.0, 0.5), (2.0, 0.7))]
    assert intervals.summary(runs) == {"loss": [1.5, 0.7071], "all": [0.6, 0.1414]}


@pytest.mark.slow
def test_every_shipped_experiment_can_be_planned(repo: Path):
    for path in (repo / "configs" / "experiments").glob("*.yaml"):
        if path.stem not in ("base", "stiv-base"):
            found = runs.jobs(load(path), Path("runs"))
            assert len(found) >= 2, path
            assert len({job.folder for job in found}) == len(found)
            for job in found:
                if job.prune:
                    compression_settings(repo / job.train[3], list(job.train[4:]))
                elif job.train:
                    settings = load_settings(repo / job.train[2], list(job.train[3:]))
                    if settings.generator == "lumos1":  # test_studies.py builds the configs of the others
                        model_config(settings.model)
