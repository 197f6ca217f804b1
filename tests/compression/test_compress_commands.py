"""`compress score` and `compress prune` as a user types them, and what they refuse."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from small_networks import lumos_folder, stiv_folder

from lumos import LumosForVideoGeneration, StivForVideoGeneration
from lumos.cli import main
from lumos.commands import compress_prune
from lumos.commands.compress_score import table
from lumos.compression.networks import network_of
from tokenizer import VideoTokenizer

FEW = ["--clips", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {"lumos": str(lumos_folder(place / "lumos")), "stiv": str(stiv_folder(place / "stiv"))}


@pytest.fixture
def lumos(folders, tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return folders["lumos"]


@pytest.fixture
def stiv(folders, tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return folders["stiv"]


@pytest.fixture
def run(capsys):
    """Runs `compress ...` -> (lines on stdout, lines on stderr); asserts the exit code."""

    def call(*words: str, code: int = 0) -> tuple[list[str], list[str]]:
        found = main(["compress", *words])
        said = capsys.readouterr()
        assert found == code, said.err
        return said.out.splitlines(), [line for line in said.err.splitlines() if line.startswith("error: ")]

    return call


def test_compress_alone_explains_the_four_steps(run):
    said, _ = run()
    for number, step in enumerate(("score", "prune", "distill", "report"), 1):
        (place,) = (i for i, line in enumerate(said) if line.startswith(f"  {number}. {step} "))
        assert said[place + 1].split()[:5] == ["python", "-m", "lumos", "compress", step]
    assert any(line.split()[:1] == ["prune"] for line in said)


@pytest.mark.slow
def test_scores_are_printed_written_and_drawn(lumos, run, tmp_path):
    pytest.importorskip("matplotlib")
    said, _ = run("score", "--model", lumos, "--measures", "loss", "bi", "output", "taylor", *FEW, "--clips", "8")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["part"], scores["units"], scores["clips"], scores["sha256"]) == ("model", "layer", 8, network_of(lumos).sha256)
    assert list(scores["scores"]) == ["0", "1", "2", "3"]
    assert {"loss", "bi", "output", "content", "motion", "taylor", "time_share"} <= scores["scores"]["0"].keys()
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    low, high = scores["motion_trend"]["interval"]
    assert -1 <= low <= high <= 1
    assert f"rank correlation of the motion share with depth: {scores['motion_trend']['correlation']:.2f}; " in said[5]
    assert all(len(entry["motion_share_interval"]) == 2 for entry in scores["scores"].values())
    head, *rows = said[:5]
    assert head.split()[:4] == ["unit", "parameters", "time", "loss"]
    assert head.endswith("  removed by, if 3 stay")
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert any("spaced" in row and "shallow" in row for row in rows)


@pytest.mark.slow
def test_learned_gates_and_the_frechet_distance(lumos, run, tmp_path):
    few = [*FEW, "--gate-steps", "3", "--frechet-clips", "2"]
    run("score", "--model", lumos, "--measures", "learned", "frechet", *few)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["measures"] == ["learned", "frechet"]
    assert all(0 < entry["learned"] < 1 and entry["frechet"] >= 0 for entry in scores["scores"].values())
    assert scores["gates"] == {"steps": 3, "sparsity": 1.0, "seed": 0}
    assert (scores["frechet_clips"], scores["frechet_features"][:7]) == (2, "latents")
    said, _ = run("prune", "--model", lumos, "--keep", "3", "--plan", "learned", "--dry-run", *few)
    by_file, _ = run("prune", "--model", lumos, "--keep", "3", "--plan", "learned", "--dry-run", "--scores", "scores.json")
    assert said[0] == by_file[0] != ""
    assert said[0].startswith("plan learned: removes ")
    run("prune", "--model", lumos, "--keep", "3", "--plan", "least", "--measure", "frechet", "--out", "least", *few)
    run("score", "--model", lumos, "--measures", "history", *few)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["history_gain"] != 0
    assert all(isinstance(entry["history"], float) for entry in scores["scores"].values())
    run("prune", "--model", lumos, "--keep", "3", "--plan", "least", "--measure", "history", "--out", "history", *few)
    _, (error,) = run("score", "--model", lumos, "--part", "decoder", "--measures", "history", *few, code=2)
    assert "the measure history needs a model that generates a clip frame by frame" in error
    _, (error,) = run("score", "--model", lumos, "--part", "decoder", "--measures", "frechet", *few, code=2)
    assert "leave it out for a decoder" in error
    _, (error,) = run("score", "--model", lumos, "--units", "mlp", "--measures", "frechet", *few, code=2)
    assert "no clips can be generated without units of the kind mlp" in error
    _, (error,) = run("score", "--model", lumos, "--measures", "learned", *FEW, "--sparsity", "-1", code=2)
    assert "--sparsity -1 is not allowed" in error


@pytest.mark.slow
def test_scores_of_parts_and_of_a_decoder(stiv, run, tmp_path):
    run("score", "--model", stiv, "--units", "temporal", "--output", "a.json", "--picture", "a.svg", *FEW)
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["units"], found["measures"]) == ("temporal", ["loss", "output"])
    assert list(found["scores"]) == [f"{i}.temporal" for i in range(4)]
    assert (tmp_path / "a.svg").stat().st_size > 0
    run("score", "--model", stiv, "--part", "decoder", "--output", "b.json", *FEW)
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["part"], list(found["scores"])) == ("decoder", ["mid", "up.1.0", "up.1.1", "up.0.1"][: len(found["scores"])])


def test_without_matplotlib_a_note_replaces_the_picture(lumos, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("lumos.commands.compress_score.find_spec", lambda name: None)
    said, _ = run("score", "--model", lumos, "--measures", "magnitude", *FEW)
    assert any(line.startswith("no picture: it needs matplotlib") for line in said)
    assert not (tmp_path / "scores.png").exists()
    _, (error,) = run("score", "--model", lumos, "--picture", "x.png", *FEW, code=2)
    assert "--picture needs matplotlib" in error


def test_a_value_that_is_not_defined_is_a_dash():
    lines = table({"0": {"parameters": 1000, "output": 0.0, "motion_share": None}}, ["output"], {"spaced": ["0"]}, 1)
    assert lines[1].split() == ["0", "1,000", "-", "0", "-", "spaced"]


# ---- prune


def test_the_table_has_each_cost_before_and_after():
    names = ("units", "parameters", "weight_bytes", "flops", "kv_bytes", "seconds")
    before = dict(zip(names, (8, 2_000_000, 8 * 2**20, 3.5e9, 3 * 2**20, 0.25), strict=True))
    after = dict(zip(names, (6, 1_500_000, 6 * 2**20, 2.8e9, 2**20, 0.2), strict=True))
    assert [" ".join(line.split()) for line in compress_prune.table(before, after, "layer")] == [
        "units (layer) 8 -> 6",
        "parameters 2,000,000 -> 1,500,000 -25.0%",
        "weights 8 MiB -> 6 MiB -25.0%",
        "FLOPs of a clip 3.5 GFLOP -> 2.8 GFLOP -20.0%",
        "KV cache 3 MiB -> 1 MiB -66.7%",
        "predicted seconds of a clip 0.25 s -> 0.2 s -20.0%",
    ]


def test_a_dry_run_prints_what_is_then_counted(lumos, run, tmp_path):
    said, _ = run("prune", "--model", lumos, "--keep", "2", "--dry-run")
    assert said[0] == "plan spaced: removes 1, 2"
    assert not (tmp_path / "small").exists()
    with_out, _ = run("prune", "--model", lumos, "--keep", "2", "--out", "small", "--dry-run", "--json")
    assert not (tmp_path / "small").exists()
    predicted = json.loads(with_out[-1])
    assert (predicted["kept"], predicted["before"]["units"], predicted["after"]["units"]) == ([0, 3], 4, 2)
    again, _ = run("prune", "--model", lumos, "--keep", "2", "--out", "small one")
    assert again[:5] == said[:5]  # all but the seconds, which depend on the device's measured peak
    made = LumosForVideoGeneration.from_pretrained(tmp_path / "small one")
    parameters = next(line for line in said if line.startswith("parameters"))
    assert f"{sum(p.numel() for p in made.parameters()):,}" in parameters
    assert f"small one  is written; python -m lumos compress report --models {lumos} 'small one'  shows" in again[-1]


@pytest.mark.slow
def test_a_plan_is_written_edited_and_used(stiv, run, tmp_path):
    run("prune", "--model", stiv, "--keep", "2", "--plan", "shallow", "--plan-out", "plan.json", "--dry-run")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["remove"] == ["1", "2"]
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"remove": ["2"]}))
    run("prune", "--model", stiv, "--plan", "plan.json", "--remove", "1.temporal", "--size", "mlp_ratio=3", "--out", "small")
    config = StivForVideoGeneration.from_pretrained(tmp_path / "small").config
    assert (config.num_hidden_layers, config.without, config.mlp_ratio) == (3, ["1.temporal"], 3)
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"remove": []}))
    _, (error,) = run("prune", "--model", stiv, "--plan", "plan.json", "--out", "same", code=2)
    assert "the plan removes no unit and makes no size smaller" in error
    said, _ = run("prune", "--model", stiv, "--units", "temporal", "--keep", "0", "--plan", "random", "--allow-ends", "--dry-run")
    assert said[0] == "plan random: removes 0.temporal, 1.temporal, 2.temporal, 3.temporal"


@pytest.mark.slow
def test_least_scores_again_or_reads_scores(lumos, run, tmp_path):
    """If one unit is removed, both plans choose the unit with the lowest score; below 30 % the default is "least"."""
    run("score", "--model", lumos, "--measures", "loss", "--picture", "x.png", *FEW)
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    lowest = min("12", key=lambda name: scores[name]["loss"])
    for more in ([], ["--scores", "scores.json"], ["--plan", "least", "--measure", "loss"]):
        said, _ = run("prune", "--model", lumos, "--keep", "3", "--dry-run", *more, *FEW)
        assert said[0] == f"plan least: removes {lowest}"
    for plan in ("magnitude", "taylor", "middle"):
        said, _ = run("prune", "--model", lumos, "--keep", "2", "--plan", plan, "--dry-run", *FEW)
        assert said[0] == f"plan {plan}: removes 1, 2"


@pytest.mark.slow
def test_a_decoder_is_made_smaller_by_its_own_plan(lumos, run, tmp_path):
    said, _ = run("prune", "--model", lumos, "--part", "decoder", "--plan", "shallow", "--remove", "idle", "--out", "small")
    assert said[0] == "plan shallow: removes mid, up.0.1, idle"
    config = VideoTokenizer.from_pretrained(tmp_path / "small").config
    assert (config.decoder_mid, config.decoder_num_res_blocks, config.decoder_idle) == (False, (1, 2), False)
    said, _ = run("prune", "--model", lumos, "--part", "decoder", "--size", "decoder_channels=4", "--dry-run")
    assert said[0] == "plan file: removes no unit, decoder_channels becomes 4"


FAULTS = [
    ("--keep 0", "--keep 0 is not allowed; there are 4 units (0, 1, 2, 3): give 1 to 3"),
    ("--keep 9", "--keep 9 is not allowed; there are 4 units"),
    ("--keep 4", "--keep 4 is not allowed; there are 4 units"),
    ("--keep 1", "--keep 1 does not leave the first and the last unit; give at least 2, or --allow-ends"),
    ("", "--keep is missing: say how many of the 4 units stay"),
    ("--part decoder", "--keep is missing: say how many of the 4 units stay, or name --plan shallow"),
    ("--keep 2 --plan best", "--plan 'best' is unknown, did you mean least? allowed: spaced, least"),
    ("--keep 3 --plan bk", "the plan bk keeps one unit of each pair, 2 of 4, not 3"),
    ("--keep 2 --units head", "--units 'head' is unknown; allowed: layer, attention, mlp"),
    ("--keep 2 --units mlp --plan spaced", "unit 1.mlp can be skipped, but not removed"),
    ("--remove 7", "there is no unit '7'; the network has 0, 1, 2, 3"),
    ("--keep 2 --remove 1", "--remove 1 is removed already; leave it out"),
    ("--size intermediate_size", "--size 'intermediate_size' is not of the form NAME=VALUE"),
    ("--size intermediate_size=0", "intermediate_size 0 is not allowed; give a whole number from 1 to 95"),
    ("--size intermediate_size=50 intermediate_size=40", "--size names a size twice; name it once"),
    ("--keep 2 --plan random --seed -1", "--seed -1 is not allowed; give at least 0"),
    ("--keep 2 --plan scratch --seed 18446744073709551616", "--seed 18446744073709551616 is not allowed; give at most"),
    ("--size depth=1", "size 'depth' cannot be made smaller; allowed: intermediate_size"),
    ("--keep 2 --scores x.json", "--scores has no effect with the plan spaced; leave it out"),
    ("--keep 2 --plan taylor --measure loss", "--measure loss has no effect with the plan taylor; leave it out"),
    ("--plan nowhere.json", "cannot read nowhere.json as a plan: there is no such file"),
    ("--plan x.json --keep 2", "--keep and --units have no effect with a plan file, which names the units; leave them out"),
    ("--keep 3 --clips 0", "--clips 0 is not allowed; give at least 1"),
    ("--part decoder --keep 3 --plan least --data shards", "--data shards has no effect on a decoder"),
]


@pytest.mark.parametrize(("words", "message"), FAULTS, ids=[words for words, _ in FAULTS])
def test_what_prune_refuses(lumos, run, words, message, tmp_path):
    _, (error,) = run("prune", "--model", lumos, "--dry-run", *words.split(), code=2)
    assert error.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_plan_and_scores_of_another_model_are_refused(folders, lumos, run, tmp_path):
    run("prune", "--model", folders["stiv"], "--keep", "2", "--plan-out", "plan.json", "--dry-run")
    run("score", "--model", folders["stiv"], "--measures", "magnitude", *FEW)
    _, (error,) = run("prune", "--model", lumos, "--plan", "plan.json", "--out", "small", code=2)
    assert f"plan.json is the plan of another model, '{folders['stiv']}'" in error
    _, (error,) = run("prune", "--model", lumos, "--keep", "3", "--scores", "scores.json", "--out", "small", code=2)
    assert "scores.json has the scores of another checkpoint" in error
    _, (error,) = run("prune", "--model", folders["stiv"], "--keep", "3", "--scores", "scores.json", "--dry-run", code=2)
    assert "the scores have no loss of unit 0; score it with --measures loss" in error
    _, (error,) = run("prune", "--model", folders["stiv"], "--units", "mlp", "--keep", "3", "--scores", "scores.json", "--dry-run",
                      code=2)  # fmt: skip
    assert "scores.json has scores of model block, and model mlp is asked for" in error
    (tmp_path / "scores.json").write_text("[]")
    _, (error,) = run("prune", "--model", lumos, "--keep", "3", "--scores", "scores.json", "--dry-run", code=2)
    assert "scores.json holds no scores" in error
    assert not (tmp_path / "small").exists()


ROWS = [[0.0] * 5] * 5


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        ("least", {"scores": {"0": {"loss": 1}}}, "scores.json has other units than the 4 of the kind layer in "),
        ("least", {"scores": {str(i): {"loss": 1} for i in range(5)}}, "scores.json has other units than the 4"),
        ("least", {"scores": {str(i): {"loss": math.nan} for i in range(4)}}, "the scores have no loss of unit 0"),
        *(
            ("middle", {"distances": rows}, "the plan middle needs the distances between whole layers")
            for rows in (None, "x", {"a": 1}, [1, 2], [[1]], ROWS[1:], [ROWS[0][1:]] * 5, [["a"] * 5] * 5, [[math.nan] * 5] * 5)
        ),
    ],
)
def test_scores_that_cannot_be_compared(lumos, run, tmp_path, plan, changes, message):
    scores = {"sha256": network_of(lumos).sha256, "part": "model", "units": "layer", "distances": ROWS}
    scores |= {"scores": {str(i): {"loss": i} for i in range(4)}}
    words = ["prune", "--model", lumos, "--keep", "3", "--plan", plan, "--scores", "scores.json", "--dry-run"]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    said, _ = run(*words)
    assert said[0] == f"plan {plan}: removes 1"
    (tmp_path / "scores.json").write_text(json.dumps(scores | changes))
    _, (error,) = run(*words, code=2)
    assert error.startswith(f"error: {message}")


def test_weights_that_are_not_finite_have_no_scores(lumos, run, tmp_path):
    shutil.copytree(lumos, tmp_path / "damaged")
    model = LumosForVideoGeneration.from_pretrained(lumos)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "damaged")
    for words in (["score", "--measures", "magnitude"], ["score"], ["prune", "--keep", "3", "--out", "small"]):
        _, (error,) = run(words[0], "--model", "damaged", *words[1:], *FEW, code=1)
        assert error.startswith("error: scores of damaged are not finite, for example those of unit ")
    _, (error,) = run("report", "--models", lumos, "damaged", *FEW, "--count", "1", code=1)
    assert error.startswith("error: the loss of damaged is nan, so its weights are damaged or too large; copy the model again")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_plan_may_be_written_into_the_new_folder(lumos, run, tmp_path):
    run("prune", "--model", lumos, "--keep", "2", "--out", "small", "--plan-out", "small/plan.json")
    assert json.loads((tmp_path / "small" / "plan.json").read_text())["remove"] == ["1", "2"]
    plan = json.loads((tmp_path / "small" / "plan.json").read_text()) | {"units": "head"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    _, (error,) = run("prune", "--model", lumos, "--plan", "plan.json", "--dry-run", code=2)
    assert error == "error: plan.json: units is 'head'; allowed: layer, attention, mlp"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("score --model nowhere", "there is no model folder nowhere"),
        ("score --model {lumos} --keep 4", "--keep 4 is not allowed; there are 4 units: give 1 to 3"),
        ("score --model {lumos} --part decoder --units idle", "{lumos} has 1 units of the kind idle; there is nothing to compare"),
        ("score --model {lumos} --picture x.gif", "--picture x.gif has no suffix of .png, .svg, .pdf"),
        ("score --model {lumos} --units mlp --measures bi --clips 2", "the measure bi compares the stream around a whole layer"),
        ("prune --model {lumos} --keep 2", "give --out FOLDER to write the smaller model, or --dry-run"),
        ("prune --model {lumos} --keep 2 --out . ", ". exists already"),
        ("prune --model {lumos} --keep 2 --out x --plan-out x", "x and x are one file; give two different files"),
        ("prune --model . --keep 2 --dry-run", ". is no model folder: it has no config.json"),
        ("score --model {lumos} --seed -1", "--seed -1 is not allowed; give at least 0"),
        ("prune --model nowhere --keep 2 --dry-run", "there is no model folder nowhere"),
    ],
)
def test_what_both_refuse(lumos, run, words, message):
    _, (error,) = run(*words.format(lumos=lumos).split(), code=2)
    assert error.startswith(f"error: {message.format(lumos=lumos)}")
