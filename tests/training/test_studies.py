"""The studies of configs/experiments that compare arms of STIV, or the two generators: equal compute and three seeds."""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lumos import registry
from lumos.cli import main
from lumos.data.curriculum import Curriculum
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import RunError, UserError
from lumos.evaluation.captions import named_attributes
from lumos.evaluation.experiments import intervals, plots, results, runs
from lumos.evaluation.experiments.settings import Experiment, load
from lumos.evaluation.prompts import KINDS
from lumos.files import write_bytes
from lumos.training.settings import load_settings

STUDIES = (
    "stiv-image-dropout", "stiv-guidance", "stiv-given-time", "stiv-start", "stiv-mask", "stiv-first-frames", "stiv-norms",
    "compare-systems", "compare-shipped",
)  # fmt: skip
TRAINED = [name for name in STUDIES if name not in ("stiv-guidance", "stiv-first-frames", "compare-shipped")]
TEXT_TOKENS = 16


@pytest.fixture
def folders(monkeypatch, repo: Path, tmp_path: Path):
    monkeypatch.chdir(repo)
    return lambda name: runs.jobs(load(f"configs/experiments/{name}.yaml"), tmp_path)


def training_flops(command: tuple[str, ...]) -> float:
    """Return the training FLOPs of a `train` command, by arithmetic; folders of earlier trainings need not exist."""
    overrides = [text for text in command[3:] if not text.startswith(("init.", "model.from"))]
    settings = load_settings(command[2], overrides)
    side = 32 if settings.data.path.endswith("-32") else 64
    cost = registry.generator(settings.generator).load("cost", "training").training_cost(settings, TEXT_TOKENS)
    total = 0.0
    for shape, steps in Curriculum(settings.data.stages, settings.training.batch_size).counts(settings.training.max_steps).items():
        sequence = cost.sequence(1 if shape.kind == "image" else 17, side, side)
        total += steps * shape.batch_size * cost.training_flops(sequence, cost.supervised(sequence))
    return total


@pytest.mark.parametrize("name", TRAINED)
def test_arms_have_equal_compute(folders, name: str):
    jobs = [job for job in folders(name) if job.train]
    spent = {job.name: sum(map(training_flops, [*(command for _, command in job.before), job.train])) for job in jobs}
    half = [2 * flops for variant, flops in spent.items() if variant.endswith("half trained")]
    whole = [flops for variant, flops in spent.items() if not variant.endswith("half trained")]
    assert len(whole) >= 2
    assert len(half) == (2 if name == "compare-systems" else 0)
    assert max(whole + half) / min(whole + half) <= 1.02, spent


@pytest.mark.parametrize("name", TRAINED)
def test_arms_have_latents_of_one_scale(folders, name: str):
    """Losses of latents with other means and deviations could not be compared."""
    commands = [command for job in folders(name) if job.train for command in (*(found for _, found in job.before), job.train)]
    settings = [load_settings(command[2], list(command[3:])) for command in commands if command[2].endswith("stiv-base.yaml")]
    assert settings
    assert all(len(found.latents.mean) == 5 and found.latents == settings[0].latents for found in settings)


@pytest.mark.parametrize("name", STUDIES)
def test_studies_have_three_seeds_and_minutes(folders, repo: Path, name: str):
    study = load(repo / "configs" / "experiments" / f"{name}.yaml")
    assert len(study.seeds) == 3
    assert study.minutes
    assert study.claims
    assert {"moving", "moved"} <= set(study.figures)  # no number about quality without one about motion
    for job in folders(name):
        steps = [option for option, command in ((step, command) for step, command, _ in job.steps()) if command]
        assert steps[-1] == "evaluate"


def chance(figure: str, kinds: list[str], count: int, seeds: list[int]) -> float:
    """Return the upper end of the interval of the share of prompts whose object another prompt has right, a mean over kinds."""
    shares = []
    for kind in kinds:
        prompts = [prompt for seed in seeds for prompt in wanted(kind, count, 10_000_000 * (seed + 1))]
        times = Counter(prompt["objects"][0][figure] for prompt in prompts).values()
        shares.append(sum(n * (n - 1) for n in times) / (len(prompts) * (len(prompts) - 1)))
    total = len(kinds) * count * len(seeds)
    return intervals.wilson(statistics.mean(shares) * total, total)[1]


def wanted(kind: str, count: int, seed: int) -> list[dict]:
    source = SyntheticScenes(seed=seed, num_frames=17, height=64, width=64, **KINDS[kind])
    return [named_attributes(source.scene(index)) for index in range(count)]


@pytest.mark.parametrize("name", STUDIES)
def test_floors_are_above_chance(repo: Path, name: str):
    study = load(repo / "configs" / "experiments" / f"{name}.yaml")
    at = study.prompts.index("--count")
    kinds, count = study.prompts[study.prompts.index("--kinds") + 1 : at], int(study.prompts[at + 1])
    for name, floor in {item for claim in study.claims for item in claim.floor.items()}:
        figure, _, kind = name.partition(" of ")
        assert floor >= chance(figure, [kind] if kind else kinds, count, study.seeds), name


def test_systems_are_compared_with_their_costs(repo: Path):
    figures = set(load(repo / "configs" / "experiments" / "compare-systems.yaml").figures)
    assert {"clip_gflops", "clip_seconds", "memory_mb"} <= figures


def test_curves_over_flops_are_means_over_seeds():
    """The FLOPs of a step differ by the seed, whose captions have other lengths."""
    runs = [{"curves": {"val": [[100.0 + seed, 3.0 + seed], [200.0 + 2 * seed, None if seed else 2.0]]}} for seed in range(3)]
    assert plots.curve(runs, "val") == [(101.0, 4.0, 1.0), (200.0, 2.0, 0.0)]
    of_lists = [{"curves": {"val": [[9, [1.0, 2.0]]]}}, {"curves": {"val": [[8, [3.0, 2.0]]]}}]
    assert plots.curve(of_lists, "val") == [(0, 2.0, pytest.approx(2**0.5)), (1, 2.0, 0.0)]
    longer = [{"curves": {"val": [[1, 2.0], [2, 4.0]]}}, {"curves": {"val": [[2, 2.0]]}}]
    assert plots.curve(longer, "val") == [(1, 2.0, 0.0), (2, 3.0, pytest.approx(2**0.5))]


def test_flops_of_trainings_before_are_counted(tmp_path: Path):
    """Two steps of 5 FLOPs come before; log lines hold the mean FLOPs of a step since the line before."""
    logs = {"first": [{"step": 1, "flops": 5.0}, {"step": 2, "flops": 5.0}, {"event": "end", "step": 2}],
            "train": [{"step": 2, "flops": 7.0, "val": 2.0}, {"step": 3, "val": 1.5},
                      {"step": 4, "flops": 9.0, "val": 1.0}]}  # fmt: skip
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = runs.ExperimentJob("a", 0, tmp_path, ("train",), None, before=(("first", ("train",)),))
    for over, places in (("flops", [24.0, 33.0, 42.0]), ("step", [2, 3, 4])):
        found = results.results_of(job, Experiment(curves=["val"], over=over))
        assert found["training_flops"] == 42
        assert found["curves"]["val"] == list(map(list, zip(places, [2.0, 1.5, 1.0], strict=True)))


def test_all_studies_together_fit_into_the_budget(repo: Path):
    of = {name: load(repo / "configs" / "experiments" / f"{name}.yaml").minutes for name in STUDIES}
    assert sum(of.values()) <= 8 * 60


def test_systems_are_sampled_at_equal_budgets(folders):
    sampled: dict[str, list[float]] = {}
    trained = {job.name.split(",")[0]: job.train for job in folders("compare-systems") if job.train}
    for job in folders("compare-systems"):
        if job.seed == 0:
            system = job.name.split(",")[0]
            sampled.setdefault(system, []).append(clip_flops(trained[system], int(job.prompts[-1])))
    for decoder, transformer in zip(sampled["decoder"], sampled["transformer"], strict=True):
        assert decoder == pytest.approx(transformer, rel=0.03)


def clip_flops(command: tuple[str, ...], steps: int) -> float:
    import torch

    from lumos.pipeline.defaults import ClipDefaults

    settings = load_settings(command[2], list(command[3:]))
    generator = registry.generator(settings.generator)
    config = generator.load("cost", "training").training_cost(settings, TEXT_TOKENS).config
    sampling = generator.load("sampling")().changed(num_inference_steps=steps, guidance_scale=3.0)
    form = ClipDefaults(num_frames=17, fps=8, height=64, width=64)
    plan = generator.load("cost", "clip").clip_cost(config, form, sampling, TEXT_TOKENS, torch.float32)
    return plan.report(1.0, 1.0)["flops"]["total"]


def study(tmp_path: Path, **variants) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"train": {"config": "c.yaml"}, "prompts": [], "variants": variants}, sort_keys=False))
    return str(path)


def test_trainings_before_come_first_and_are_named(tmp_path: Path):
    variant = {"before": {"pictures": ["x.y=1"]}, "train": ["init.image={pictures}"], "config": "d.yaml"}
    found = load(study(tmp_path, a=variant))
    (job,) = runs.jobs(found, Path("runs"))
    assert [name for name, _, _ in job.steps()] == ["pictures", "train", "evaluate"]
    (name, before) = job.before[0]
    assert (name, before[2], before[-1]) == ("pictures", "d.yaml", "training.output_dir=runs/a-0/pictures")
    assert "init.image=runs/a-0/pictures/export" in job.train
    assert [shlex.join(command) for _, command in job.missing()] == [shlex.join(command) for _, command, _ in job.steps()]


def test_a_variant_may_evaluate_another_ones_model(tmp_path: Path):
    found = load(study(tmp_path, a={}, b={"of": "a", "prompts": ["--given", "first"]}))
    first, second = runs.jobs(found, Path("runs"))
    assert first.train
    assert second.train is None
    assert second.prompts[:4] == ("evaluate", "prompts", "--model", "runs/a-0/train/export")


@pytest.mark.parametrize("name", STUDIES)
def test_each_seed_has_prompts_of_its_own_and_arms_share_them(folders, name: str):
    """Seeds with the same prompts would be counted as independent clips; arms with other prompts could not be paired."""
    seeds: dict[int, set[str]] = {}
    for job in folders(name):
        seeds.setdefault(job.seed, set()).update(option for option in job.prompts if option.startswith("--seed="))
        if job.train:
            assert [option for option in job.train if "training.seed" in option] == [f"training.seed={job.seed}"]
    assert len(seeds) == 3
    assert all(len(of_seed) == 1 for of_seed in seeds.values())
    assert len(set().union(*seeds.values())) == 3
    assert "--seed=1000000" not in set().union(*seeds.values())  # with which default options were chosen


def test_models_are_trained_before_other_variants_evaluate_them(tmp_path: Path, monkeypatch):
    found, ran = load(study(tmp_path, first={"of": "second"}, second={})), []
    jobs = runs.jobs(found, tmp_path / "runs")
    results = {command: made for job in jobs for _, command, made in job.steps()}

    def fake(command, *, env, **_) -> SimpleNamespace:
        ran.append((command[3], env["LUMOS_THREADS"]))
        if not stopped:
            write_bytes(results[tuple(command[3:])], b"{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=fake, STDOUT=None))
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("LUMOS_THREADS", "6")  # counts before OMP_NUM_THREADS in each run too
    stopped = True  # by Ctrl-C, after which a training saves its work and ends with 0
    with pytest.raises(RunError, match=r"train --config .* was stopped before its end; the same command goes on"):
        runs.run(jobs[1:], 1, lambda: None)
    assert ran == [("train", "6")]
    stopped = False
    ran.clear()
    runs.run(jobs, 2, lambda: None)
    assert ran == [("train", "3"), ("evaluate", "3"), ("evaluate", "3")]


@pytest.mark.parametrize(("variants", "message"), [
    ({"a": {}, "b": {"of": "c"}}, "variants.b.of 'c' is no variant that is trained"),
    ({"a": {}, "b": {"of": "a"}, "c": {"of": "b"}}, "variants.c.of 'b' is no variant that is trained"),
    ({"a": {}, "b": {"of": "a", "train": ["x.y=1"]}}, "no training here"),
    ({"a": {"before": {"train": []}}}, "variants.a.before.train is not allowed"),
])  # fmt: skip
def test_what_a_study_of_stages_refuses(variants: dict, message: str, tmp_path: Path, capsys):
    assert main(["experiment", study(tmp_path, **variants), "--list"]) == 2
    assert message in capsys.readouterr().err


def test_intervals_of_shares_are_pooled_and_others_of_seeds():
    runs = [{"counts": {"all": [right, 10]}, "shares": {"all": right / 10, "moved": moved}}
            for right, moved in ((2, 1.0), (3, 2.0), (4, 3.0))]  # fmt: skip
    found = intervals.intervals(runs)
    assert found["all"] == pytest.approx([0.1666, 0.4788], abs=1e-3)  # Wilson, 9 of 30
    assert found["moved"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)
    assert intervals.wilson(0, 30)[0] == 0
    assert results.verdicts_of({"one": [{"all": True, "prompt": "x"}, {"all": False}]}) == {"all": "10", "all of one": "10"}


def test_a_curve_may_be_one_place_of_a_list():
    line = {"step": 1, "val_loss": 2.0, "val_pattern_loss": [3.0, None]}
    names = ("val_loss", "val_pattern_loss[0]", "val_pattern_loss[1]", "x")
    assert [results.value_of(line, name) for name in names] == [2, 3, None, None]


def test_a_weighting_needs_predictions_of_the_velocity(repo: Path, monkeypatch):
    monkeypatch.chdir(repo)
    with pytest.raises(UserError, match=r"flow\.weighting is for predictions of the velocity"):
        load_settings("configs/experiments/stiv-base.yaml", ["flow.weighting=min_snr", "model.overrides.prediction=noise"])
