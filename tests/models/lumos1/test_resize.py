"""A resized model gives the same codes for the same words, decoded at another size; resizing back is exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from micro import micro_config

from lumos import LumosConfig, LumosForVideoGeneration, LumosPipeline
from lumos.cli import main
from lumos.files import write_json
from lumos.pipeline.defaults import ClipDefaults
from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig
from tokenizer.loading import stored_dtype
from tokenizer.resizing import double

PROMPT = "a red circle moves left on a gray background"


@pytest.fixture
def small(tmp_path, micro_folder) -> Path:
    """A model for clips of 24 x 16 pixels whose tokenizer can be doubled."""
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(
        VideoTokenizerConfig(
            channels=8, channels_mult=(1, 2), num_res_blocks=1, embedding_dim=3, levels=(4, 4, 4), pointwise_ends=True
        )
    )
    for weight in tokenizer.decoder.conv_out.parameters():
        weight.data.mul_(0.02)  # no pixel is clamped
    text = TextTokenizer.from_pretrained(micro_folder)
    clip = ClipDefaults(5, 16, 24, 8, None)
    LumosPipeline(LumosForVideoGeneration(micro_config()).half(), text, tokenizer.half(), clip=clip).save_pretrained(
        tmp_path / "small"
    )
    write_json(tmp_path / "small" / "training.json", {"steps": 7})
    return tmp_path / "small"


@pytest.fixture
def wide(small, tmp_path) -> Path:
    """A tokenizer for twice the size that differs a little from the doubled one."""
    tokenizer = double(VideoTokenizer.from_pretrained(small))
    bias = tokenizer.decoder.conv_out.conv3d.bias
    bias.add_(0.005 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
    tokenizer.half().save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def frames(folder: Path) -> np.ndarray:
    """Return the frames of a clip with a fixed seed, [5, H, W, 3] in about 0..1."""
    return LumosPipeline.from_pretrained(folder, device="cpu")(PROMPT, seed=3, output_type="np").frames[0]


@pytest.mark.slow
def test_a_model_is_resized_and_back(small, wide, tmp_path, capsys):
    assert main(["resize", str(small), "--video-tokenizer", str(wide), "--out", str(tmp_path / "large")]) == 0
    assert "large  draws 48 x 32" in capsys.readouterr().out
    assert main(["resize", str(tmp_path / "large"), "--out", str(tmp_path / "again")]) == 0
    before, large, again = (LumosConfig.from_pretrained(folder) for folder in (small, tmp_path / "large", tmp_path / "again"))
    assert (large.spatial_compression, large.pixels_per_size_unit, large.position_strides) == (16, 16, [4, 8, 8])
    assert again.to_dict() == before.to_dict()
    files = [(folder / "model.safetensors").read_bytes() for folder in (small, tmp_path / "large", tmp_path / "again")]
    assert files[0] == files[1] == files[2]

    drawn = frames(tmp_path / "large")
    assert drawn.shape == (5, 32, 48, 3)
    means = drawn.reshape(5, 16, 2, 24, 2, 3).mean((2, 4))
    halved = frames(tmp_path / "again")
    assert 0 < drawn.min() < drawn.max() < 1
    np.testing.assert_allclose(halved, means, atol=1.01 / 255)  # both are rounded to 8 bits
    said = json.loads((tmp_path / "again" / "training.json").read_text())
    assert said["steps"] == 7
    assert [(step["from"], step["video_tokenizer"]) for step in said["resized"]] == [
        (str(small), str(wide)),
        (str(tmp_path / "large"), None),
    ]


def test_the_tokenizer_of_another_folder_can_be_linked(small, wide, tmp_path, capsys):
    call = ["resize", str(small), "--link-video-tokenizer", "--out", str(tmp_path / "large")]
    assert main(call) == 2
    assert "say which by --video-tokenizer" in capsys.readouterr().err
    write_json(small / "compression.json", {"kept": [0]})
    assert main([*call, "--video-tokenizer", str(wide)]) == 0
    assert not (tmp_path / "large" / "video_tokenizer").exists()
    assert json.loads((tmp_path / "large" / "video_tokenizer.json").read_text())["folder"] == "../wide"
    assert json.loads((tmp_path / "large" / "compression.json").read_text()) == {"kept": [0]}
    assert frames(tmp_path / "large").shape == (5, 32, 48, 3)


@pytest.mark.slow
def test_what_cannot_be_resized_leaves_nothing(small, wide, tmp_path, capsys):
    out = tmp_path / "out"

    def error_of(*arguments: object) -> str:
        assert main(["resize", *map(str, arguments), "--out", str(out)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "cannot be made half its size: its spatial_patch_size is 1, where 2 is needed" in error_of(small)
    other = double(VideoTokenizer.from_pretrained(small))
    other.encoder.conv_in.conv3d.bias.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    assert "makes other codes than the one of" in error_of(small, "--video-tokenizer", tmp_path / "other")
    config = json.loads((small / "config.json").read_text())
    write_json(small / "config.json", config | {"prompt_template": "{width}: {prompt}"})
    assert "reads its size in words" in error_of(small, "--video-tokenizer", wide)
    for broken in ("[]", "{", '{"resized": {}}'):
        (small / "training.json").write_text(broken)
        assert f"{small / 'training.json'}" in error_of(small, "--video-tokenizer", wide)
    (small / "training.json").unlink()
    assert "there is no model folder" in error_of("nowhere")
    assert "no folder nowhere: give a video tokenizer folder" in error_of(small, "--video-tokenizer", "nowhere")
    out.mkdir()
    assert main(["resize", str(small), "--video-tokenizer", str(wide), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_resizing_keeps_number_formats(small, wide, tmp_path):
    """The decoder and the tokenizer keep their own dtypes."""
    VideoTokenizer.from_pretrained(wide).bfloat16().save_pretrained(wide)
    assert main(["resize", str(small), "--video-tokenizer", str(wide), "--out", str(tmp_path / "large")]) == 0
    assert stored_dtype(tmp_path / "large") == torch.bfloat16
    assert LumosConfig.from_pretrained(tmp_path / "large").dtype == torch.float16


@pytest.mark.parametrize("strides", [[4, 8], [4, 8, 0], [4, 8, 1.5], [True, 8, 8], 8])
def test_strides_are_three_whole_numbers(strides):
    with pytest.raises(ValueError, match="three whole numbers above 0"):
        micro_config(position_strides=strides)
    with pytest.raises(ValueError, match="has no effect with position_scheme '1d'"):
        micro_config(position_strides=[4, 8, 8], position_scheme="1d")


def test_a_doubled_tokenizer_is_measured_at_twice_the_size(small, wide, tmp_path):
    shapes = {}
    for folder in (small, wide):
        out = tmp_path / f"{folder.name}.json"
        assert (
            main(["evaluate", "tokenizer", "--tokenizer", str(folder), "--data", "worlds", "--count", "1", "--output", str(out)])
            == 0
        )
        shapes[folder.name] = [json.loads(out.read_text())[side] for side in ("height", "width")]
    assert shapes == {"small": [64, 64], "wide": [128, 128]}
