"""docs/generation.md: its commands, as written there but with the micro model, and its table of what fits where."""

from __future__ import annotations

import argparse
import json
import re
import shlex

import pytest

from lumos.cli import main
from lumos.models.lumos1.benchmarks import generate as bench


@pytest.fixture
def text(repo):
    return (repo / "docs" / "generation.md").read_text()


@pytest.fixture
def commands(text):
    """What stands behind `python generate.py` and `python -m lumos`, by the verb."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    parts = [shlex.split(line, comments=True) for line in lines]
    return [["generate", *part[2:]] if part[1] == "generate.py" else part[3:] for part in parts if part[0] == "python"]


def test_every_generate_command(commands, micro_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "released").symlink_to(micro_folder)
    (tmp_path / "prompts.txt").write_text("a red circle moves left\na small blue square moves up\n")
    asked = [command for command in commands if command[0] == "generate"]
    assert len(asked) >= 7
    for command in asked:
        command = [part for part in command if part != "0=6GiB"]  # of a GPU, which need not be here
        model = [] if "--model" in command else ["--model", str(micro_folder)]
        assert main([*command, *model, "--num-inference-steps", "2", "--device", "cpu"]) == 0, command


def test_every_bench_command_is_understood(commands, micro_folder):
    asked = [command for command in commands if command[:2] == ["bench", "generate"]]
    assert len(asked) == 2
    for command in asked:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        assert bench.settings_from(parser.parse_args([*command[2:], "--model", str(micro_folder)])).shapes


def test_the_table_of_what_fits_is_what_plan_says(text, capsys):
    rows = re.findall(r"^\| (\S+) \| (\d+) x (\d+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(rows) == 6
    for preset, width, height, weights, cache in rows:
        plan = ["plan", "--generate", "--preset", preset, "--height", height, "--width", width, "--num-frames", "25"]
        assert main([*plan, "--dtype", "bfloat16", "--device", "cpu", "--peak-tflops", "1", "--json"]) == 0
        sizes = json.loads(capsys.readouterr().out)["bytes"]
        assert [f"{sizes[name] / 2**30:.2f}" for name in ("weights", "cache")] == [weights, cache], preset
