"""Lumos: autoregressive video generation with a language model."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel

from lumos.configuration import LumosConfig
from lumos.modeling import LumosForVideoGeneration

__version__ = "0.1.0"
__all__ = ["LumosConfig", "LumosForVideoGeneration"]

AutoConfig.register("lumos", LumosConfig)
AutoModel.register(LumosConfig, LumosForVideoGeneration)
