"""Two processes with DeepSpeed on the CPU equal plain PyTorch in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ranks import Ranks, Runs
from run_log import flat, read_log
from safetensors.torch import load_file

from lumos import LumosPipeline
from lumos.errors import RunError, UserError
from lumos.files import only_writer
from lumos.models.lumos1.training import model_config
from lumos.models.lumos1.training_cost import LumosTrainingCost, meta_model
from lumos.planning.fixed_memory import fixed_bytes
from lumos.planning.sharding import Sharding
from lumos.runtime import parameter_count
from lumos.training.checkpoint import Stored
from lumos.training.deepspeed_engine import BUCKET, deepspeed_options
from lumos.training.loop import train
from lumos.training.settings import TrainingSettings, load_settings
from lumos.video.io import contact_sheet, read_image

ROOT = Path(__file__).parents[2]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize("stage", [1, 3, *(pytest.param(stage, marks=pytest.mark.thorough) for stage in (0, 2))])
def test_two_processes_train_as_one(runs: Runs, stage: int):
    one, two = runs.whole("plain"), runs.whole(f"zero{stage}")
    fields = ("loss", "grad_norm", "frame_loss_video", "mask_ratio_loss_image", "mask_ratio_loss_video")
    for key in (*fields, "val_loss_video", "val_loss_video_ema", "val_loss_image", "val_frame_loss_video"):
        plain, spread = (flat(read_log(folder, key)) for folder in (one, two))
        assert spread == pytest.approx(plain, abs=1e-4, nan_ok=True), key
    plain, spread = (load_file(folder / "export" / "model.safetensors") for folder in (one, two))
    assert plain.keys() == spread.keys()
    for name in plain:
        # Adam's first steps have the size of lr wherever the gradient is not exactly zero, so rounding can show in single weights.
        assert (plain[name] - spread[name]).abs().mean() < 1e-5, name


@pytest.mark.parametrize(
    "name", ["plain", "zero1", "zero3", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("zero0", "zero2"))]
)
def test_samples_are_drawn_with_the_whole_averaged_weights(runs: Runs, name: str):
    """The samples equal clips of the exported model of the same step."""
    run = runs.whole(name)
    pipe = LumosPipeline.from_pretrained(run / "export")
    frames = pipe("a red circle", seed=0, num_inference_steps=2, output_type="uint8").frames
    again = contact_sheet(frames, ["a red circle"], run / "again.png")
    assert np.array_equal(read_image(run / "samples" / "step-00000005" / "sheet.png"), read_image(again))


@pytest.mark.parametrize("engine", ["zero3-offload", pytest.param("zero2-offload", marks=pytest.mark.thorough)])
def test_offload_trains_and_resumes_as_without(runs: Runs, ranks: Ranks, engine: str):
    """The optimizer state, and in stage 3 the weights, are offloaded to host memory; on a CPU, the same code moves nothing."""
    settings = runs.make(runs.folder / engine)
    ranks.train(settings, engine, faults={0: [["kill_after_step", 3]]})
    ranks.finish(settings, engine)
    for key in ("loss", "grad_norm", "val_loss_video_ema"):
        assert read_log(settings.output_dir, key) == pytest.approx(read_log(runs.whole("plain"), key), abs=1e-4)


def test_recomputed_layers_in_two_processes(runs: Runs, ranks: Ranks):
    settings = runs.make(runs.folder / "recomputed")
    settings.training.activation_checkpointing = True
    ranks.finish(settings, "zero3")
    assert read_log(settings.output_dir) == pytest.approx(read_log(runs.whole("plain")), abs=1e-4)


def planned_between_steps(settings: TrainingSettings, stage: int) -> int:
    """Return the planned bytes of one of two processes: weights, optimizer state, averages, and gradients if it holds them."""
    config = model_config(settings.model)
    parts = fixed_bytes(LumosTrainingCost.of(config), Sharding(stage, world=2, half=True, on_gpu=False, averaged=True))
    held = parts["weights"] + parts["optimizer"]
    if stage == 0:
        return held - 2 * (parameter_count(meta_model(config)) - config.vocab_size * config.hidden_size)  # copies of a step
    if stage == 3:
        sizes = [p.numel() for p in meta_model(config).parameters()]
        held += sum(sizes) * 4 // 2  # its share of the gradients
        held += 2 * sum(size for size in sizes if size <= 100_000) // 2  # small parameters are whole
    return held + (parts["gradients"] if stage == 1 else 0)


@pytest.mark.parametrize("stage", [0, 3, *(pytest.param(stage, marks=pytest.mark.thorough) for stage in (1, 2))])
def test_bf16_keeps_fp32_masters(runs: Runs, ranks: Ranks, stage: int):
    """Losses are near those of fp32; stored and averaged weights are finer than bf16; from stage 2 on, resuming is exact."""
    settings = runs.make(runs.folder / f"bf16-{stage}")
    settings.training.precision = "bf16"
    held = runs.folder / f"held-{stage}"
    ranks.finish(settings, f"zero{stage}", faults={0: [["weigh_after_step", 3, str(held)]]})
    bucket = 4 * BUCKET if stage == 3 else 0  # the others make theirs for each step
    assert int(held.read_text()) - bucket == pytest.approx(planned_between_steps(settings, stage), rel=0.03)
    losses = read_log(settings.output_dir)
    assert losses == pytest.approx(read_log(runs.whole("plain")), rel=0.02)
    assert losses != pytest.approx(read_log(runs.whole("plain")), abs=1e-4)
    for kind in ("weight", "average", "exp_avg"):
        stored = Stored(settings.output_dir / "checkpoints" / "step-00000005")
        values = stored.read(kind, "model.layers.0.mlp.up_proj.weight", 0, 128 * 64)
        assert (values != values.bfloat16()).float().mean() > 0.9, kind
    if stage >= 2:
        broken = runs.make(runs.folder / f"bf16-broken-{stage}")
        broken.training.precision = "bf16"
        ranks.train(broken, f"zero{stage}", faults={0: [["kill_after_step", 3]]})
        ranks.finish(broken, f"zero{stage}")
        assert read_log(broken.output_dir) == losses


def test_bf16_reduces_and_accumulates_in_fp32(micro_settings):
    for stage in range(4):
        options = deepspeed_options(micro_settings(training={"precision": "bf16"}), stage, torch.bfloat16)
        assert (options["communication_data_type"], options["data_types"]["grad_accum_dtype"]) == ("fp32", "fp32")
        assert options["bf16"]["enabled"] == (stage > 0)
        assert options["torch_autocast"]["enabled"] == (stage == 0)


def test_deepspeed_options_that_do_not_work(runs: Runs, ranks: Ranks):
    """Every process ends with one line, also if DeepSpeed would run but with a layout that checkpoints do not support."""
    path = runs.folder / "options.json"
    settings = runs.make(runs.folder / "options")
    settings.deepspeed.config = str(path)
    for options, faults, words in (
        ({"stage": 2, "nonsense": 1}, {}, "DeepSpeed does not start with deepspeed.config .*nonsense"),
        ({"stage": 2}, {1: [["hide_a_weight"]]}, r"spreads the weights in a way that checkpoints cannot hold \(\d+ of \d+ values"),
    ):
        path.write_text(json.dumps({"zero_optimization": options}))
        for process in ranks.train(settings, "own", faults=faults):
            assert process.code == 2, process.err
            assert re.search(words, process.error), process.err


@pytest.mark.slow
@needs_deepspeed
def test_the_documented_commands_in_their_order(micro_settings, ranks: Ranks, times, tmp_path: Path, monkeypatch):
    """`train.py --config ...` is resumed by `deepspeed --num_gpus 2 train.py --config ...`, without GPUs.

    The second run is stopped by SIGTERM to the deepspeed command, which does not forward it, and resumed by the same command
    (with --thorough) or engine.
    """
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    folder = tmp_path / "runs" / "micro"

    def events(name: str) -> list[dict]:
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [line for line in lines if line.get("event", "step") == name]

    with open(tmp_path / "first.err", "w") as err:
        told = subprocess.Popen([*command, f"deepspeed.config={zero}", "training.max_steps=90000"],
                                env=environment, stdout=err, stderr=err, cwd=tmp_path)  # fmt: skip
        wait_for(lambda: len(events("step")) > 2 or told.poll() is not None)
        told.terminate()
        told.wait()
        wait_for(lambda: len(events("end")) == 2)
    first = (tmp_path / "first.err").read_text()
    assert "changed since that checkpoint: training.max_steps was 2, now 90000" in first
    assert "written by plain PyTorch, 1 process, this is DeepSpeed ZeRO 2, 2 processes: weights" in first
    stopped = events("end")[-1]
    assert stopped["stopped_by"] == "a lost launcher"
    wait_for(lambda: not locked(folder))
    last = stopped["step"] + 2
    overrides = [f"deepspeed.config={zero}", f"training.max_steps={last}"]
    if times(1, 2) > 1:
        done = subprocess.run(
            [*command, *overrides], env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        ranks.finish(load_settings(config, [*overrides, f"training.output_dir={folder}"]), "own")
    assert (folder / "export" / "model.safetensors").exists()
    assert sorted(read_log(folder)) == list(range(1, last + 1))


def wait_for(done: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def locked(folder: Path) -> bool:
    try:
        with only_writer(folder, "training"):
            return False
    except RunError:
        return True


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


def test_compiled_parts_are_refused_with_zero_3(micro_settings):
    settings = micro_settings(training={"compile": True})
    assert deepspeed_options(settings, 2, torch.float32)["zero_optimization"]["stage"] == 2
    with pytest.raises(UserError, match=r"training\.compile is true, but .* set deepspeed\.zero_stage=2, or"):
        deepspeed_options(settings, 3, torch.float32)
