"""Settings of a training run of Lumos-1: the shared settings, and the masks of AR-DF.

AR-DF (autoregressive discrete diffusion forcing) is the training objective of Lumos-1.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumos.models.lumos1.configuration import ATTENTION_IMPLEMENTATIONS
from lumos.models.lumos1.settings import MASK_KINDS, GenerationSettings
from lumos.settings import setting
from lumos.training.settings import LoraSettings, OptimizationSettings, TrainingSettings

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class MaskingSettings:
    kind: str = setting("tube", "mask pattern (published: tube)", choices=MASK_KINDS)
    min_ratio: float = setting(0.7, "lowest share of masked codes in a clip (published 0.7)", low=0, high=1)
    text_dropout: float = setting(
        0.1, "share of clips that are trained without their text, for guidance (published 0.1)", low=0, high=1
    )


@dataclass
class LumosLoraSettings(LoraSettings):
    targets: list[str] = setting(list(LORA_TARGETS), "linear projections of every layer that get adapters")


@dataclass
class LumosOptimizationSettings(OptimizationSettings):
    attention: str | None = setting(
        None,
        "attention implementation of the run: segmented (on a GPU fast with few and long segments), dense (for short clips: memory "
        "grows with the square of the length), flex (CUDA only; compiled for each length, so set data.pad_to); null: that of the "
        "model's config",
        choices=(None, *ATTENTION_IMPLEMENTATIONS),
    )


@dataclass
class LumosTrainingSettings(TrainingSettings):
    """All settings of a run that trains Lumos-1."""

    sampling = GenerationSettings

    lora: LumosLoraSettings = setting(LumosLoraSettings, "fine-tuning by low-rank adapters")
    masking: MaskingSettings = setting(MaskingSettings, "which codes are masked for the model to predict")
    training: LumosOptimizationSettings = setting(LumosOptimizationSettings, "optimizer, batches, checkpoints and devices")
