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


@pytest.fixture
def config() -> LumosConfig:
    return micro_config()


@pytest.fixture
def model(config) -> LumosForVideoGeneration:
    torch.manual_seed(0)
    return LumosForVideoGeneration(config).eval()
