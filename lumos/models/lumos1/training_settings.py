"""Settings of a training of Lumos-1: the shared ones, with the masks of AR-DF."""

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
    min_ratio: float = setting(0.7, "lowest share of masked tokens in a clip (published 0.7)", low=0, high=1)
    text_dropout: float = setting(0.1, "share of samples without their text, for guidance (published 0.1)", low=0, high=1)


@dataclass
class LumosLoraSettings(LoraSettings):
    targets: list[str] = setting(list(LORA_TARGETS), "projections of every layer that get adapters")


@dataclass
class LumosOptimizationSettings(OptimizationSettings):
    attention: str | None = setting(
        None,
        "how the run attends: segmented (a GPU wants few and long segments), dense (short clips: memory "
        "grows with the square of the length), flex (CUDA only, "
        "compiled for each length: set data.pad_to); null: as the model's config says",
        choices=(None, *ATTENTION_IMPLEMENTATIONS),
    )


@dataclass
class LumosTrainingSettings(TrainingSettings):
    """All settings of a run that trains Lumos-1."""

    sampling = GenerationSettings

    lora: LumosLoraSettings = setting(LumosLoraSettings, "fine-tuning by low-rank adapters")
    masking: MaskingSettings = setting(MaskingSettings, "which tokens the model must fill in")
    training: LumosOptimizationSettings = setting(LumosOptimizationSettings, "how it is trained")
