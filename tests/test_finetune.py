"""`finetune` on tiny models: from clips to a model and a sheet, resuming after kills, and refusals."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from micro_stiv import micro_pipeline
from PIL import Image
from run_log import read_log
from safetensors.torch import load_file

from lumos import VideoPipeline
from lumos.cli import main
from lumos.commands import finetune, ingest
from lumos.commands.finetune import device_of, held_by_tokenizer
from lumos.errors import UserError
from lumos.files import write_json
from lumos.training.loop import Run
from lumos.video.io import write_video

pytest.importorskip("pyarrow")

QUICK = [
    "training.batch_size=2", "training.save_every_steps=1", "training.log_every=1", "data.workers=0", "logging.peak_tflops=0.1",
    "--device", "cpu",
]  # fmt: skip
OWN = {"settings": {"data": {"source": "worlds", "options": {"kinds": ["shapes"]}, "stages": []}, "training": {}}}


def test_the_device_may_be_an_override():
    assert device_of(None, ["training.lr=1", "training.device=cpu"]) == device_of("cpu", ["training.device=cpu"]) == "cpu"
    assert (device_of("cuda", []), device_of(None, [])) == ("cuda", None)
    with pytest.raises(UserError, match="name two devices; give one"):
        device_of("cuda", ["training.device=cpu"])


@pytest.fixture(scope="module")
def models(tmp_path_factory, micro_folder) -> dict[str, str]:
    """Models of each generator whose training.json names a training on scenes of shapes."""
    place = tmp_path_factory.mktemp("models")
    shutil.copytree(micro_folder, place / "lumos1")
    micro_pipeline().save_pretrained(place / "stiv")
    for name in ("lumos1", "stiv"):
        write_json(place / name / "training.json", OWN)
    return {name: str(place / name) for name in ("lumos1", "stiv")}


@pytest.fixture
def clips(tmp_path) -> Path:
    """Three clips of 8 frames of moving noise at 8 fps, with captions."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", np.stack([np.roll(noise, t, axis=1) for t in range(8)]), 8)
        (folder / f"{number}.txt").write_text(f"noise number {number} moves right\n")
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, one_thread) -> Callable[..., tuple[str, str]]:
    """Runs `finetune clips ...` in an empty folder -> (stdout, stderr); asserts the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ingest, "usual_workers", lambda device: 0)

    def call(*words: str, code: int = 0) -> tuple[str, str]:
        found = main(["finetune", "--steps", "2", *words, *QUICK])
        said = capsys.readouterr()
        assert found == code, said.err
        return said.out, said.err

    return call


def killed_at(step: int) -> Callable[[Run], None]:
    """A `Run._report` that ends the training after a step."""
    report = Run._report

    def ended(self: Run) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        report(self)

    return ended


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["lumos1", "stiv"])
def test_from_clips_to_a_model_killed_and_resumed(models, clips, run, tmp_path, monkeypatch, generator):
    (clips / "2.txt").write_text("noise " * 400)
    words = ["clips", "--model", models[generator], "--out", "out", "training.warmup_steps=0"]
    said, _ = run(*words, "--dry-run")
    assert "clips      3 of 3 items of clips" in said
    assert "replay     50% of the steps have the model's own data: synthetic scenes" in said
    assert "tokenizer  PSNR " in said
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_report", killed_at(2))
        run(*words, code=1)
    out = tmp_path / "out"
    assert not (out / "export").exists()
    ingested = (out / "shards" / "report.json").stat().st_mtime_ns
    said, err = run("clips/", *words[1:], "--json")  # the same folder as another shell completes it
    assert "note: out/sheet.png has no result for 'noise noise" in err
    summary = json.loads(said)
    assert (out / "shards" / "report.json").stat().st_mtime_ns == ingested
    assert summary["clips"] == 3
    assert summary["replay"] == 0.5
    assert summary["psnr"] == json.loads((out / "tokenizer.json").read_text())["psnr"] > 0
    assert sorted(read_log(out)) == [1, 2]
    pipe = VideoPipeline.from_pretrained(summary["export"], device="cpu")
    assert pipe("noise number 1 moves right", seed=0, output_type="uint8").frames[0].shape[0] == 5
    with Image.open(summary["sheet"]) as sheet:
        assert sheet.height > 3 * 24
    settings = json.loads((out / "export" / "training.json").read_text())["settings"]
    assert settings["data"]["replay"] == [{"share": 0.5, "source": "worlds", "path": None, "options": {"kinds": ["shapes"]}}]
    assert settings["data"]["num_frames"] == 5
    assert settings["training"]["warmup_steps"] == 0
    run("clips", "--model", models[generator], "--out", "whole", "training.warmup_steps=0")
    assert read_log(out) == read_log(tmp_path / "whole")
    made = {path: path.stat().st_mtime_ns for path in (out / "export", out / "sheet.png", out / "log.jsonl")}
    said, _ = run(*words)
    assert said.count("is there already") == 2
    assert made == {path: path.stat().st_mtime_ns for path in made}


@pytest.mark.slow
def test_adapters_leave_the_model_unchanged(models, clips, run, tmp_path):
    pytest.importorskip("peft")
    (clips / "short.mp4").write_bytes((clips / "0.mp4").read_bytes())
    write_video(clips / "short.mp4", np.zeros((2, 24, 32, 3), dtype=np.uint8), 8)
    (clips / "short.txt").write_text("black\n")
    for name in ("0.txt", "1.txt"):
        (clips / name).unlink()
    said, err = run("clips", "--model", models["lumos1"], "--out", "out", "--lora", "--caption", "noise", "--replay", "0")
    assert "training   2 steps of 6 clips, adapters" in said
    assert "replay     0% of the steps: it may forget what it knew" in said
    assert "note: 1 of 4 items are left out (too short 1), see out/shards/skipped.jsonl" in err
    assert f"python -m lumos generate --model {models['lumos1']} --lora out/export --prompt noise" in said
    assert load_file(tmp_path / "out" / "export" / "adapter_model.safetensors")
    assert (tmp_path / "out" / "sheet.png").is_file()
    record = json.loads((tmp_path / "out" / "export" / "lumos_adapter.json").read_text())
    assert record


def test_a_missing_package_is_told_before_any_work(micro_folder, clips, run, monkeypatch):
    from lumos.data.shards.format import parquet

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    parquet.cache_clear()
    for words in ([], ["--dry-run"]):
        said, err = run("clips", "--model", str(micro_folder), "--out", "out", *words, code=2)
        assert (said, "Parquet files need pyarrow, which is not installed" in err) == ("", True)
    assert not Path("out").exists()


def test_a_model_whose_own_data_are_not_known(micro_folder, clips, run):
    said, err = run("clips", "--model", str(micro_folder), "--out", "out", "--dry-run")
    assert "replay     0% of the steps" in said
    assert "note: the model will forget much of what it knew: its own data are not known (no training.json in" in err
    assert run("clips", "--model", str(micro_folder), "--out", "out", "--dry-run", "--quiet") == (said, "")
    _, err = run("clips", "--model", str(micro_folder), "--out", "out", "--replay", "0.3", code=2)
    assert "--replay 0.3 is not possible: the data of the model's own training are not known" in err


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "there is no source nowhere; give a folder"),
    (["clips/empty"], "there is no video in clips/empty; put clips into it, each with its caption in a .txt of the same name"),
    (["clips/bare"], "none of the 1 clips of clips/bare has a caption; write it into name.txt beside each name.mp4, give a table"),
    (["clips/short"], "none of the 1 clips of clips/short can be used; the first: clips/short/a.mp4: 3 frames at 8 fps, 5 are"),
    (["clips/short"], "(the model makes 5 frames at 8 fps, which are 0.6 seconds)"),
    (["clips/still"], "the first: clips/still/a.png: 1 frame, 5 are needed"),
    (["clips/broken"], "none of the 1 clips of clips/broken can be used; the first: "),
    (["clips", "--captions", "x", "--caption", "y"], "--captions x must be a file with columns path and caption"),
    (["clips", "--captions", "t.csv", "--caption", "y"], "--captions and --caption both say what the clips show; leave one of"),
    (["clips", "--caption", " "], "--caption ' ' cannot be used: no caption"),
    (["clips", "--model", "nowhere"], "there is no model folder nowhere"),
    (["clips", "--steps", "0"], "--steps 0 is not allowed"),
    (["clips", "--replay", "1"], "--replay 1 is not allowed; give a share from 0 to below 1"),
    (["clips", "--clips-per-video", "0"], "--clips-per-video 0 is not allowed"),
    (["clips", "training.lrr=1"], "unknown key training.lrr"),
    (["clips", "--out", "clips/out"], "--out clips/out is inside of clips, whose videos are the clips to train on; name another"),
    (["clips", "--out", "full"], "--out full holds something else than a fine-tuning; name another --out"),
    (["clips", "--loraa"], "did you mean --lora?"),
])  # fmt: skip
def test_what_is_refused_before_anything_is_written(models, clips, run, tmp_path, words, message):
    for name in ("empty", "bare", "short", "still", "broken"):
        (clips / name).mkdir()
        (clips / name / "a.txt").write_text("noise\n")
    shutil.copy(clips / "0.mp4", clips / "bare" / "a.mp4")
    (clips / "bare" / "a.txt").unlink()
    write_video(clips / "short" / "a.mp4", np.zeros((3, 24, 32, 3), dtype=np.uint8), 8)
    Image.new("RGB", (32, 24)).save(clips / "still" / "a.png")
    (clips / "broken" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "t.csv").write_text("path,caption\n0.mp4,noise\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "log.jsonl").touch()
    model = [] if "--model" in words else ["--model", models["lumos1"]]
    before = sorted(tmp_path.rglob("*"))
    _, err = run(*words, *model, *([] if "--out" in words else ["--out", "out"]), code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_another_run_is_not_continued(models, clips, run, monkeypatch):
    words = ["clips", "--model", models["lumos1"], "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "run", killed)
        run(*words, code=1)
    for more, message in (
        (["--replay", "0.25"], "settings.data.replay was [{'options': {"),
        (["--lora"], "lora was False, now True"),
        (["--clips-per-video", "2"], "clips_per_video was 1, now 2"),
        (["--model", models["stiv"]], "model was "),
    ):
        _, err = run(*words, *more, code=2)
        assert f"error: out/finetune.yaml was made from other inputs ({message}" in err
    (clips / "3.mp4").write_bytes((clips / "2.mp4").read_bytes())
    (clips / "3.txt").write_text("noise again\n")
    _, err = run(*words, code=2)
    assert "error: out/finetune.yaml was made from other inputs (clips was" in err


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("psnr", "said"), [(22.0, "loses details, faces and text"), (27.0, "loses fine details"), (33.0, "well")])
def test_a_plain_sentence_says_what_the_tokenizer_holds(psnr, said):
    assert said in held_by_tokenizer(psnr)
    assert f"PSNR {psnr:.1f} dB" in held_by_tokenizer(psnr)


def test_help_names_every_option(capsys):
    assert main(["finetune", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--replay", "--lora", "--steps", "--caption", "--dry-run", "--json", "--model"))
    assert finetune.__doc__.startswith("`finetune`: ")
