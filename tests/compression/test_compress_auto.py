"""`compress report` and `compress auto` as a user types them, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_log import read_log
from small_networks import lumos_folder, stiv_folder

from lumos import VideoPipeline
from lumos.cli import main
from lumos.commands.compress_auto import table as auto_table
from lumos.compression.auto import data_settings, least_pruning, recovery_settings
from lumos.compression.networks import network_of
from lumos.compression.plans import Plan
from lumos.compression.report import table as report_table
from lumos.errors import UserError

FEW = ["--count", "2", "--kinds", "one", "--device", "cpu"]
QUICK = [
    "training.batch_size=2", "training.save_every_steps=1", "training.log_every=1", "data.validation_clips=1", "data.workers=0",
    "logging.peak_tflops=0.1",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {"lumos1": str(lumos_folder(place / "lumos")), "stiv": str(stiv_folder(place / "stiv"))}


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs `compress ...` in an empty folder -> (lines on stdout, the error or None); asserts the exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, code: int = 0) -> tuple[list[str], str | None]:
        found = main(["compress", *words])
        said = capsys.readouterr()
        assert found == code, said.err
        return said.out.splitlines(), next((line for line in said.err.splitlines() if line.startswith("error: ")), None)

    return call


# ---- report

@pytest.mark.slow
def test_a_report_compares_models_in_one_table(folders, run, tmp_path):
    pytest.importorskip("matplotlib")
    model = folders["lumos1"]
    run("prune", "--model", model, "--keep", "2", "--out", "small")
    said, _ = run("report", "--models", model, "small", *FEW, "--repetitions", "2")
    head, *rows = said[:3]
    assert head.split()[:3] == ["model", "parameters", "sampling"]
    assert "one: all right" in head
    assert [row.split()[0] for row in rows] == [model, "small"]
    assert "1.00 x" in rows[0]
    found = json.loads((tmp_path / "report.json").read_text())
    whole, small = found["models"]
    for row, folder in ((whole, model), (small, "small")):
        network = VideoPipeline.from_pretrained(folder, device="cpu").model
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
        assert row["bytes"] == sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        assert row["seconds"].keys() == {"sampling", "pixels"}
        assert 0 <= row["shares"]["one"]["all"] <= 1
        assert "first frame" in row["losses"]["loss_by"]["frames"]
        assert f"{row['losses']['loss']:.3f}" in rows[row is small].split()
    assert whole["decoder_parameters"] == small["decoder_parameters"] > 0
    assert whole["sha256"] != small["sha256"]
    assert f"{whole['seconds']['sampling'] / small['seconds']['sampling']:.2f} x" in rows[1]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("words", "message"), [
    ("--models {lumos1} {lumos1}", "--models names"),
    ("--models {lumos1} {lumos1}/.", "--models names"),
    ("--models {lumos1} {stiv}", "the models make clips of 2 shapes"),
    ("--models nowhere", "there is no model folder nowhere"),
    ("--models {lumos1} --count 0", "--count 0 is not allowed"),
    ("--models {lumos1} --kinds three", "prompt kind 'three' is unknown"),
    ("--models {lumos1} --output x.png", "x.png and x.png are one file; give two different files"),
])  # fmt: skip
def test_what_report_refuses(folders, run, words, message):
    _, error = run("report", *words.format(**folders).split(), "--device", "cpu", code=2)
    assert message in error


def test_motion_in_the_tables_is_the_share_that_is_right():
    row = {"model": "m", "parameters": 1, "seconds": {"sampling": 1.0, "pixels": 1.0}, "losses": {"loss": 2.0}}
    rows = [row | {"shares": {"one": {"all": 0.5, "motion": share, "steady": 1.0, "moved": 7.0}}} for share in (0.75, 0.25)]
    head, *found = report_table(rows, ["one"])
    assert [line[head.index("motion")] for line in found] == ["0.75", "0.25"]
    costs = SimpleNamespace(before={"units": 4, "flops": 1}, after={"units": 2, "flops": 1})
    (line,) = [line for line in auto_table([rows[0], *rows], costs, {}) if line.startswith("one: motion")]
    assert line.split()[2:] == ["0.75", "0.75", "0.25"]


def test_a_picture_needs_matplotlib(folders, run, monkeypatch, tmp_path):
    monkeypatch.setattr("lumos.commands.compress_report.find_spec", lambda name: None)
    _, error = run("report", "--models", folders["lumos1"], *FEW, "--sheet", "x.png", code=2)
    assert "--sheet needs matplotlib; install it with pip install 'lumos-video[plot]', or leave it out" in error
    assert list(tmp_path.iterdir()) == []


# ---- auto

def auto(model: str, *more: str) -> list[str]:
    some = ["--target-speedup", "1.3", "--steps", "2", "--clips", "2"]
    return ["auto", "--model", model, "--out", "out", *some, *FEW, *QUICK, *more]


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["lumos1", pytest.param("stiv", marks=pytest.mark.thorough)])
def test_auto_does_all_four_steps_and_resumes(folders, run, tmp_path, monkeypatch, generator):
    from lumos.commands import compress_report

    def killed(args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compress_report, "run", killed)
        run(*auto(folders[generator]), code=1)
    out = tmp_path / "out"
    made = {name: (out / name).stat().st_mtime_ns for name in ("scores.json", "pruned", "distill/export", "distill.yaml")}
    said, _ = run(*auto(folders[generator]))
    assert {name: (out / name).stat().st_mtime_ns for name in made} == made
    summary = json.loads((out / "summary.json").read_text())
    assert any("is the smaller model" in line for line in said)
    assert summary["predicted_speedup"] >= 1.3
    assert [row["model"] for row in summary["models"]] == [folders[generator], "out/pruned", "out/distill/export"]
    assert summary["models"][0]["parameters"] > summary["models"][1]["parameters"] == summary["models"][2]["parameters"]
    assert sorted(read_log(out / "distill")) == [1, 2]
    kept = json.loads((out / "distill/export/compression.json").read_text())["kept"]
    assert summary["kept"] == kept
    pipe = VideoPipeline.from_pretrained(out / "distill/export", device="cpu")
    assert pipe.model.config.num_hidden_layers == len(kept) < 4
    assert any(line.split() == ["layers", "4", str(len(kept)), str(len(kept))] for line in said)
    assert sum(line.endswith("is there already") for line in said) == 3
    commands = [line.split()[5] for line in said if line.startswith("$ ")]
    assert commands == ["score", "prune", "distill", "report"]
    report = (out / "report.json").stat().st_mtime_ns
    run(*auto(folders[generator]))
    assert (out / "report.json").stat().st_mtime_ns == report


def test_auto_takes_no_result_of_other_inputs(folders, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text("{}")
    _, error = run(*auto(folders["lumos1"]), code=2)
    assert "out/scores.json was made from other inputs (nothing says from which inputs); delete it" in error
    (tmp_path / "out" / "scores.json").unlink()
    _, error = run(*auto(folders["lumos1"], "--steps", "3"), code=2)
    assert "out/distill.yaml was made from other inputs (" in error
    assert "max_steps was 2, now 3" in error


def test_auto_has_a_folder_for_each_model(folders, run, tmp_path):
    (tmp_path / "runs" / "lumos-faster").mkdir(parents=True)
    (tmp_path / "runs" / "lumos-faster" / "distill.yaml").write_text("{}")
    _, error = run("auto", "--model", folders["lumos1"], *FEW, code=2)
    assert "runs/lumos-faster/distill.yaml was made from other inputs" in error


@pytest.mark.parametrize(("words", "message"), [
    (["--target-speedup", "1"], "--target-speedup 1 is not allowed; give a number above 1"),
    (["--target-speedup", "nan"], "--target-speedup nan is not allowed"),
    (["--target-speedup", "50"], "--target-speedup 50 cannot be reached: with 2 of 4 layers a clip is"),
    (["--data", "nowhere"], "--data nowhere is no folder of shards; give one that"),
    (["--steps", "0"], "--steps 0 is not allowed"),
    (["--kinds", "one", "training.lr=1"], "prompt kind 'training.lr=1' is unknown"),
    (["training.lrr=1"], "unknown key training.lrr"),
    (["--model", "nowhere"], "there is no model folder nowhere"),
])  # fmt: skip
def test_what_auto_refuses(folders, run, tmp_path, words, message):
    _, error = run(*auto(folders["lumos1"], *words), code=2)
    assert message in error
    assert not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["lumos1", "stiv"])
def test_as_many_layers_stay_as_the_speed_allows(folders, generator):
    """The number of layers that is kept is fast enough, and one layer more is not."""
    network = network_of(folders[generator])

    def plan_of(keep: int) -> Plan:
        return Plan("spaced", "model", "", tuple("123"[: 4 - keep]), sha256=network.sha256)

    flops = {keep: network.flops(network.on_meta().without(plan_of(keep).remove))[0] for keep in (2, 3)}
    whole = network.flops(network.on_meta())[0]
    for keep in (2, 3):
        _, predicted, speedup = least_pruning(network, whole / flops[keep], plan_of)
        assert (predicted.after["units"], speedup) == (keep, pytest.approx(whole / flops[keep]))
    assert least_pruning(network, whole / flops[3] + 1e-6, plan_of)[1].after["units"] == 2
    with pytest.raises(UserError, match="cannot be reached: with 2 of 4 layers"):
        least_pruning(network, whole / flops[2] + 1e-6, plan_of)


def test_recovery_has_the_settings_of_training_at_half_lr(folders, tmp_path):
    network = network_of(folders["lumos1"])
    before = {
        "name": "x", "model": {"preset": "tiny"}, "masking": {"kind": "tube", "min_ratio": 0.4},
        "data": {"source": "worlds", "options": {"kinds": ["digits"]}, "height": 8,
                 "stages": [{"steps": 5, "image_share": 1.0}, {"steps": 7, "first_frames": 5}]},
        "training": {"lr": 4e-4, "batch_size": 24, "max_steps": 10_000, "compile": True, "optimizer": "muon"},
        "logging": {"to": ["wandb"]}, "samples": {"every": 5}, "tokenizer": {"video": "gone"},
    }  # fmt: skip
    found = recovery_settings(network, tmp_path / "pruned", "worlds", 100, tmp_path / "run", {"settings": before})
    assert found["masking"] == before["masking"]
    assert found["model"] == {"from": str(tmp_path / "pruned")}
    assert found["training"] == {
        "batch_size": 24, "optimizer": "muon", "max_steps": 100, "lr": 2e-4, "min_lr": 2e-5, "schedule": "cosine",
        "warmup_steps": 10, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    assert found["distill"] == {"teacher": str(network.folder), "critic_warmup": 25, "critic_lr": 1e-3}
    assert found["data"]["height"] == network.clip.height
    assert found["data"]["options"] == {"kinds": ["digits"]}
    assert found["data"]["stages"] == [{"steps": None, "first_frames": 5}]
    assert found.keys() == {"generator", "name", "model", "distill", "data", "masking", "training"}
    of_shards = {"source": "shards", "num_frames": network.clip.num_frames, "path": "somewhere"}
    assert data_settings(network, "somewhere", before["data"]) == of_shards
