"""The commands of docs/finetune.md, in their order, with few clips and steps."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from lumos.cli import main
from lumos.video.io import read_video

FEWER = {
    "train": ["training.max_steps=2", "training.batch_size=2", "data.stages=[{image_share: 0.5, image_batch_size: 2}]"],
    "generate": ["--num-inference-steps", "1", "--seed", "1"],
    "evaluate": ["--count", "1", "--num-inference-steps", "1"],
    "loss": ["--count", "2", "--bins", "2"],
    "ingest": ["--workers", "0"],
}


def page(repo: Path) -> list[list[str]]:
    """Every command as words after `python -m lumos`."""
    text = (repo / "docs" / "finetune.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line.split("  #")[0]) for line in lines]
    named = [["train" if c[1] == "train.py" else "generate", *c[2:]] if c[1].endswith(".py") else c[3:] for c in commands]
    return [command for command, words in zip(named, commands, strict=True) if words[0] == "python"]


def test_the_figures_are_of_the_model_that_is_shipped(repo: Path):
    (digest,) = re.findall(r"SHA-256 `(\w{12})\.\.\.`", (repo / "docs" / "finetune.md").read_text())
    now = hashlib.sha256((repo / "checkpoints" / "lumos-tiny" / "model.safetensors").read_bytes()).hexdigest()
    assert now.startswith(digest), "another model is shipped: run the page's commands again and put their shares into its table"


@pytest.mark.slow
def test_the_page_from_clips_to_a_model(repo: Path, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    pytest.importorskip("skimage")
    for name in ("checkpoints", "configs"):
        (tmp_path / name).symlink_to(repo / name)
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", (repo / "docs" / "finetune.md").read_text(), re.DOTALL)
    exec(script, {})
    rows = Path("rabbit.jsonl").read_text().splitlines()
    assert len(rows) == 20
    Path("rabbit.jsonl").write_text("\n".join(rows[:4]))
    commands = page(repo)
    assert [command[0] for command in commands] == (
        ["ingest", "inspect", "train", "generate", "train", "generate", "export", *["evaluate"] * 5]
    )
    for command in commands:
        fewer = FEWER.get("loss" if command[1] == "loss" else command[0], [])
        assert main([*command, *fewer]) == 0, (command, capsys.readouterr().err)
    losses = {name: json.loads(Path(f"{name}.json").read_text()) for name in ("before", "whole", "lora")}
    assert {found["model"] for found in losses.values()} == {"checkpoints/lumos-tiny", "runs/finetune/export", "merged"}
    assert all(set(json.loads(Path(f"{name}-one.json").read_text())["shares"]) == {"one"} for name in ("whole", "lora"))
    clips = {name: read_video(f"{name}.mp4")[0] for name in ("whole", "lora")}
    assert {clip.shape for clip in clips.values()} == {(17, 128, 128, 3)}
    assert not np.array_equal(clips["whole"], clips["lora"])
    before, whole, merged = (
        load_file(Path(folder) / "model.safetensors") for folder in ("checkpoints/lumos-tiny", "runs/finetune/export", "merged")
    )
    changed = {name for name in before if not np.array_equal(before[name].float(), merged[name].float())}
    assert changed == {name for name in before if re.search(r"\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.", name)}
    assert {name for name in before if not np.array_equal(before[name].float(), whole[name].float())} > changed
