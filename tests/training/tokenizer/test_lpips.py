"""LPIPS equals that of the package lpips; it is measured if its weights are found, and a note says if they are not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_training import small

from lumos.cli import main
from lumos.data.curriculum import StepShape
from lumos.errors import RunError, UserError
from lumos.training.tokenizer.lpips import BACKBONE, HEADS, MIN_SIDE, Lpips, find_weights
from lumos.training.tokenizer.settings import loop_settings
from lumos.training.tokenizer.task import TokenizerTask
from lumos.video.frames import from_uint8

SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the two files of LPIPS, drawn at random."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    backbone = {}
    for place, shape in SHAPES.items():
        backbone[f"features.{place}.weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        backbone[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    heads = {f"lin{i}.model.1.weight": torch.rand(1, s[0], 1, 1, generator=generator) for i, s in enumerate(SHAPES.values())}
    torch.save(backbone, folder / BACKBONE)
    torch.save(heads, folder / HEADS)
    return folder


def test_lpips_agrees_with_its_package(weights):
    """The expected values are those of lpips 0.1.4, LPIPS(net="alex"), with the same random weights."""
    lpips = Lpips(*find_weights(weights), torch.device("cpu"))
    rng = np.random.default_rng(0)
    for size, expected in (((64, 64), 0.9463840), ((48, 80), 0.9450706), ((MIN_SIDE, MIN_SIDE), 0.9052260)):
        a, b = (rng.integers(0, 256, (3, *size, 3), dtype=np.uint8) for _ in range(2))
        assert lpips(a, b) == pytest.approx(expected, abs=2e-6)
        assert lpips(a, a) == 0


def test_weights_that_are_not_there_or_not_right(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert f"there is no {BACKBONE} in {tmp_path}" in find_weights(None)
    with pytest.raises(UserError, match=f"has no {BACKBONE} and no {HEADS}"):
        find_weights(tmp_path)
    for damaged in (b"not weights", b"", b"<html>"):
        (tmp_path / BACKBONE).write_bytes(damaged)
        with pytest.raises(RunError, match="as tensors") as raised:
            Lpips(tmp_path / BACKBONE, weights / HEADS, torch.device("cpu"))
        assert "weights_only" not in str(raised.value)
    for other in ([1], None, torch.ones(3), {"features.0.weight": 1}):
        torch.save(other, tmp_path / BACKBONE)
        with pytest.raises(RunError, match="holds no tensors by name"):
            Lpips(tmp_path / BACKBONE, weights / HEADS, torch.device("cpu"))
    with pytest.raises(RunError, match="are these the files of AlexNet"):
        Lpips(weights / HEADS, weights / BACKBONE, torch.device("cpu"))
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, 64, 1, 1) for i in range(5)}, tmp_path / HEADS)
    with pytest.raises(RunError, match="belongs to another network"):
        Lpips(weights / BACKBONE, tmp_path / HEADS, torch.device("cpu"))


def test_weights_may_be_safetensors(weights, tmp_path):
    for name in (BACKBONE, HEADS):
        save_file(torch.load(weights / name, weights_only=True), (tmp_path / name).with_suffix(".safetensors"))
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), dtype=np.uint8)
    distances = [Lpips(*find_weights(folder), torch.device("cpu"))(*frames) for folder in (weights, tmp_path)]
    assert distances[0] == distances[1]
    (tmp_path / BACKBONE).with_suffix(".safetensors").write_bytes(b"not weights")
    with pytest.raises(RunError, match="as tensors"):
        Lpips(*find_weights(tmp_path), torch.device("cpu"))


def test_distances_of_videos_are_the_means_of_their_frames(weights):
    lpips, rng = Lpips(*find_weights(weights), torch.device("cpu")), np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8) for _ in range(2))
    expected = [lpips(x, y) for x, y in zip(a, b, strict=True)]
    assert lpips.distances(from_uint8(a), from_uint8(b)).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_distance_has_a_finite_gradient(weights):
    """The features of a black frame may be 0 at all positions."""
    lpips = Lpips(*find_weights(weights), torch.device("cpu"))
    lpips.layers = [(weight, -bias.abs() - 10, *how) for weight, bias, *how in lpips.layers]
    video = torch.zeros(1, 3, 1, 32, 32, requires_grad=True)
    lpips.distances(video, torch.zeros_like(video)).sum().backward()
    assert video.grad.isfinite().all()


def test_a_training_lowers_the_distance(weights, tmp_path):
    changes = {"lpips_weight": 0.5, "lpips_folder": str(weights), "height": 32, "width": 32}
    with_it, without = (
        TokenizerTask(loop_settings(small(tmp_path, **options)), torch.device("cpu"))
        for options in (changes, changes | {"lpips_weight": 0.0})
    )
    model = with_it.build_model()
    micro = with_it.batch(0, StepShape("video", 3), range(3)).whole
    losses, plain = (task.losses(model, dict(micro))[0] for task in (with_it, without))
    assert (losses > plain).all()
    (losses - plain).sum().backward()
    assert model.encoder.conv_in[0].conv3d.weight.grad.norm() > 0
    with pytest.raises(UserError, match="has no alexnet"):
        TokenizerTask(loop_settings(small(tmp_path, **changes | {"lpips_folder": str(tmp_path)})), torch.device("cpu"))


def photographs(folder, *options) -> None:
    """Run the command on photographs of 32 x 32 pixels and return its output."""
    size = ["--num-frames", "1", "--height", "32", "--width", "32"]
    assert main(["evaluate", "tokenizer", "--tokenizer", str(folder), "--data", "photographs", *size, *options]) == 0


def test_lpips_is_measured_when_its_weights_exist(micro_folder, weights, capsys):
    photographs(micro_folder, "--lpips", str(weights), "--json")
    said = capsys.readouterr()
    lines, summary = said.err.splitlines(), json.loads(said.out)
    assert summary["lpips"] == "measured"
    assert any(f"LPIPS {summary['data']['photographs']['lpips']:.3f}" in line for line in lines)
    assert summary["data"]["photographs"]["lpips"] > 0


def test_lpips_says_what_is_missing(micro_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    photographs(micro_folder, "--json")
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert any(line.startswith(f"LPIPS not measured: there is no alexnet-owt-7be5be79.pth in {tmp_path}") for line in lines)
    assert json.loads(said.out)["data"]["photographs"]["lpips"] is None
