"""Lumos: autoregressive video generation with a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel

from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.modeling import LumosForVideoGeneration

if TYPE_CHECKING:
    from lumos.models.lumos1.pipeline import LumosPipeline

__version__ = "0.1.0"
__all__ = ["LumosConfig", "LumosForVideoGeneration", "LumosPipeline"]

AutoConfig.register("lumos", LumosConfig)
AutoModel.register(LumosConfig, LumosForVideoGeneration)


def __getattr__(name: str) -> Any:
    """The pipeline is imported on first use: it needs `tokenizer`, which itself uses `lumos.errors` and `lumos.files`."""
    if name == "LumosPipeline":
        from lumos.models.lumos1.pipeline import LumosPipeline

        return LumosPipeline
    raise AttributeError(f"module 'lumos' has no attribute {name!r}")
