"""A pruned folder works wherever a model folder does: in lists, in the page, in ComfyUI and in `plan`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from comfyui import execute, widgets
from page_jobs import job_and_call
from small_networks import lumos_folder, stiv_folder

from lumos import VideoPipeline
from lumos.cli import main
from lumos.compression.networks import network_of
from lumos.compression.plans import Plan
from lumos.compression.pruning import prune

pytestmark = pytest.mark.slow
REMOVED = {"lumos": ("1", "2"), "stiv": ("1", "2.temporal", "3.mlp")}


@pytest.fixture(scope="module", params=list(REMOVED))
def small(request, tmp_path_factory) -> Path:
    """The folder of a pruned model of each generator."""
    place = tmp_path_factory.mktemp(request.param)
    network = network_of({"lumos": lumos_folder, "stiv": stiv_folder}[request.param](place / "whole"))
    prune(network, Plan("file", "model", "", REMOVED[request.param], sha256=network.sha256), place / "small")
    return place / "small"


def test_a_list_of_prompts(small, tmp_path):
    (tmp_path / "list.txt").write_text("a red circle\na blue square\n")
    words = ["--model", str(small), "--prompts", str(tmp_path / "list.txt"), "--output-dir", str(tmp_path / "clips")]
    assert main(["generate", *words, "--num-inference-steps", "1"]) == 0
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 2


def test_a_job_of_the_page(small, tmp_path):
    _, made, called = job_and_call(small, tmp_path)
    assert np.abs(made - called).max() <= 4


def test_nodes_of_comfyui(small, nodes, tmp_path):
    shutil.copytree(small, tmp_path / "models" / "lumos" / "small")
    (pipe,) = execute(nodes, "LumosLoader", model="small", dtype="auto")
    inputs = widgets(nodes.NODE_CLASS_MAPPINGS["LumosTextToVideo"]) | {"prompt": "a red circle", "seed": 3, "num_frames": 5}
    images, _ = execute(nodes, "LumosTextToVideo", model=pipe, **inputs)
    called = VideoPipeline.from_pretrained(small, device="cpu")("a red circle", seed=3).frames[0]
    assert np.abs(images.numpy() - called).max() < 1.5 / 255


def test_a_plan_has_the_figures_of_the_record(small, capsys):
    """`plan` counts the FLOPs and the cache that `prune` predicted."""
    after = json.loads((small / "compression.json").read_text())["after"]
    assert main(["plan", "--generate", "--model", str(small), "--text-tokens", "16", "--dtype", "float32", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["flops"]["total"] == after["flops"]
    assert planned["bytes"].get("cache") == after.get("kv_bytes")
