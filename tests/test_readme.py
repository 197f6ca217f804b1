"""The README: its commands, as written there, with few steps where they are long; its length; its table of sizes."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
from pages import blocks, command_lines, verbs
from PIL import Image

from lumos.cli import main
from lumos.video.io import write_video


@pytest.fixture
def clone(repo, tmp_path, monkeypatch):
    """A working folder that looks like the repository's root."""
    for name in ("checkpoints", "configs", "generate.py", "train.py", "lumos", "tokenizer"):
        (tmp_path / name).symlink_to(repo / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_two_commands_are_the_promised_ones(repo):
    first, second = blocks("README.md", "bash")[0].splitlines()
    example = 'python generate.py --prompt "a large red circle moves left on a gray background"'
    assert first == f"pip install -c constraints.txt -e . && {example}"
    assert second == 'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile'
    assert blocks("docs/install.md", "bash")[0].splitlines() == [first, second]


def test_the_readme_is_under_700_words(repo):
    text = re.sub(r"```.*?```", "", (repo / "README.md").read_text(), flags=re.DOTALL)
    assert len(" ".join(line for line in text.splitlines() if not line.startswith("|")).split()) < 700


def test_a_moving_picture_comes_before_the_commands(repo):
    head = (repo / "README.md").read_text().split("```")[0]
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", head)
    with Image.open(repo / path) as picture:
        assert picture.n_frames > 1
        assert picture.height < 400
    assert head.count("\n") < 12


@pytest.mark.slow
def test_the_first_command_as_it_stands(clone, forks):
    command = command_lines("README.md")[1]
    done = forks.run(shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr
    path, rest = done.stdout.splitlines()[-1].split("  seed ")
    assert (clone / path).is_file()
    assert (clone / f"{path}.json").is_file()
    assert re.fullmatch(r"\d+  [\d.]+ s  peak memory \d+ MB", rest)


@pytest.mark.slow
def test_the_examples_of_the_command_line(clone):
    _, *examples = verbs("README.md")
    assert [command[0] for command in examples] == ["generate"] * 3 + ["finetune"] + ["generate"] * 3
    tuning = examples.pop(3)
    (clone / "clips").mkdir()
    write_video(clone / "clips" / "a.mp4", np.random.default_rng(0).integers(0, 255, (20, 60, 80, 3), dtype=np.uint8), 8)
    (clone / "clips" / "a.txt").write_text("noise")
    assert main([*tuning, "--dry-run"]) == 0
    Image.new("RGB", (128, 128), "gray").save(clone / "last.png")  # the only file that no command before makes
    for command in examples:
        output = [] if "--output" in command else ["--output", "made.mp4"]
        made = clone / [*command, *output][[*command, *output].index("--output") + 1]
        made.unlink(missing_ok=True)
        assert main([*command, "--num-inference-steps", "2", *output]) == 0, command
        assert made.is_file()


@pytest.mark.slow
def test_the_python_example(clone):
    (block,) = blocks("README.md", "python")
    scope: dict = {}
    exec(block, scope)
    assert scope["clip"].shape == (17, 128, 128, 3)
    assert scope["clip"].dtype == np.float32


@pytest.mark.slow
def test_the_table_of_sizes_is_what_plan_says(repo, capsys):
    rows = [row.split(" | ") for row in re.findall(r"^\| (.* \| .*) \|$", (repo / "README.md").read_text(), re.MULTILINE)]
    sizes = {row[0]: row[1:] for row in rows if row[0] in ("0.5b", "1b", "3b")}
    assert len(sizes) == 3

    def plan(*options: str) -> dict:
        assert main(["plan", *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    fits = (repo / "docs" / "generate" / "memory.md").read_text()
    for name, (parameters, clip, memory, gpu, seconds, days) in sizes.items():
        assert clip == "25 frames of 448 x 256"
        shape = ["--num-frames", "25", "--height", "256", "--width", "448", "--dtype", "bfloat16", "--device", "cpu"]
        of_clip = plan("--generate", "--preset", name, *shape, "--peak-tflops", "989.4")
        count = of_clip["parameters"]
        assert parameters == (f"{count / 1e6:.0f} M" if count < 1e9 else f"{count / 1e9:.2f} B")
        assert memory == " + ".join(f"{of_clip['bytes'][part] / 2**30:.2f}" for part in ("weights", "cache"))
        row = f"| {name} | 448 x 256 | {memory.replace(' + ', ' | ')} | {re.sub(r'[][]|[(].*[)]', '', gpu)} |"
        assert row in fits
        assert float(seconds) == float(f"{of_clip['seconds']:.2g}")
        stages = [plan("--config", str(repo / f"configs/lumos1/{name}-{stage}.yaml"), "--gpus", "48") for stage in
                  ("stage1", "stage2", "384p")]  # fmt: skip
        assert days == " + ".join(f"{stage['total']['days']:.2g}" for stage in stages)
