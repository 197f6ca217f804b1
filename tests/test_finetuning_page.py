"""The commands of docs/finetune.md, in their order, with few clips and steps."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import blocks, verbs
from safetensors.torch import load_file

from lumos.cli import main
from lumos.commands import finetune, ingest
from lumos.files import read_json, write_json
from lumos.video.io import read_video

PAGE = "docs/finetune.md"
FEW = ["training.batch_size=2", "data.workers=0"]
FEWER = {
    "finetune": ["--steps", "2", *FEW],
    "train": ["training.max_steps=2", *FEW, "data.stages=[{image_share: 0.5, image_batch_size: 2}]"],
    "generate": ["--num-inference-steps", "1", "--seed", "1"],
    "evaluate": ["--count", "1"],
    "ingest": ["--workers", "0"],
}


def test_the_figures_are_of_the_model_that_is_shipped(repo: Path):
    (digest,) = re.findall(r"SHA-256 `(\w{12})\.\.\.`", (repo / PAGE).read_text())
    now = hashlib.sha256((repo / "checkpoints" / "lumos-tiny" / "model.safetensors").read_bytes()).hexdigest()
    assert now.startswith(digest), "another model is shipped: run the page's commands again and put their shares into its table"


def test_the_page_lists_every_option_of_the_verb(repo: Path, capsys):
    assert main(["finetune", "--help"]) == 0
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    listed = set(re.findall(r"^\| `(--[\w-]+)`", (repo / PAGE).read_text(), re.MULTILINE))
    assert flags - listed == {"--json", "--out", "--device", "--threads", "--quiet"}
    assert listed <= flags


@pytest.mark.slow
def test_the_page_from_clips_to_a_model(repo: Path, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    pytest.importorskip("peft")
    (tmp_path / "configs").symlink_to(repo / "configs")
    shipped = tmp_path / "checkpoints" / "lumos-tiny"
    shutil.copytree(repo / "checkpoints" / "lumos-tiny", shipped, copy_function=os.symlink)
    usual = read_json(shipped / "pipeline.json", "defaults")
    (shipped / "pipeline.json").unlink()
    write_json(shipped / "pipeline.json", usual | {"num_inference_steps": 2, "later_steps": None})
    monkeypatch.setattr(finetune, "SHEET_CLIPS", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ingest, "usual_workers", lambda device: 0)
    (script,) = blocks(PAGE, "python")
    exec(script, {})
    rows = Path("rabbit.jsonl").read_text().splitlines()
    assert len(rows) == 20
    Path("rabbit.jsonl").write_text("\n".join([rows[0], rows[19]]))
    Path("clips").mkdir()
    (film,) = {json.loads(row)["path"] for row in rows}
    Path("clips/film.mp4").symlink_to(film)
    Path("clips/film.txt").write_text("the caption of a clip")
    commands = verbs(PAGE)
    expected = "finetune generate finetune generate finetune generate export evaluate evaluate ingest train train"
    assert [command[0] for command in commands] == expected.split()
    for command in commands:
        assert main([*command, *FEWER.get(command[0], [])]) == 0, (command, capsys.readouterr().err)
    clips = {name: read_video(f"{name}.mp4")[0] for name in ("mine", "rabbit", "rabbit-lora")}
    assert {clip.shape for clip in clips.values()} == {(17, 128, 128, 3)}
    assert not np.array_equal(clips["rabbit"], clips["rabbit-lora"])
    assert json.loads(Path("runs/rabbit/summary.json").read_text())["clips"] == 2
    before, whole, merged = (
        load_file(Path(folder) / "model.safetensors") for folder in ("checkpoints/lumos-tiny", "runs/rabbit/export", "merged")
    )
    changed = {name for name in before if not np.array_equal(before[name].float(), merged[name].float())}
    assert changed == {name for name in before if re.search(r"\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.", name)}
    assert {name for name in before if not np.array_equal(before[name].float(), whole[name].float())} > changed
    assert all((Path("runs") / name / "export").is_dir() for name in ("finetune", "finetune-lora"))
