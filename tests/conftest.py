from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lumos import LumosConfig, LumosForVideoGeneration

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden values: tests/golden, or another of the same form named by LUMOS_GOLDEN."""
    return Path(os.environ.get("LUMOS_GOLDEN", ROOT / "tests" / "golden"))


@pytest.fixture(scope="session")
def repo() -> Path:
    return ROOT


def micro_config(**overrides) -> LumosConfig:
    """A decoder of two layers with the tiny preset's ids and few codes; grouped heads."""
    sizes = {
        "vocab_size": 1024 + 64, "visual_token_count": 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    return LumosConfig.preset("tiny", **{**sizes, **overrides})


@pytest.fixture(scope="session")
def micro_folder(tmp_path_factory) -> Path:
    """A whole model folder of random weights: 64 codes, 8 x 8 pixels a code, clips of 5 frames of 16 x 24 pixels."""
    from lumos import LumosPipeline
    from lumos.generation.settings import ClipDefaults, GenerationSettings
    from tokenizer import TextTokenizer, VideoTokenizer, VideoTokenizerConfig

    torch.manual_seed(0)
    video = VideoTokenizer(
        VideoTokenizerConfig(
            channels=8, channels_mult=(1, 2), num_res_blocks=1, spatial_compression=8, temporal_compression=4,
            embedding_dim=3, levels=(4, 4, 4),
        )
    )  # fmt: skip
    symbols = [f"<reserved{i:03d}>" for i in range(1, 255)]
    captions = ["a red circle moves left on a gray background", "a small blue square grows", "the digit 7 moves up"]
    text = TextTokenizer.train(captions, 600, reserved_symbols=symbols)
    pipe = LumosPipeline(
        LumosForVideoGeneration(micro_config()), text, video,
        GenerationSettings(num_inference_steps=2, guidance_scale=2.0), ClipDefaults(5, 16, 24, 8, None),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "micro"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def config() -> LumosConfig:
    return micro_config()


@pytest.fixture
def model(config) -> LumosForVideoGeneration:
    torch.manual_seed(0)
    return LumosForVideoGeneration(config).eval()
