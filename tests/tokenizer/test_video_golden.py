"""The tokenizer gives the published network's numbers and has its layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenizer import VideoTokenizer, VideoTokenizerConfig

GOLDEN = Path(os.environ.get("LUMOS_GOLDEN", Path(__file__).parent.parent / "golden")) / "cosmos"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def model() -> VideoTokenizer:
    return VideoTokenizer.from_pretrained(GOLDEN)


@torch.inference_mode()
def test_encoder_agrees_with_the_published_network(model, golden):
    latent = model.encode_latent(golden["video"].float())
    torch.testing.assert_close(latent, golden["latent"].float(), rtol=0, atol=2e-4)
    values, indices = model.quantize(golden["latent"].float())
    assert torch.equal(indices, golden["indices"].long())
    torch.testing.assert_close(values, golden["codes"].float(), rtol=0, atol=1e-6)
    assert torch.equal(model.encode(golden["video"].float()), golden["indices"].long())


@torch.inference_mode()
def test_decoder_agrees_with_the_published_network(model, golden):
    reconstruction = model.decode(golden["indices"])
    torch.testing.assert_close(reconstruction, golden["reconstruction"].float(), rtol=0, atol=2e-3)


@torch.inference_mode()
def test_a_wrong_code_gives_another_picture(model, golden):
    indices = golden["indices"].clone()
    indices[0, -1, 0, 0] = (indices[0, -1, 0, 0] + model.num_codes // 2) % model.num_codes
    assert (model.decode(indices) - golden["reconstruction"].float()).abs().max() > 2e-3


def test_full_size_layout():
    layout_file = GOLDEN / "full_size_layout.json"
    if not layout_file.is_file():
        pytest.skip("this golden folder has no full-size layout")
    with torch.device("meta"):
        model = VideoTokenizer(VideoTokenizerConfig())
    layout = json.loads(layout_file.read_text())
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == layout
    assert sum(parameter.numel() for parameter in model.parameters()) == 112_472_182
    assert model.num_codes == 64_000
