"""A model of 2 layers and 64 channels, tokenizers made on the spot, and worlds of 5 frames of 32 x 32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lumos.data.worlds import captions
from lumos.training.settings import TrainingSettings, build_settings
from tokenizer.text import TextTokenizer
from tokenizer.video import VideoTokenizer, VideoTokenizerConfig

MICRO_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="session")
def micro_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    config = VideoTokenizerConfig(
        channels=8, channels_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=4, embedding_dim=4, levels=(8, 5, 5, 5)
    )
    VideoTokenizer(config).save_pretrained(folder / "video")
    symbols = [f"<special{i}>" for i in range(1, 255)]
    TextTokenizer.train(captions(0, 200), 900, reserved_symbols=symbols).save_pretrained(folder / "text")
    return {"video": str(folder / "video"), "text": str(folder / "text")}


@pytest.fixture
def micro_settings(micro_tokenizers: dict[str, str], tmp_path: Path) -> Callable[..., TrainingSettings]:
    """Settings of a run of a second; keywords are sections whose keys override."""

    def make(**sections: dict) -> TrainingSettings:
        raw = {
            "model": {"preset": "tiny", "overrides": MICRO_MODEL},
            "tokenizer": micro_tokenizers,
            "data": {"num_frames": 5, "height": 32, "width": 32, "workers": 0, "validation_clips": 3},
            "training": {
                "max_steps": 6, "batch_size": 4, "warmup_steps": 1, "lr": 3e-3, "log_every": 1, "save_every_minutes": 0,
                "device": "cpu",
                "output_dir": str(tmp_path / "run"),
            },
            "logging": {"peak_tflops": 0.1},
        }  # fmt: skip
        for name, values in sections.items():
            raw[name] = values if name == "model" else {**raw.get(name, {}), **values}
        return build_settings(raw)

    return make
