"""`export`: any checkpoint as a model folder, in one process, without DeepSpeed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from forks import Forks
from ranks import Runs
from safetensors.torch import load_file

from lumos import LumosConfig, LumosForVideoGeneration, LumosPipeline, registry
from lumos.cli import main
from lumos.errors import NotFound, UserError
from lumos.training.loop import train
from tokenizer.loading import find_tokenizer_folder, write_reference

ENGINES = ("plain", "zero1", "zero3")
MORE = ("zero0", "zero2")


@pytest.fixture(scope="module")
def exported(runs: Runs, forks: Forks, pytestconfig) -> Path:
    """Exports <engine>-averaged and <engine>-trained of a run of each engine, by a process without DeepSpeed and peft."""
    folder = runs.folder / "exported"
    commands = [
        ["export", str(runs.whole(engine)), "--out", str(folder / f"{engine}-{weights}"), "--weights", weights]
        for engine in (*ENGINES, *(MORE if pytestconfig.getoption("thorough") else ()))
        for weights in ("averaged", "trained")
    ]
    code = (
        "import sys; assert not {'deepspeed', 'peft'} & set(sys.modules); sys.modules |= {'deepspeed': None, 'peft': None}\n"
        f"from lumos.cli import main; sys.exit(max(main(command) for command in {commands!r}))"
    )
    done = forks.run(["-c", code])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{folder / 'zero3-averaged'}  model of step 5, averaged weights, float32" in done.stdout
    return folder


@pytest.mark.parametrize("engine", [*ENGINES, *(pytest.param(engine, marks=pytest.mark.thorough) for engine in MORE)])
def test_the_weights_of_every_engine(exported: Path, runs: Runs, engine: str):
    own = load_file(runs.whole(engine) / "export" / "model.safetensors")
    for weights in ("averaged", "trained"):
        ours, plain = (load_file(exported / f"{name}-{weights}" / "model.safetensors") for name in (engine, "plain"))
        assert ours.keys() == plain.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, own[name]) == (weights == "averaged"), name
            assert (tensor - plain[name]).abs().mean() < 1e-5, name
    pipe = LumosPipeline.from_pretrained(exported / f"{engine}-trained")
    assert pipe.clip.num_frames == 5
    assert json.loads((exported / f"{engine}-trained" / "training.json").read_text())["averaged"] is False


def test_one_checkpoint_in_another_number_format(runs: Runs, tmp_path: Path, capsys):
    checkpoint = runs.whole("zero2") / "checkpoints" / "step-00000004"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert "model of step 4, averaged weights, bfloat16" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / "half" / "video_tokenizer" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_mix_is_between_the_two(runs: Runs, exported: Path, tmp_path: Path):
    """A mix is the weighted mean of the run's averaged weights and a model folder, and training.json names it."""
    other = exported / "zero1-trained"
    assert main(["export", str(runs.whole("plain")), "--out", str(tmp_path / "mixed"), "--mix", str(other), "0.25"]) == 0
    own, theirs, mixed = (load_file(f / "model.safetensors") for f in (exported / "plain-averaged", other, tmp_path / "mixed"))
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.75 * own[name] + 0.25 * theirs[name])
    assert any(not torch.equal(tensor, own[name]) for name, tensor in mixed.items())
    said = json.loads((tmp_path / "mixed" / "training.json").read_text())["mix"]
    assert (said["folder"], said["share"]) == (str(other), 0.25)
    assert said["sha256"] == {"model.safetensors": hashlib.sha256((other / "model.safetensors").read_bytes()).hexdigest()}


def test_a_damaged_newest_checkpoint(runs: Runs, tmp_path: Path, capsys):
    shutil.copytree(runs.whole("zero3"), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000005" / "rank-0001.safetensors").unlink()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "rank-0001.safetensors is missing; trying the checkpoint before it" in said.err
    assert "model of step 4" in said.out


def test_what_cannot_be_exported(runs: Runs, tmp_path: Path, capsys):
    run = str(runs.whole("plain"))
    (tmp_path / "there").mkdir()
    shutil.copytree(runs.whole("plain") / "export" / "text_tokenizer", tmp_path / "text")
    text = tmp_path / "text" / "tokenizer.model"
    text.write_bytes(text.read_bytes() + b"\n")
    video = str(runs.whole("plain") / "export" / "video_tokenizer")
    other = shutil.copytree(runs.whole("plain") / "export", tmp_path / "other")
    config = LumosConfig.from_pretrained(other)
    config.num_hidden_layers = 1
    LumosForVideoGeneration(config).save_pretrained(other)
    for args, words in (
        ([run, "--out", str(tmp_path / "there")], "exists already; name another --out"),
        ([str(tmp_path), "--out", "x"], "is no run, checkpoint or adapter folder"),
        ([run, "--out", "x", "--merge"], "has no adapters to merge"),
        ([run, "--out", "x", "--model", "y"], "--model has an effect only with --merge"),
        ([run, "--out", "x", "--merge", "--link-video-tokenizer"], "--link-video-tokenizer takes the run of a whole model"),
        ([run, "--out", "x", "--mix", "y", "0.3"], "--mix: there is no model folder y"),
        ([run, "--out", "x", "--mix", f"{run}/export", "1"], "--mix .* 1 is not allowed; give a share between 0 and 1"),
        ([run, "--out", "x", "--mix", f"{run}/export", "half"], "--mix .* half is not allowed"),
        ([run, "--out", "x", "--mix", str(tmp_path / "there"), "0.3"], "cannot be read.*--mix takes a model folder"),
        ([run, "--out", "x", "--mix", str(other), "0.3"], "is another model than the run's: its num_hidden_layers is 1, not 2"),
        ([run, "--out", "x", "--merge", "--mix", "y", "0.3"], "--mix takes the run of a whole model"),
        ([run, "--out", "x", "--video-tokenizer", "y"], "give both or none"),
        ([run, "--out", "x", "--video-tokenizer", "y", "--text-tokenizer", str(text)], "cannot be read: .*--video-tokenizer"),
        ([run, "--out", "x", "--video-tokenizer", video, "--text-tokenizer", str(text)], "is another text tokenizer"),
    ):
        assert main(["export", *args]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(words, error), error
    assert not Path("x").exists()


def test_no_averaged_weights(micro_settings, tmp_path: Path, capsys):
    folder = train(micro_settings(training={"max_steps": 1}))["output_dir"]
    assert main(["export", folder, "--out", str(tmp_path / "x"), "--weights", "averaged"]) == 2
    assert "has no averaged weights (training.ema_decay was 0)" in capsys.readouterr().err
    assert main(["export", folder, "--out", str(tmp_path / "x")]) == 0
    assert "trained weights" in capsys.readouterr().out


def test_a_linked_video_tokenizer(runs: Runs, tmp_path: Path, capsys):
    """A model folder that only names the tokenizer's folder works like one with a copy, while the tokenizer is unchanged."""
    whole, run = runs.whole("plain") / "export", tmp_path / "release" / "run"
    base, linked = tmp_path / "release" / "base", tmp_path / "release" / "linked"
    shutil.copytree(whole, base)
    shutil.copytree(runs.whole("plain"), run)
    tokenizers = ["--video-tokenizer", str(base), "--text-tokenizer", str(base)]
    assert main(["export", str(run), "--out", str(linked), "--link-video-tokenizer", *tokenizers]) == 0
    assert not (linked / "video_tokenizer").exists()
    assert json.loads((linked / "video_tokenizer.json").read_text())["folder"] == "../base/video_tokenizer"
    moved = Path(shutil.move(tmp_path / "release", tmp_path / "moved"))
    ours, theirs = (LumosPipeline.from_pretrained(folder) for folder in (moved / "linked", whole))
    for name, tensor in theirs.video_tokenizer.state_dict().items():
        assert torch.equal(tensor, ours.video_tokenizer.state_dict()[name]), name
    task = registry.generator("lumos1").load("task")
    assert task.part_of(str(moved / "linked"), "video").resolve() == (moved / "base" / "video_tokenizer").resolve()
    ours.save_pretrained(moved / "linked")
    assert (moved / "linked" / "video_tokenizer").is_dir()
    assert not (moved / "linked" / "video_tokenizer.json").exists()


def test_a_linked_video_tokenizer_that_is_wrong(runs: Runs, tmp_path: Path):
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    model.mkdir()
    shutil.copytree(runs.whole("plain") / "export" / "video_tokenizer", tokenizer)
    write_reference(model, tokenizer)
    assert find_tokenizer_folder(model).resolve() == tokenizer.resolve()
    (tokenizer / "config.json").write_text((tokenizer / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"another one than .*video_tokenizer.json names"):
        find_tokenizer_folder(model)
    shutil.rmtree(tokenizer)
    with pytest.raises(NotFound, match=r"names the video tokenizer ../tokenizer, and there is none"):
        find_tokenizer_folder(model)
    (model / "video_tokenizer.json").write_text('{"folder": 3}')
    with pytest.raises(UserError, match="must hold a JSON object with the texts folder and sha256"):
        find_tokenizer_folder(model)
