from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_stiv import micro_pipeline

from lumos import StivPipeline
from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.text_encoder import TextStates

SMALLEST = {
    "latent_channels": 3, "hidden_size": 64, "num_hidden_layers": 3, "text_width": 64, "text_layers": 1, "text_vocab_size": 32,
    "max_prompt_tokens": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tensors(one_thread):
    """All tests of this folder."""


@pytest.fixture(scope="session")
def micro_stiv_config() -> Callable[..., StivConfig]:
    """A function that makes a config of three blocks of one head."""
    return lambda **more: StivConfig(**{**SMALLEST, **more})


@pytest.fixture(scope="session")
def micro_stiv(micro_stiv_config) -> Callable[..., StivForVideoGeneration]:
    """A function that makes a model in which no weight is 0, so that every part has an effect."""

    def make(seed: int = 0, **more) -> StivForVideoGeneration:
        torch.manual_seed(seed)
        model = StivForVideoGeneration(micro_stiv_config(**more)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return make


@pytest.fixture
def stiv_text() -> Callable[..., TextStates]:
    """A function that makes encoded prompts of 5 tokens, fewer in the last rows."""

    def make(batch: int, width: int = 64, seed: int = 1) -> TextStates:
        draws = torch.Generator().manual_seed(seed)
        mask = torch.arange(5) < torch.tensor([max(1, 5 - i) for i in range(batch)])[:, None]
        return TextStates(torch.randn(batch, 5, width, generator=draws), mask, torch.randn(batch, width, generator=draws))

    return make


@pytest.fixture(scope="session")
def stiv_folder(tmp_path_factory) -> Path:
    """A complete model folder of random weights, with all patterns, for clips of 5 frames of 16 x 32 pixels."""
    folder = tmp_path_factory.mktemp("models") / "stiv"
    micro_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(stiv_folder) -> StivPipeline:
    return StivPipeline.from_pretrained(stiv_folder, device="cpu")


@pytest.fixture(scope="session")
def frames() -> np.ndarray:
    """Frames uint8 [6, 16, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (6, 16, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def clip_text(tmp_path_factory) -> Path:
    """A frozen text encoder of width 64 and its tokenizer, written by transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("text") / "clip"
    words = {word: n for n, word in enumerate(["<end>", "a", "red", "circle", "<unk>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    marks = {"pad_token": "<end>", "eos_token": "<end>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=5, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
        eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )).save_pretrained(folder)  # fmt: skip
    return folder
