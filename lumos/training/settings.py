"""The settings of a training run: the sections of `lumos.training.sections`, and checks across them.

`load_settings` reads them from one YAML file and `section.key=value` overrides.
`lumos.settings.describe(TrainingSettings)` lists them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lumos import registry
from lumos.data.prefetch import check_processes
from lumos.data.shards.remote import is_url
from lumos.errors import UserError, as_text, instead, shown
from lumos.pipeline.options import SamplingOptions
from lumos.settings import build, is_number, read_yaml, setting, to_plain
from lumos.training.sections import (
    DEFAULT_STAGE,
    WHOLE_MATRICES,
    DataSettings,
    DeepSpeedSettings,
    LoggingSettings,
    LoraSettings,
    ModelSettings,
    OptimizationSettings,
    SampleSettings,
    TokenizerSettings,
)
from lumos.wording import is_blank, one_line, wrong_character

OF_WORLDS = ("options", "height", "width", "fps", "scenes")
OF_SHARDS = ("size", "shuffle_shards", "cache_dir", "cache_gb", "min_frames")
"""Fields of the section data that have an effect with one source only: synthetic scenes, or shards."""
LEAST_EPS = 1e-18
"""Smallest epsilon of Adafactor: its square is still a number in float32."""


def recipe_folders() -> list[str]:
    """Return the folders of configs with recipes of training, in the order in which a name alone is looked for."""
    return [*registry.generators(), "compression"]


def world_size() -> int:
    """Return the number of processes that the launcher (deepspeed, torchrun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class TrainingSettings:
    """All settings of a run.

    `name` is by default the name of the config file without its suffix, and also names the default
    output folder. The settings class of a generator inherits from this class: it adds sections,
    replaces a section by one with more keys, and extends `check`.
    """

    sampling: ClassVar[type[SamplingOptions]] = SamplingOptions
    """Class of the generator's sampling options, which generation and samples.options hold."""

    name: str = setting("train", "name of the run")
    generator: str = setting("lumos1", "name of the generator that is trained, see `lumos.registry`")
    model: ModelSettings = setting(ModelSettings, "the model to train")
    lora: LoraSettings = setting(LoraSettings, "fine-tuning by low-rank adapters")
    tokenizer: TokenizerSettings = setting(TokenizerSettings, "the video and the text tokenizer, which this run does not train")
    data: DataSettings = setting(DataSettings, "the clips to train on")
    training: OptimizationSettings = setting(OptimizationSettings, "optimizer, batches, checkpoints and devices")
    deepspeed: DeepSpeedSettings = setting(DeepSpeedSettings, "distribution over several processes")
    logging: LoggingSettings = setting(LoggingSettings, "dashboards")
    samples: SampleSettings = setting(SampleSettings, "sample clips that are generated during the training")
    generation: dict[str, Any] = setting({}, "default sampling options of the exported model")

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage of the run, or None for plain PyTorch."""
        return self.zero_stage_with(world_size())

    def zero_stage_with(self, processes: int) -> int | None:
        """Return the ZeRO stage of a run with this number of processes, or None for plain PyTorch."""
        wanted = self.deepspeed
        if wanted.zero_stage is None and wanted.config is None:
            usual = 0 if self.training.optimizer in WHOLE_MATRICES else DEFAULT_STAGE
            return None if processes == 1 else usual
        if wanted.zero_stage is not None:
            return wanted.zero_stage
        return wanted.file_options().get("zero_optimization", {}).get("stage", DEFAULT_STAGE)

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.training.output_dir or Path("runs") / self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers under the keys of the YAML file.

        `build_settings(s.to_dict())` equals `s`.
        """
        return to_plain(self)

    def key(self, name: str) -> str:
        """Return the name of the setting `section.key` in the user's file; subclasses with another layout override it."""
        return name

    def check(self) -> None:
        """Raise UserError if fields contradict each other."""
        for check in CHECKS:
            check(self)

    @classmethod
    def for_ingested(cls, sections: dict[str, Any], adapters: bool = False) -> dict[str, Any]:
        """Return sections of a model's earlier training in a form that a training on ingested clips can have.

        adapters: whether that training has lora.rank. A generator leaves out what has no effect or no meaning there.
        """
        return sections


SettingsOf = Callable[[registry.Generator], type[TrainingSettings]]
"""The class of the settings of a generator's training."""


def training_settings_of(generator: registry.Generator) -> type[TrainingSettings]:
    """Return the class of a generator's own training settings."""
    return generator.load("settings")


def load_settings(
    path: str | Path, overrides: list[str] | None = None, settings_of: SettingsOf = training_settings_of
) -> TrainingSettings:
    """Read a YAML file, apply overrides in order (for example `training.max_steps=200`), return the settings.

    `settings_of` gives the class of the settings for the generator that the file names.
    Raises UserError for a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    raw = read_yaml(path, overrides or [], recipe_folders())
    raw.setdefault("name", Path(path).stem)
    return build_settings(raw, settings_of)


def build_settings(raw: dict[str, Any], settings_of: SettingsOf = training_settings_of) -> TrainingSettings:
    """Return the settings from nested dicts, in the class of the generator that `raw` names.

    Raises UserError as `load_settings` does, except for missing files.
    """
    settings = build(settings_of(registry.generator(raw.get("generator"))), raw)
    settings.model.preset = own_preset(settings)
    settings.check()
    return settings


def own_preset(settings: TrainingSettings) -> str | None:
    """Return model.preset without a leading GENERATOR-; raise UserError if it is the preset of another generator."""
    preset = settings.model.preset
    if preset is None or not any(preset.startswith(f"{name}-") for name in registry.generators()):
        return preset
    owner, name = registry.find_preset(preset)
    if owner.name != settings.generator:
        raise UserError(f"model.preset {shown(preset)} is one of the generator {owner.name}; set generator: {owner.name}")
    return name


def check_sampling(settings: TrainingSettings) -> None:
    samples = settings.samples
    for name, options in (("generation", settings.generation), ("samples.options", settings.generation | samples.options)):
        if unknown := [key for key in options if key not in settings.sampling.declared()]:
            raise UserError(f"{name}: unknown key {as_text(unknown[0])}{instead(unknown[0], settings.sampling.declared())}")
        settings.sampling(**options)
    if samples.every and not samples.prompts:
        raise UserError(f"samples.every is {samples.every}, but samples.prompts is empty; give at least one prompt")
    for prompt in samples.prompts:
        if wrong := wrong_character(one_line(prompt)):
            raise UserError(f"samples.prompts: the prompt {shown(prompt)} {wrong}")
        if is_blank(prompt):
            raise UserError(f"samples.prompts holds the empty prompt {shown(prompt)}; say in words what the clip shows")
    of_given = {name: option.default for name, option in settings.sampling.declared().items() if option.for_given_frames}
    if useless := [name for name, value in samples.options.items() if name in of_given and value != of_given[name]]:
        warnings.warn(f"samples.options.{useless[0]} has no effect on samples, which are made from text alone")
    if samples.prompts and not samples.every:
        warnings.warn("samples.prompts has no effect with samples.every=0")
    if samples.every and samples.max_seconds >= 60 * settings.deepspeed.timeout_minutes:
        raise UserError(
            f"samples.max_seconds is {samples.max_seconds}, but processes wait for each other only "
            f"{settings.deepspeed.timeout_minutes} minutes; lower it, or raise deepspeed.timeout_minutes"
        )


def check_logging(settings: TrainingSettings) -> None:
    if len(set(settings.logging.to)) < len(settings.logging.to):
        raise UserError(f"logging.to names a dashboard twice: {', '.join(settings.logging.to)}")


def check_data(settings: TrainingSettings) -> None:
    data, usual = settings.data, DataSettings()
    if (data.source == "shards") != (data.path is not None):
        raise UserError(f"data.source is {data.source} and data.path is {as_text(data.path)}; shards need a path, worlds have none")
    for name in OF_WORLDS if data.source == "shards" else OF_SHARDS:
        if getattr(data, name) != getattr(usual, name):
            why = ", whose clips were ingested as they are" if data.source == "shards" else ""
            raise UserError(f"data.{name} has no effect with data.source={data.source}{why}; leave it out")
    for name in ("cache_dir", "cache_gb"):
        if getattr(data, name) != getattr(usual, name) and not is_url(data.path):
            raise UserError(f"data.{name} has no effect with the local data.path {as_text(data.path)}; leave it out")
    for number, replay in enumerate(data.replay):
        if (replay.source == "shards") != (replay.path is not None) or (replay.source == "shards" and replay.options):
            raise UserError(
                f"data.replay[{number}] has source {replay.source}, path {as_text(replay.path)} and {len(replay.options)} options; "
                "shards need a path and have no options, worlds have no path"
            )
    if (total := sum(replay.share for replay in data.replay)) >= 1:
        raise UserError(f"the shares of data.replay have the sum {total:g}; it must be below 1, for data.source has the rest")
    if (data.min_frames or 0) > data.num_frames:
        raise UserError(f"data.min_frames {data.min_frames} is above data.num_frames {data.num_frames}; it must be at most that")
    check_processes(data.processes)
    if data.processes and data.workers > 1:
        raise UserError(f"data.workers is {data.workers}, but with data.processes one thread encodes all clips; leave it out")


def check_stages(settings: TrainingSettings) -> None:
    data, stages = settings.data, settings.data.stages
    for i, stage in enumerate(stages):
        if stage.image_batch_size is not None and stage.image_share == 0:
            raise UserError(f"data.stages[{i}].image_batch_size has no effect with image_share 0; set image_share too")
        if stage.first_frames is None and stage.short_share != 1:
            raise UserError(f"data.stages[{i}].short_share has no effect without first_frames; set it too, or leave both out")
        if stage.first_frames is not None and (stage.image_share == 1 or stage.short_share == 0):
            raise UserError(
                f"data.stages[{i}].first_frames has no effect with image_share {stage.image_share} and short_share "
                f"{stage.short_share}, which leave no short steps; leave it out"
            )
        if stage.first_frames is not None and stage.first_frames >= data.num_frames:
            raise UserError(
                f"data.stages[{i}].first_frames is {stage.first_frames}; give less than data.num_frames {data.num_frames}"
            )
    for i, stage in enumerate(stages[:-1]):
        if stage.steps is None:
            raise UserError(f"data.stages[{i}].steps is missing; only the last stage may leave it out")


def check_optimization(settings: TrainingSettings) -> None:
    training, stages = settings.training, settings.data.stages
    if (training.batch_size is None) == (training.tokens_per_batch is None):
        raise UserError(
            f"training.batch_size is {training.batch_size} and training.tokens_per_batch {training.tokens_per_batch}; "
            "one of them must be null, the other a number"
        )
    if training.tokens_per_batch is not None and stages and all(stage.batch_size for stage in stages):
        raise UserError("training.tokens_per_batch has no effect, because every stage has a batch_size; set only one of them")
    if training.keep_every and (not training.save_every_steps or training.keep_every % training.save_every_steps):
        raise UserError(
            f"training.keep_every is {training.keep_every}; it must be a multiple of training.save_every_steps, which is "
            f"{training.save_every_steps}"
        )
    if training.schedule == "constant" and training.min_lr not in (0, training.lr):
        raise UserError(f"training.min_lr {training.min_lr} has no effect with training.schedule=constant; leave it out")
    if training.min_lr > training.lr:
        raise UserError(f"training.min_lr is {training.min_lr}, above training.lr {training.lr}; it must be at most lr")
    if training.ema_decay >= 1:
        raise UserError("training.ema_decay must be below 1; for example 0.999, or 0 for no averaged weights")
    if training.decay_steps is not None and training.schedule != "wsd":
        raise UserError(f"training.decay_steps only has an effect with training.schedule=wsd, not {training.schedule}")
    if training.warmup_steps > training.max_steps:
        warnings.warn(
            f"training.warmup_steps {training.warmup_steps} is above training.max_steps {training.max_steps}: the learning rate "
            f"rises to {training.lr * training.max_steps / training.warmup_steps:.1e} only, not to training.lr {training.lr:g}"
        )


def check_adafactor(settings: TrainingSettings) -> None:
    training, usual = settings.training, OptimizationSettings()
    if training.optimizer != "adafactor":
        return
    if training.eps < LEAST_EPS:
        raise UserError(
            f"training.eps is {training.eps}; with training.optimizer=adafactor it must be at least {LEAST_EPS}, because "
            "its square divides where all gradients are 0"
        )
    if tuple(training.betas) != usual.betas:
        warnings.warn(
            "training.betas has no effect with training.optimizer=adafactor: torch's Adafactor has no first moment, and the decay "
            "of the second is 1 - step^-0.8"
        )


def check_deepspeed(settings: TrainingSettings) -> None:
    if settings.deepspeed.timeout_minutes <= 0:
        raise UserError(f"deepspeed.timeout_minutes is {settings.deepspeed.timeout_minutes}; it must be above 0")
    if settings.deepspeed.config is not None and not os.path.isfile(settings.deepspeed.config):
        raise UserError(
            f"deepspeed.config: there is no file {as_text(settings.deepspeed.config)}; the shipped ones are in configs/deepspeed/"
        )


def check_model(settings: TrainingSettings) -> None:
    if settings.model.preset is None and settings.model.from_ is None:
        raise UserError("set model.preset (random weights) or model.from (a model folder)")
    lora, usual = settings.lora, type(settings.lora)()
    if lora.rank is None:
        for name in ("alpha", "dropout", "targets"):
            if getattr(lora, name) != getattr(usual, name):
                raise UserError(f"lora.{name} has no effect without lora.rank; set a rank, for example 8, or leave it out")
        return
    if settings.model.from_ is None:
        raise UserError("lora.rank needs model.from: adapters change a trained model, not random weights")
    if unknown := [name for name in lora.targets if name not in usual.targets]:
        raise UserError(f"lora.targets has {shown(unknown[0])}; allowed: {', '.join(usual.targets)}")
    if not lora.targets or lora.dropout >= 1:
        raise UserError("lora.targets must not be empty, and lora.dropout must be below 1")


CHECKS = (
    check_sampling, check_logging, check_data, check_stages, check_optimization, check_adafactor, check_deepspeed, check_model,
)  # fmt: skip


def check_named_shares(name: str, shares: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raise UserError unless the setting `name` holds shares from 0 by allowed names, with a sum above 0."""
    for key, share in shares.items():
        if key not in allowed:
            raise UserError(f"{name}.{shown(key)} is unknown{instead(key, allowed)}")
        if not is_number(share) or not 0 <= share <= 1e6:
            raise UserError(f"{name}.{key} {shown(share)} is not allowed; give a share from 0")
    if not sum(shares.values()) > 0:
        raise UserError(f"{name} {shown(shares)} has no share above 0; give at least one, such as {allowed[0]}: 1")
