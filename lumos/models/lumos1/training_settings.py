"""Settings of a training run of Lumos-1: the shared settings, the masks of AR-DF, and the given frames.

AR-DF (autoregressive discrete diffusion forcing) is the training objective of Lumos-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumos.errors import UserError
from lumos.models.lumos1.configuration import ATTENTION_IMPLEMENTATIONS, PATTERNS
from lumos.models.lumos1.patterns import trained_patterns
from lumos.models.lumos1.settings import MASK_KINDS, GenerationSettings
from lumos.settings import setting
from lumos.training.sections import LoraSettings, OptimizationSettings
from lumos.training.settings import TrainingSettings, check_named_shares

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class MaskingSettings:
    kind: str = setting("tube", "mask pattern (published: tube)", choices=MASK_KINDS)
    min_ratio: float = setting(0.7, "lowest share of masked codes in a clip (published 0.7)", low=0, high=1)
    text_dropout: float = setting(
        0.1, "share of clips that are trained without their text, for guidance (published 0.1)", low=0, high=1
    )


@dataclass
class LumosDropoutSettings:
    image: float = setting(
        0.08, "share of clips with given frames whose given frames are masked, for image_guidance_scale (STIV: 0.08)", low=0, high=1
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
    patterns: dict[str, Any] = setting(
        {"none": 1.0},
        f"shares of clips by the frames that are given: whole in the input and without a loss; some of {', '.join(PATTERNS)} "
        "(published: none)",
    )
    dropout: LumosDropoutSettings = setting(LumosDropoutSettings, "given frames that are left out at random")
    training: LumosOptimizationSettings = setting(LumosOptimizationSettings, "optimizer, batches, checkpoints and devices")

    def check(self) -> None:
        """Raise UserError if fields contradict each other."""
        super().check()
        check_named_shares("patterns", self.patterns, PATTERNS)
        named = trained_patterns(self.patterns)
        if named == ["none"] and self.dropout.image != LumosDropoutSettings().image:
            raise UserError("dropout.image has no effect, because patterns give no frames; leave it out, or set patterns")
        if "ends" in named and self.lora.rank is not None:
            raise UserError(
                "patterns.ends teaches a model another order of frames, which an adapter folder does not tell; leave lora.rank out"
            )
        stages = self.data.stages
        if named != ["none"] and stages and all(stage.image_share == 1 for stage in stages):
            raise UserError("patterns give frames of clips, and this run trains on pictures only; set patterns to {none: 1}")

    @classmethod
    def for_ingested(cls, sections: dict[str, Any], adapters: bool = False) -> dict[str, Any]:
        patterns = sections.get("patterns")
        if not adapters or not isinstance(patterns, dict) or not patterns.get("ends"):
            return sections
        left = {**patterns, "ends": 0.0}
        if any(share for name, share in left.items() if name != "none"):
            return sections | {"patterns": left}
        return {name: values for name, values in sections.items() if name not in ("patterns", "dropout")}  # no frames are given
