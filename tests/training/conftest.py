"""A model of 2 layers and 64 channels, small tokenizers, and synthetic scenes of 5 frames of 32 x 32 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Ranks, Runs
from shard_folder import MIXED, write_folder

from lumos.data.synthetic.sampling import captions
from lumos.training.settings import TrainingSettings, build_settings
from tokenizer.text import TextTokenizer
from tokenizer.video import VideoTokenizer, VideoTokenizerConfig

MICRO_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 2024,
    "visual_token_count": 1000,
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


def build_micro(tokenizers: dict[str, str], output_dir: Path, **sections: dict) -> TrainingSettings:
    """Settings of a run that takes a second; keywords are sections with keys that replace others."""
    raw = {
        "model": {"preset": "tiny", "overrides": MICRO_MODEL},
        "tokenizer": tokenizers,
        "data": {"num_frames": 5, "height": 32, "width": 32, "workers": 0, "validation_clips": 3},
        "training": {
            "max_steps": 6, "batch_size": 4, "warmup_steps": 1, "lr": 3e-3, "log_every": 1, "save_every_minutes": 0,
            "device": "cpu",
            "output_dir": str(output_dir),
        },
        "logging": {"peak_tflops": 0.1},
    }  # fmt: skip
    for name, values in sections.items():
        raw[name] = values if name == "model" else {**raw.get(name, {}), **values}
    return build_settings(raw)


@pytest.fixture(scope="session")
def settings_in(micro_tokenizers: dict[str, str]) -> Callable[..., TrainingSettings]:
    """A function that makes the settings of a run in a folder; see `build_micro`."""
    return lambda folder, **sections: build_micro(micro_tokenizers, folder, **sections)


@pytest.fixture
def micro_settings(micro_tokenizers: dict[str, str], tmp_path: Path) -> Callable[..., TrainingSettings]:
    return lambda **sections: build_micro(micro_tokenizers, tmp_path / "run", **sections)


@pytest.fixture(scope="session")
def runs(ranks: Ranks, micro_tokenizers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Settings with pictures, then clips; checkpoints after steps 2 and 4 of 5; averaged weights; several micro-batches."""
    data = {"stages": [{"steps": 2, "image_share": 1.0}, {}]}
    training = {"max_steps": 5, "save_every_steps": 2, "ema_decay": 0.9, "eval_every": 5, "micro_batch_size": 1}
    samples = {"every": 5, "prompts": ["a red circle"], "options": {"num_inference_steps": 2}}

    def make(folder: Path) -> TrainingSettings:
        return build_micro(micro_tokenizers, folder, data=data, training=training, samples=samples)

    return Runs(ranks, tmp_path_factory.mktemp("runs"), make)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, micro_tokenizers) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "shards", micro_tokenizers["video"], MIXED)


@pytest.fixture
def shard_settings(micro_settings, folder):
    def make(path=folder, **sections):
        data = {"source": "shards", "path": str(path), "height": 64, "width": 64, "num_frames": 5}
        return micro_settings(**{**sections, "data": {**data, **sections.get("data", {})}})

    return make
