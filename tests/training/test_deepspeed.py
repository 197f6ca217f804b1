"""Two processes on the CPU through DeepSpeed, against plain PyTorch in one."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_log import flat, read_log
from safetensors.torch import load_file

from lumos import LumosPipeline
from lumos.errors import UserError
from lumos.training.deepspeed_engine import deepspeed_options
from lumos.training.loop import train
from lumos.training.settings import load_settings
from lumos.video_io import contact_sheet, read_image

ROOT = Path(__file__).parents[2]
STAGES = ("0", "1", "2", "3")
OPTIONS = {"max_steps": 5, "save_every_steps": 2, "ema_decay": 0.9, "eval_every": 5, "micro_batch_size": 1}
SAMPLES = {"every": 5, "prompts": ["a red circle"], "options": {"num_inference_steps": 2}}
DATA = {"stages": [{"steps": 2, "image_share": 1.0}, {}]}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `finished` keeps the runs of every stage in two processes, and `plain` in this one."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(runs: Path, micro_settings) -> Path:
    if (runs / "plain").exists():
        return runs
    settings = micro_settings(data=DATA, training=OPTIONS, samples=SAMPLES)
    raw = settings.to_dict()
    (runs / "settings.json").write_text(json.dumps(raw))
    worker = Path(__file__).with_name("deepspeed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run(
        [*command, str(runs / "settings.json"), str(runs), *STAGES], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    settings.training.output_dir = str(runs / "plain")
    train(settings)
    return runs


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(finished: Path, stage: str):
    fields = ("loss", "grad_norm", "frame_loss_video", "mask_ratio_loss_image", "mask_ratio_loss_video")
    for key in (*fields, "val_loss_video", "val_loss_video_ema", "val_loss_image", "val_frame_loss_video"):
        plain, spread = (flat(read_log(finished / name, key)) for name in ("plain", f"zero{stage}-whole"))
        assert spread == pytest.approx(plain, abs=1e-4, nan_ok=True), key
    plain, spread = (load_file(finished / name / "export" / "model.safetensors") for name in ("plain", f"zero{stage}-whole"))
    assert plain.keys() == spread.keys()
    for name in plain:
        # Adam's first steps have the size of lr wherever the gradient is not exactly zero, so rounding can show in single weights.
        assert (plain[name] - spread[name]).abs().mean() < 1e-5, name


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_run_continues_bitwise(finished: Path, stage: str):
    for key in ("loss", "grad_norm", "val_loss_video", "val_loss_video_ema", "frame_loss_video"):
        assert read_log(finished / f"zero{stage}-broken", key) == read_log(finished / f"zero{stage}-whole", key)
    events = (finished / f"zero{stage}-broken" / "log.jsonl").read_text().count('"event": "start", "step": 2')
    assert events == 1


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_samples_are_drawn_with_the_whole_averaged_weights(finished: Path, stage: str):
    """As the exported model of the same step draws them; both runs came past them."""
    for name in ("whole", "broken"):
        run = finished / f"zero{stage}-{name}"
        pipe = LumosPipeline.from_pretrained(run / "export")
        again = contact_sheet(pipe("a red circle", seed=0, num_inference_steps=2).frames, ["a red circle"], run / "again.png")
        assert np.array_equal(read_image(run / "samples" / "step-00000005" / "sheet.png"), read_image(again))


@needs_deepspeed
def test_another_number_of_processes_is_refused(finished: Path, micro_settings):
    with pytest.raises(UserError, match="written with engine deepspeed zero 2, this run has plain"):
        train(micro_settings(data=DATA, training={**OPTIONS, "output_dir": str(finished / "zero2-whole")}))


@needs_deepspeed
def test_the_documented_commands_in_their_order(micro_settings, tmp_path: Path, monkeypatch):
    """`train.py --config ...`, then `deepspeed --num_gpus 2 train.py --config ... deepspeed.config=...`, without GPUs."""
    config = tmp_path / "micro.yaml"
    config.write_text(yaml.safe_dump(micro_settings(training={"max_steps": 2, "output_dir": None}).to_dict() | {"name": "micro"}))
    monkeypatch.chdir(tmp_path)
    train(load_settings(config))
    launcher = Path(sys.executable).parent / "deepspeed"
    zero = ROOT / "configs" / "deepspeed" / "zero2.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(launcher), "--num_gpus", "2", "--master_port", port, str(ROOT / "train.py"), "--config", str(config)]
    done = subprocess.run(
        [*command, f"deepspeed.config={zero}"], env=environment(), capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    spread = tmp_path / "runs" / "micro-zero2x2"
    assert (spread / "export" / "model.safetensors").exists()
    assert read_log(spread) == pytest.approx(read_log(tmp_path / "runs" / "micro"), abs=1e-4)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_deepspeed_configs(micro_settings, path: Path):
    settings = micro_settings(deepspeed={"config": str(path)}, training={"clip_grad": 2.0})
    options = deepspeed_options(settings, 2, torch.float32)
    stage = options["zero_optimization"]["stage"]
    assert path.stem.startswith(f"zero{stage}")
    assert options["gradient_clipping"] == (2.0 if stage else 0.0)


def test_options_that_two_places_decide(micro_settings, tmp_path: Path):
    path = tmp_path / "options.json"
    for text, words in (
        ('{"gradient_clipping": 1}', r"sets gradient_clipping; leave it out, it follows from training\.clip_grad"),
        ('{"zero_optimization": {"stage": 3}}', r"zero_stage is 1, but .* has stage 3"),
        ("{", "not valid JSON"),
        ("[]", "must hold"),
        ('{"zero_optimization": 3}', "must hold"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            deepspeed_options(micro_settings(deepspeed={"zero_stage": 1, "config": str(path)}), 1, torch.float32)
