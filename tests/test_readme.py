"""The README's commands, as written there, with few steps where they are long."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lumos.cli import main
from lumos.video.io import write_video


def commands(repo):
    text = (repo / "README.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split(" #")[0].split("&&") if part.strip()]


@pytest.fixture
def readme(repo):
    return commands(repo)


@pytest.fixture
def clone(repo, tmp_path, monkeypatch):
    """A working folder that looks like the repository's root."""
    for name in ("checkpoints", "configs", "generate.py", "train.py", "lumos", "tokenizer"):
        (tmp_path / name).symlink_to(repo / name)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save("photo.png")
    (tmp_path / "prompts.txt").write_text("a red circle moves left\na small blue square moves up\n")
    write_video("clip.mp4", np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8), 8)
    return tmp_path


def test_the_first_two_commands_are_the_promised_ones(readme):
    assert readme[0] == "pip install -c constraints.txt -e ."
    assert readme[1] == 'python generate.py --prompt "a large red circle moves left on a gray background"'
    assert readme[2:4] == ['pip install -c constraints.txt -e ".[test]"', "pytest -n 2 --dist loadfile"]


@pytest.mark.slow
def test_the_first_command_as_it_stands(readme, clone):
    done = subprocess.run([sys.executable, *shlex.split(readme[1])[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, rest = done.stdout.splitlines()[-1].split("  seed ")
    assert (clone / path).is_file()
    assert (clone / f"{path}.json").is_file()
    assert re.fullmatch(r"\d+  [\d.]+ s  peak memory \d+ MB", rest)


@pytest.mark.slow
def test_every_generate_command(readme, clone):
    lines = [c for c in readme if c.startswith("python generate.py")]
    assert len(lines) >= 5
    for line in lines:
        assert main(["generate", *shlex.split(line)[2:], "--num-inference-steps", "2"]) == 0, line


@pytest.mark.slow
def test_the_train_command(readme, clone):
    (line,) = [c for c in readme if c.startswith("python train.py")]
    shutil.copytree(clone / "configs", clone / "copy")
    small = ["training.max_steps=2", "data.stages=[]", "training.batch_size=2", "data.validation_clips=2"]
    assert main(["train", *shlex.split(line)[2:], *small, f"training.output_dir={clone / 'run'}"]) == 0
    assert (clone / "run" / "export" / "model.safetensors").is_file()
    assert main(["generate", "--model", str(clone / "run" / "export"), "--prompt", "x", "--num-frames", "5", "--height", "64",
                 "--width", "64", "--fps", "8", "--num-inference-steps", "1", "--output", "x.gif"]) == 0  # fmt: skip


def test_the_deepspeed_command_is_the_one_that_the_training_tests_run(readme):
    """tests/training/test_deepspeed.py types it with a config of its own."""
    assert "deepspeed --num_gpus 2 train.py --config configs/lumos1/tiny.yaml" in readme


@pytest.mark.slow
def test_the_tokenizer_commands(readme, clone):
    (text,) = [c for c in readme if "train-text-tokenizer" in c]
    (clone / "captions.txt").write_text("a red circle moves left\na small blue square grows\n" * 30)
    assert main([*shlex.split(text)[3:], "--vocab-size", "560"]) == 0
    assert (clone / "text_tokenizer" / "tokenizer.model").is_file()
    (video,) = [c for c in readme if "train-tokenizer" in c]
    small = ["films=[]", "share_worlds=1", "steps=1", "warmup_steps=0", "batch_size=1", "pictures_per_batch=1"]
    assert main([*shlex.split(video)[3:], *small, "validation_clips=1", f"output_dir={clone / 'tokenizer-run'}"]) == 0
    assert (clone / "tokenizer-run" / "video_tokenizer" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_measuring_commands(readme, clone, capsys):
    (line,) = [c for c in readme if "evaluate prompts" in c]
    args = shlex.split(line)[3:]
    assert main([*args, "--count", "1", "--num-inference-steps", "1"]) == 0
    assert (clone / "sheet.png").is_file()
    assert '"shares"' in capsys.readouterr().out.splitlines()[-1]
    (line,) = [c for c in readme if "evaluate tokenizer" in c]
    assert main([*shlex.split(line)[3:], "--count", "3"]) == 0
    assert (clone / "tokenizer.png").is_file()
    assert '"union"' in capsys.readouterr().out.splitlines()[-1]


def test_the_python_example(repo, clone):
    text = (repo / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "LumosPipeline" in b)
    scope: dict = {}
    exec(block, scope)
    assert scope["clip"].shape == (17, 128, 128, 3)
    assert scope["clip"].dtype == np.float32
