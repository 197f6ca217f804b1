"""docs/generate/: its commands with the micro model, and its table of models and GPU memory."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
import torch
from pages import blocks, verbs

from lumos.cli import main
from lumos.models.lumos1.benchmarks import arguments
from lumos.models.lumos1.benchmarks import generate as bench

PAGES = [f"docs/generate/{name}.md" for name in ("index", "python", "speed", "benchmarks", "long-clips", "lists", "memory")]


@pytest.fixture
def commands():
    """Return the words behind `python generate.py` and `python -m lumos`, by verb."""
    return [command for page in PAGES for command in verbs(page)]


@pytest.mark.slow
def test_every_generate_command(commands, micro_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "released").symlink_to(micro_folder)
    (tmp_path / "prompts.txt").write_text("a red circle moves left\na small blue square moves up\n")
    asked = [command for command in commands if command[0] == "generate" and "--engine" not in command]  # which has its own tests
    assert len(asked) >= 13
    for command in asked:
        command = [part for part in command if part != "0=6GiB"]  # options of a GPU, which this machine may lack
        model = [] if "--model" in command else ["--model", str(micro_folder)]
        assert main([*command, *model, "--num-inference-steps", "2", "--device", "cpu"]) == 0, command


@pytest.mark.slow
def test_the_python_examples(repo, monkeypatch):
    monkeypatch.chdir(repo)
    call, parts = blocks("docs/generate/python.md", "python")
    scope: dict = {}
    exec(call, scope)
    assert scope["clip"].shape == (17, 128, 128, 3)
    assert scope["clip"].dtype == np.float32
    (later,) = blocks("docs/generate/long-clips.md", "python")
    compile(later, "long-clips", "exec")
    video, ids = torch.zeros(1, 3, 5, 32, 32), torch.tensor([[0, 20, 21, 1]])
    scope = {"folder": "checkpoints/lumos-tiny", "video": video, "input_ids": ids}
    exec(parts, scope)
    assert scope["codes"].shape == (1, 2, 2, 2)
    assert scope["logits"].shape[:2] == (1, 4)


def test_every_bench_command_is_understood(commands, micro_folder):
    asked = [command for command in commands if command[:2] == ["bench", "generate"]]
    assert len(asked) == 2
    for command in asked:
        parser = argparse.ArgumentParser()
        arguments.generate(parser)
        assert bench.settings_from(parser.parse_args([*command[2:], "--model", str(micro_folder)])).shapes


@pytest.mark.slow
def test_the_table_of_what_fits_is_what_plan_says(repo, capsys):
    text = (repo / "docs" / "generate" / "memory.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\d+) x (\d+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(rows) == 6
    for preset, width, height, weights, cache in rows:
        plan = ["plan", "--generate", "--preset", preset, "--height", height, "--width", width, "--num-frames", "25"]
        assert main([*plan, "--dtype", "bfloat16", "--device", "cpu", "--peak-tflops", "1", "--json"]) == 0
        sizes = json.loads(capsys.readouterr().out)["bytes"]
        assert [f"{sizes[name] / 2**30:.2f}" for name in ("weights", "cache")] == [weights, cache], preset
