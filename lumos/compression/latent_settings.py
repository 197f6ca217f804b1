"""The settings of the recovery of a pruned model of diffusers on a folder of latents: `generator: diffusers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumos.compression.noising import OBJECTIVES, SCHEDULED
from lumos.compression.settings import DistillSettings, check_distill
from lumos.errors import UserError
from lumos.settings import build, setting, to_plain
from lumos.training.sections import DataSettings
from lumos.training.settings import TrainingSettings, check_deepspeed, check_logging, check_optimization

GENERATOR = "diffusers"
OF_DATA = ("path", "validation_path", "validation_clips", "workers", "prefetch", "processes")
"""Keys of the section data that have an effect."""


@dataclass
class LatentDataSettings(DataSettings):
    source: str = setting("latents", "a folder of latents and text states", choices=("latents",))
    validation_path: str | None = setting(None, "folder of latents that training.eval_every measures the loss on")


@dataclass
class NoiseSettings:
    objective: str | None = setting(
        None, "what the network predicts: flow, epsilon, v_prediction or edm; null: what models of its class usually do",
        choices=(None, *OBJECTIVES),
    )  # fmt: skip
    scheduler: str | None = setting(
        None, "folder of the pipeline's scheduler, for epsilon and v_prediction; null: the folder scheduler beside distill.teacher"
    )
    shift: float = setting(1.0, "of flow: shift of the share of noise u, which becomes shift u / (1 + (shift - 1) u)", above=0)
    mean: float | None = setting(
        None, "mean of the logit of u in flow (null: 0), of the logarithm of the noise level in edm (null: 0.7)"
    )
    std: float | None = setting(None, "standard deviation of the same; null: 1 in flow, 1.6 in edm", above=0)


@dataclass
class LatentDistillSettings(DistillSettings):
    icd_raw: bool | None = setting(
        None, "the mean squared error summed over layers (published), not the mean of relative errors; null: for U-Nets only"
    )


@dataclass
class LatentDistillationSettings(TrainingSettings):
    """Settings of a run on latents. Sections of generators, such as lora and samples, have no effect and are refused."""

    generator: str = setting(GENERATOR, "a model of diffusers", choices=(GENERATOR,))
    data: LatentDataSettings = setting(LatentDataSettings, "the folder of latents")
    noise: NoiseSettings = setting(NoiseSettings, "levels of noise, and what is predicted")
    distill: LatentDistillSettings = setting(LatentDistillSettings, "what the student learns from its teacher")

    def check(self) -> None:
        usual, training = LatentDistillationSettings(), self.training
        for check in (check_logging, check_optimization, check_deepspeed):
            check(self)
        if self.model.from_ is None or self.data.path is None:
            raise UserError("set model.from (the folder of the pruned model) and data.path (a folder of latents)")
        if self.distill.teacher is None:
            raise UserError("distill.teacher is missing: name the folder of the model that the student was pruned from")
        check_distill(self)
        plain, without = to_plain(self), to_plain(usual)
        for section, allowed in (("model", ("from",)), ("data", OF_DATA), ("lora", ()), ("tokenizer", ()), ("samples", ())):
            for key, value in plain[section].items():
                if key not in allowed and value != without[section][key]:
                    raise UserError(f"{section}.{key} has no effect on a model of diffusers; leave it out")
        for key in ("generation",):
            if plain[key]:
                raise UserError(f"{key} has no effect on a model of diffusers; leave it out")
        for key in ("compile", "attention"):
            if getattr(training, key) != getattr(usual.training, key):
                raise UserError(f"training.{key} has no effect on a model of diffusers; leave it out")
        if training.batch_size is None:
            raise UserError("training.tokens_per_batch cannot be used with latents; set training.batch_size")
        if self.distill.kept:
            raise UserError("distill.kept has no effect on a model of diffusers, whose compression.json names what is compared")
        if (self.data.validation_path is None) != (training.eval_every == 0):
            raise UserError("data.validation_path and training.eval_every go together; set both, or neither")
        noise = self.noise
        for key, kinds in (("scheduler", SCHEDULED), ("shift", ("flow",)), ("mean", ("flow", "edm")), ("std", ("flow", "edm"))):
            if noise.objective not in (None, *kinds) and getattr(noise, key) != getattr(usual.noise, key):
                raise UserError(f"noise.{key} has no effect with noise.objective={noise.objective}; leave it out")


def build_latent_settings(raw: dict[str, Any]) -> LatentDistillationSettings:
    """Return the settings from nested dicts. Raises UserError as `lumos.training.settings.build_settings` does."""
    settings = build(LatentDistillationSettings, raw)
    settings.check()
    return settings
