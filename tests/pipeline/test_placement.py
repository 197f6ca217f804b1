"""Decoders larger than their device: layers that do not fit stay in the weight files, and the clip is the same."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import released_layout
import torch

from lumos import LumosConfig, LumosPipeline
from lumos.cli import main
from lumos.errors import UserError
from lumos.pipeline.placement import FOR_WEIGHTS, is_spread, loading_arguments, parse_max_memory, size_in_bytes, working_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spread(micro_folder):
    """A part of the micro model stays in its file."""
    limit = int(0.8 * (micro_folder / "model.safetensors").stat().st_size)
    return LumosPipeline.from_pretrained(micro_folder, device="cpu", device_map="auto", max_memory={"cpu": limit})


def test_a_spread_model_makes_the_same_clip(micro_folder, spread):
    whole = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    assert is_spread(spread.model)
    assert not is_spread(whole.model)
    assert {p.device.type for p in spread.model.parameters()} == {"cpu", "meta"}
    call = {"prompt": ["a red circle", "the digit 7"], "seed": [3, 4], "num_inference_steps": 3, "output_type": "uint8"}
    ours, theirs = (pipe(**call).frames for pipe in (spread, whole))
    assert np.array_equal(ours, theirs)
    assert {p.device.type for p in spread.model.parameters()} == {"cpu", "meta"}  # and went back


def test_a_spread_model_streams(spread):
    assert sum(len(frames[0]) for frames in spread.stream("a red circle", num_frames=9, num_inference_steps=2, seed=0)) == 9


def test_a_model_whose_weights_stay_on_disk_computes_on_the_cpu(micro_folder):
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu", device_map="auto", max_memory={"cpu": 1})
    assert {p.device.type for p in pipe.model.parameters()} == {"meta"}
    assert pipe.device == working_device(pipe.model) == CPU
    assert pipe("a red circle", num_inference_steps=1, seed=0).frames is not None


def test_a_gpu_is_where_a_spread_model_computes():
    model = torch.nn.Module()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk"}
    assert working_device(model) == torch.device("cuda", 0)


def test_what_fits_is_loaded_whole(micro_folder):
    assert not is_spread(LumosPipeline.from_pretrained(micro_folder, device="cpu", device_map="auto").model)


def test_unsupported_uses_of_a_spread_model_are_refused(micro_folder, spread, tmp_path):
    with pytest.raises(UserError, match="is not saved; load it without"):
        spread.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="stays where it is"):
        spread.to(torch.bfloat16)
    with pytest.raises(UserError, match="need the whole decoder in one place"):
        LumosPipeline.from_pretrained(micro_folder, device="cpu", device_map="auto", max_memory={"cpu": 1}, compile=True)


def test_the_default_leaves_memory_for_the_cache(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert loading_arguments(CPU, "auto") == {"device_map": "auto", "max_memory": {"cpu": int(1000 * FOR_WEIGHTS)}}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 900))
    on_gpu = loading_arguments(torch.device("cuda", 1), "auto", {"cpu": "1KB"})
    assert on_gpu["max_memory"] == {"cpu": 1000, 1: int(500 * FOR_WEIGHTS)}
    assert loading_arguments(CPU, None) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CPU, "balanced"), "device_map 'balanced' is not allowed; give 'auto'"),
        ((CPU, None, {"cpu": 1}), "no effect without device_map"),
        ((CPU, "auto", {0: "6GiB"}), "max_memory names 0; allowed: cpu$"),
        ((torch.device("mps"), "auto"), "not with mps"),
        ((CPU, "auto", {"cpu": "much"}), "'much' is no size of memory; give 6GiB"),
    ],
)
def test_placements_that_are_not_allowed(arguments, message):
    with pytest.raises(UserError, match=message):
        loading_arguments(*arguments)


@pytest.mark.parametrize(("text", "size"), [("6GiB", 6 * 2**30), ("500 mb", 5 * 10**8), ("1.5KB", 1500), (7, 7), ("1000", 1000)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size


def test_from_the_command_line(micro_folder, tmp_path, capsys):
    output = tmp_path / "out.png"
    call = ["generate", "--model", str(micro_folder), "--prompt", "x", "--num-frames", "1", "--num-inference-steps", "1",
            "--seed", "1", "--device", "cpu", "--output", str(output)]  # fmt: skip
    assert main([*call, "--device-map", "auto", "--max-memory", "cpu=60KB"]) == 0
    assert json.loads((tmp_path / "out.png.json").read_text())["max_memory"] == ["cpu=60KB"]
    assert main([*call, "--device-map", "auto", "--max-memory", "60KB"]) == 2
    assert "--max-memory 60KB is not allowed; give the GPU's number or cpu, and a size" in capsys.readouterr().err
    assert parse_max_memory(["0=6GiB", "cpu=16GiB"]) == {0: "6GiB", "cpu": "16GiB"}


LOAD = """
import sys
import torch
from lumos import LumosForVideoGeneration
from lumos.benchmarks.measure import lowered_peak
from lumos.runtime import peak_memory_bytes
warm_up, folder = sys.argv[1:]
LumosForVideoGeneration.from_pretrained(warm_up, dtype=torch.bfloat16)
before = lowered_peak(torch.device("cpu"))
model = LumosForVideoGeneration.from_pretrained(folder, dtype=torch.bfloat16)
read = sum(float(p.detach().view(torch.int16)[..., ::64].sum()) for p in model.parameters())
print(peak_memory_bytes(torch.device("cpu")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is set back by /proc")
def test_loading_shards_takes_little_more_than_the_weights(micro_folder, forks, tmp_path):
    """Released files in bf16 are read completely, in a process of their own."""
    config = LumosConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1
    )
    released_layout.write_decoder(tmp_path / "m", config, 40_000_000, torch.bfloat16)
    (tmp_path / "m" / "config.json").write_text(json.dumps(released_layout.released_config(config)))
    weights = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    done = forks.run(["-c", LOAD, micro_folder, tmp_path / "m"])
    assert done.returncode == 0, done.stderr
    assert 0.9 * weights < int(done.stdout.splitlines()[-1]) < 1.2 * weights
