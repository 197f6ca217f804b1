"""Numbers that are not finite end a clip with one line; in a list, they end only their own clips."""

from __future__ import annotations

import math
import shutil
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumos import LumosPipeline
from lumos.cli import main
from lumos.errors import NotFinite
from lumos.models.lumos1.sampling import filter_logits, sample_codes

PLACES = ("lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")
OPTIONS = ({}, {"top_k": 3}, {"top_p": 0.5}, {"confidence_threshold": 0.5}, {"guidance_scale": 1.0}, {"history_frames": 1})


@pytest.fixture(scope="module")
def pipe(micro_folder) -> LumosPipeline:
    return LumosPipeline.from_pretrained(micro_folder, device="cpu")


@pytest.mark.parametrize(
    ("value", "place", "options"),
    [(*case, options) for case, options in zip(product((math.nan, math.inf, -math.inf), PLACES), cycle(OPTIONS), strict=False)],
)
def test_weights_that_are_not_finite_end_a_clip(pipe, value: float, place: str, options: dict):
    weight = pipe.model.get_parameter(place)
    kept = weight.detach().clone()
    try:
        weight.data[: len(weight) // 2 if weight.dim() == 1 else len(weight)] = value
        with pytest.raises(NotFinite, match=r"not finite .* check the weights and the adapter") as error:
            pipe("a red circle", seed=0, num_frames=5, output_type="latent", **options)
    finally:
        weight.data.copy_(kept)
    assert error.value.clips == (0,)


def test_logits_that_are_masked_out_are_no_error():
    logits = filter_logits(torch.randn(4, 5, 64), 2, 0.9)
    codes, log_prob = sample_codes(logits, torch.rand(4, 5))
    assert logits.isinf().any()
    assert log_prob.isfinite().all()
    assert (codes < 64).all()


def test_nan_weights_fail_only_the_clip_that_uses_them(micro_folder, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro_folder, "model")
    weights = load_file("model/model.safetensors")
    hit = set(pipe.text_tokenizer.encode("a Z")) - set(pipe.text_tokenizer.encode("a red circle moves"))
    weights["model.embed_tokens.weight"][sorted(hit)] = torch.nan
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    Path("list.txt").write_text("a red circle\na Z\na circle\n")
    code = main(["generate", "--model", "model", "--prompts", "list.txt", "--output-dir", "out", "--num-frames", "1"])
    said = capsys.readouterr().err
    assert code == 1
    assert "list.txt line 2: the model's numbers are not finite" in said
    assert "list.txt line 1" not in said
    assert said.splitlines()[-1] == "error: 1 clips could not be made, as said above; the other clips are in out"
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["0001-a-red-circle.png", "0003-a-circle.png"]


def test_a_video_tokenizer_that_is_not_finite_ends_a_clip(micro_folder):
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    for parameter in pipe.video_tokenizer.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(NotFinite, match="not finite"):
        pipe("a red circle", seed=0, num_frames=1)
    with pytest.raises(NotFinite, match="video tokenizer's numbers are not finite where it reads frames"):
        pipe("a red circle", seed=0, image=torch.zeros(16, 24, 3, dtype=torch.uint8).numpy())
