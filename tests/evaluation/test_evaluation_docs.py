"""The commands of docs/evaluate/, as written there, with few steps and samples where they draw."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from pages import command_lines

from lumos.cli import main
from lumos.evaluation.scores import PARTS


@pytest.fixture
def clone(repo, tmp_path, monkeypatch):
    for name in ("checkpoints", "configs"):
        (tmp_path / name).symlink_to(repo / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


@pytest.fixture
def commands(repo):
    return [shlex.split(line) for page in ("index", "benchmarks") for line in command_lines(f"docs/evaluate/{page}.md")]


@pytest.mark.slow
def test_every_list_is_drawn_and_the_loss_is_measured(commands, clone, micro_folder, capsys):
    draws = [c for c in commands if "--prompts" in c]
    assert {c[c.index("evaluate") + 1] for c in draws} == {"vbench", "vbench-i2v", "geneval"}
    for command in draws:
        start = command.index("evaluate")
        assert command[:start] in (["python", "-m", "lumos"], ["torchrun", "--nproc_per_node", "2", "-m", "lumos"])
        small = ["--model", str(micro_folder), "--samples", "1", "--num-inference-steps", "1", "--json"]
        assert main([*command[start:], *small]) == 0, command
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        out = Path(command[command.index("--out") + 1])
        assert (out / "manifest.json").is_file()
        assert summary["made"] > 0
        assert (summary["missing"] == 0) == ("--shard" not in command)
    losses = [c for c in commands if "loss" in c]
    assert len(losses) == 2
    for command in losses:
        assert main([*command[3:], "--count", "2", "--bins", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["clips"] == 2
    assert Path("loss.json").is_file()


@pytest.mark.slow
def test_the_prompts_of_the_small_worlds(commands, clone, capsys):
    model, truth = (c[3:] for c in commands if c[4:5] == ["prompts"])
    assert main([*model, "--count", "1", "--num-inference-steps", "1"]) == 0
    assert Path("sheet.png").is_file()
    assert main([*truth, "--count", "8", "--json"]) == 0
    shares = json.loads(capsys.readouterr().out.splitlines()[-1])["shares"]
    assert {kind: share["all"] for kind, share in shares.items()} == {"sprites": 1, "two_sprites": 1, "paraphrased": 1}


def test_the_results_are_summed_up(commands, clone, capsys):
    for folder, name in (("evaluation_results", "vbench"), ("evaluation_results_i2v", "vbench-i2v")):
        Path(folder).mkdir()
        for dimension in (d for _, part in PARTS[name].values() for d in part):
            Path(folder, f"{dimension}_eval_results.json").write_text(json.dumps({dimension: [0.75, []]}))
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    rows = [{"tag": tag, "prompt": tag, "correct": n % 2 == 0} for n, tag in enumerate(tags)]
    Path("results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = [c for c in commands if "--aggregate" in c]
    assert [c[4] for c in sums] == ["vbench", "vbench-i2v", "geneval"]
    for command in sums:
        assert main([*command[3:], "--json"]) == 0
        assert 0 < json.loads(capsys.readouterr().out.splitlines()[-1])["total"] < 1
    assert json.loads(Path("vbench.json").read_text())["evaluate"] == "vbench"
