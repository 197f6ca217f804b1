"""The settings of a training run.

Each has a one-line meaning, with the value of the published model where there is one ("published").
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
from lumos.errors import UserError, as_text, shown
from lumos.files import MAX_YAML_LENGTH, read_json
from lumos.pipeline.options import SamplingOptions
from lumos.settings import build, is_number, read_yaml, setting, to_plain

RECIPES = ("lumos1", "stiv", "compression")
"""The folders of configs with recipes of training, in the order in which a name alone is looked for."""
MAX_STEPS = 10**9
MAX_CLIPS = 2**17
"""Largest number of clips in an optimizer step, which is laid out in host memory, and in a validation set."""
MAX_TOKENS = 2**31
MAX_SIDE = 2**14
MAX_FRAMES = 2**14
MAX_PROCESSES = 256
"""Largest number of threads or processes that make batches on one machine."""
OF_WORLDS = ("options", "height", "width", "fps", "scenes")
OF_SHARDS = ("size", "shuffle_shards", "cache_dir", "cache_gb", "min_frames")
"""Fields of the section data that have an effect with one source only: synthetic scenes, or shards."""
DEFAULT_STAGE = 2
"""ZeRO stage of a run with several processes that names none. With Muon, which needs whole matrices, it is 0."""


def world_size() -> int:
    """Return the number of processes that the launcher (deepspeed, torchrun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class ModelSettings:
    preset: str | None = setting(
        None,
        "name of the model shape to train from random weights, a preset of the generator, also as GENERATOR-PRESET; "
        "an unknown name lists the known ones",
    )
    overrides: dict[str, Any] = setting({}, "fields of the model config that differ from the preset")
    from_: str | None = setting(
        None, "model folder whose weights and config the run starts from; if preset is set too, the model must have that shape"
    )


@dataclass
class LoraSettings:
    rank: int | None = setting(
        None, "rank of low-rank adapters (LoRA, arXiv 2106.09685); only the adapters are then trained; null: train the whole model",
        low=1, high=2**16,
    )
    alpha: float = setting(16.0, "adapters are scaled by alpha / rank", low=0)
    dropout: float = setting(0.0, "dropout on the inputs of the adapters", low=0, high=1)
    targets: list[str] = setting([], "linear layers of every block that get adapters")


@dataclass
class TokenizerSettings:
    video: str | None = setting(None, "folder of the trained video tokenizer; default: the tokenizer inside model.from")
    text: str | None = setting(None, "folder or file of the text tokenizer; default: the tokenizer inside model.from")


@dataclass
class StageSettings:
    steps: int | None = setting(
        None, "optimizer steps of this stage; null in the last stage: up to training.max_steps", low=1, high=MAX_STEPS,
    )
    image_share: float = setting(
        0.0, "share of the steps whose batch holds pictures (one-frame clips); published: 1, then 0.5", low=0, high=1
    )
    batch_size: int | None = setting(
        None, "clips in a video step, over all processes; default: as in the section training", low=1, high=MAX_CLIPS,
    )
    image_batch_size: int | None = setting(
        None,
        "pictures in an image step, over all processes; default: batch_size (published: 6 pictures for 1 clip)",
        low=1, high=MAX_CLIPS,
    )
    first_frames: int | None = setting(
        None,
        "first frames of each clip that a short video step trains on, 1 + a multiple of the temporal compression; text and header "
        "still describe the whole clip. No frame sees later frames, so a short step trains these frames as a whole clip would, in "
        "less time; null: no short steps",
        low=1, high=MAX_FRAMES,
    )
    short_share: float = setting(1.0, "share of the video steps that are short, if first_frames is set", low=0, high=1)


@dataclass
class ReplaySettings:
    share: float = setting(0.5, "share of the steps whose clips come from this source", above=0, below=1)
    source: str = setting("worlds", "where these clips come from: worlds or shards, as data.source", choices=("worlds", "shards"))
    path: str | None = setting(None, "folder of the shards, or its URL")
    options: dict[str, Any] = setting({}, "options of the synthetic scenes, as data.options")


@dataclass
class DataSettings:
    source: str = setting(
        "worlds", "where clips come from: worlds (synthetic scenes), or shards, which ingest wrote", choices=("worlds", "shards")
    )
    path: str | None = setting(
        None, "folder of the shards, or its URL (s3://, gs://, hf://, https://, or another that fsspec supports)"
    )
    shuffle_shards: int = setting(
        16, "number of shards that are open at a time, whose clips are shuffled together", low=1, high=10_000
    )
    cache_dir: str | None = setting(None, "folder for copies of remote shards; default: ~/.cache/lumos/shards")
    cache_gb: float = setting(20.0, "largest total size of the copies of remote shards, in GB", low=0, high=1e9)
    size: str | None = setting(
        None, "--size with which the shards must have been ingested, for example 256p; null: any. `plan` computes with this size"
    )
    options: dict[str, Any] = setting({}, "options of the synthetic scenes, see lumos.data.synthetic.sampling.sample_scene")
    replay: list[ReplaySettings] = setting(
        [],
        "further sources, each for a share of the steps, so that a fine-tuned model keeps what it knew; synthetic scenes among "
        "them have the usual shape of the other clips",
    )
    num_frames: int = setting(
        17, "frames of a clip, 1 + a multiple of the tokenizer's temporal compression", low=1, high=MAX_FRAMES,
    )
    min_frames: int | None = setting(
        None, "use clips of shards from this number of frames on, at their own length; null: leave out clips below num_frames",
        low=2, high=MAX_FRAMES,
    )
    height: int = setting(64, "frame height of synthetic scenes in pixels; shards have their own sizes", low=1, high=MAX_SIDE)
    width: int = setting(64, "frame width of synthetic scenes in pixels", low=1, high=MAX_SIDE)
    fps: int = setting(8, "frames per second of synthetic scenes", low=1, high=1000)
    scenes: int | None = setting(
        None, "number of different synthetic scenes, which are then repeated; null: unlimited", low=1, high=2**31
    )
    stages: list[StageSettings] = setting([], "stages of the curriculum, in order; empty: one stage with video only")
    workers: int = setting(
        1, "threads that prefetch batches; 0: make each batch when it is needed", low=0, high=MAX_PROCESSES,
    )
    prefetch: int = setting(2, "number of batches to keep ready; only with workers", low=1, high=1000)
    processes: int = setting(
        0,
        "processes that draw or read clips in advance, for devices that are faster than threads can be; one thread then "
        "encodes the clips; 0: none",
        low=0, high=MAX_PROCESSES,
    )
    pad_to: int = setting(
        1, "pad sequences to a multiple of this number of tokens: compiled attention and compiled code then meet fewer lengths",
        low=1, high=2**20,
    )
    validation_clips: int = setting(
        32, "number of clips of each kind in the validation set; the clips and their masks never change", low=1, high=MAX_CLIPS
    )


@dataclass
class OptimizationSettings:
    max_steps: int = setting(1000, "optimizer steps of the whole run", low=1, high=MAX_STEPS)
    max_minutes: float | None = setting(
        None, "end after this many minutes of steps, with the schedule of lr compressed to fit; null: end after max_steps", above=0
    )
    batch_size: int | None = setting(
        16, "clips in an optimizer step, over all processes and micro-batches; null: see tokens_per_batch", low=1, high=MAX_CLIPS
    )
    tokens_per_batch: int | None = setting(
        None,
        "codes in an optimizer step, without text: exact on average, and in each step to within a clip; needs batch_size null",
        low=1, high=MAX_TOKENS,
    )
    micro_batch_size: int | None = setting(
        None, "clips in one forward pass of one process; null: all clips at once", low=1, high=MAX_CLIPS
    )
    optimizer: str = setting(
        "adamw",
        "adamw (published); or muon for the matrices of the layers and AdamW for the rest, which needs ZeRO 0 or no DeepSpeed",
        choices=("adamw", "muon"),
    )
    lr: float = setting(1e-3, "peak learning rate (published: 2.5e-5 to 1e-4)", low=0)
    min_lr: float = setting(0.0, "learning rate at the end of the schedule (published: equal to lr)", low=0)
    warmup_steps: int = setting(100, "steps of linear warm-up", low=0, high=MAX_STEPS)
    schedule: str = setting(
        "cosine", "shape of the schedule after the warm-up (published: constant)", choices=("constant", "cosine", "wsd")
    )
    decay_steps: int | None = setting(
        None, "steps of the final linear decay of wsd; null: a fifth of max_steps", low=1, high=MAX_STEPS,
    )
    weight_decay: float = setting(0.1, "decoupled weight decay of AdamW (published 0.1)", low=0)
    decay_parameters: str = setting("matrices", "which parameters have weight decay (published: all)", choices=("matrices", "all"))
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW betas (published 0.9, 0.95)", low=0, high=1)
    eps: float = setting(1e-8, "AdamW epsilon (published 1e-8)", low=0)
    clip_grad: float = setting(1.0, "largest gradient norm; 0: no clipping (published 4)", low=0)
    seed: int = setting(0, "seed of weights, data, masks and text dropout", low=0)
    ema_decay: float = setting(
        0.0, "decay of the averaged weights, which are then exported; 0: no averaged weights (published: none)", low=0, high=1
    )
    precision: str = setting(
        "auto",
        "number format of the computation; auto: fp32 on CPU, bf16 on CUDA (published: bf16)",
        choices=("auto", "fp32", "bf16"),
    )
    device: str = setting(
        "auto", "auto (CUDA if there is a GPU, else the CPU), cpu, cuda, mps", choices=("auto", "cpu", "cuda", "mps")
    )
    attention: str | None = setting(None, "attention implementation of the run; null: that of the model's config")
    compile: bool = setting(False, "torch.compile for norms and MLPs; the first steps wait for the compiler")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass to save memory (published: on)")
    skip_not_finite: int = setting(
        0, "largest number of updates that the run skips because the loss or gradient is not finite; one more stops the run",
        low=0, high=MAX_STEPS,
    )
    output_dir: str | None = setting(None, "folder for checkpoints, log and export; default: runs/<name>")
    log_every: int = setting(10, "steps between log lines; each line has the means since the previous line", low=1, high=MAX_STEPS)
    eval_every: int = setting(0, "steps between validation losses; 0: never", low=0, high=MAX_STEPS)
    save_every_steps: int = setting(
        0, "steps between checkpoints; 0: none by steps (published 1000 to 3000)", low=0, high=MAX_STEPS
    )
    save_every_minutes: float = setting(10.0, "minutes between checkpoints; 0: none by time", low=0)
    keep_last: int = setting(2, "number of newest complete checkpoints to keep (published 20)", low=1, high=MAX_STEPS)
    keep_every: int = setting(
        0, "also keep checkpoints whose step is a multiple of this number, itself a multiple of save_every_steps; 0: none",
        low=0, high=MAX_STEPS,
    )
    export_every_save: bool = setting(False, "write the exported model at each checkpoint, not only at the end")
    export_dtype: str = setting("float32", "number format of exported weights", choices=("float32", "float16", "bfloat16"))


@dataclass
class SampleSettings:
    every: int = setting(
        0, "steps between sample clips, which are generated with the weights of that step; 0: never", low=0, high=MAX_STEPS
    )
    prompts: list[str] = setting([], "prompts of the samples, one clip each")
    seed: int = setting(0, "seed of the first sample; each further sample adds 1", low=0)
    options: dict[str, Any] = setting({}, "sampling options of the samples that differ from the section generation")
    max_seconds: float = setting(
        120.0, "seconds for all samples of a step, for which all processes wait; clips that are unfinished then are left out",
        low=1, high=1200,
    )


@dataclass
class LoggingSettings:
    to: list[str] = setting([], "dashboards that show the run, beside log.jsonl", choices=("tensorboard", "wandb", "trackio"))
    project: str = setting("lumos", "name of the project in wandb and trackio")
    peak_tflops: float | None = setting(
        None,
        "peak speed of one device in TFLOP/s, of which mfu (model FLOPs utilization) is the used share; null: the data sheet's "
        "for known GPUs in bf16, else measured with a matrix product at the start",
        low=1e-6,
        high=1e9,
    )


@dataclass
class DeepSpeedSettings:
    zero_stage: int | None = setting(
        None,
        "ZeRO stage; null: no DeepSpeed with one process, stage 2 with several (published: full sharding, as stage 3)",
        low=0,
        high=3,
    )
    config: str | None = setting(None, "JSON file with further DeepSpeed options, for example for offloading or bucket sizes")
    timeout_minutes: float = setting(
        30.0, "minutes that processes wait for a process that died or hangs, before they end with an error", high=1e6
    )

    def file_options(self) -> dict[str, Any]:
        """Return the content of the JSON file, {} without a file; raise UserError if it cannot be used."""
        if self.config is None:
            return {}
        options = read_json(self.config, "options of DeepSpeed (deepspeed.config)", MAX_YAML_LENGTH)
        zero = options.get("zero_optimization", {}) if isinstance(options, dict) else None
        if not isinstance(zero, dict):
            raise UserError(f"deepspeed.config {self.config} must hold keys with values, and so must its zero_optimization")
        if type(stage := zero.get("stage", DEFAULT_STAGE)) is not int or not 0 <= stage <= 3:
            raise UserError(f"deepspeed.config {self.config} has the stage {shown(stage)}; allowed: 0, 1, 2, 3")
        return options


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
            usual = 0 if self.training.optimizer == "muon" else DEFAULT_STAGE
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
    raw = read_yaml(path, overrides or [], RECIPES)
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
            raise UserError(f"{name}: unknown key {as_text(unknown[0])}; allowed: {', '.join(settings.sampling.declared())}")
        settings.sampling(**options)
    if samples.every and not samples.prompts:
        raise UserError(f"samples.every is {samples.every}, but samples.prompts is empty; give at least one prompt")
    if empty := [prompt for prompt in samples.prompts if not prompt.strip()]:
        raise UserError(f"samples.prompts holds the empty prompt {shown(empty[0])}; say in words what the clip shows")
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


CHECKS = (check_sampling, check_logging, check_data, check_stages, check_optimization, check_deepspeed, check_model)


def check_named_shares(name: str, shares: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raise UserError unless the setting `name` holds shares from 0 by allowed names, with a sum above 0."""
    for key, share in shares.items():
        if key not in allowed:
            raise UserError(f"{name}.{shown(key)} is unknown; allowed: {', '.join(allowed)}")
        if not is_number(share) or not 0 <= share <= 1e6:
            raise UserError(f"{name}.{key} {shown(share)} is not allowed; give a share from 0")
    if not sum(shares.values()) > 0:
        raise UserError(f"{name} {shown(shares)} has no share above 0; give at least one, such as {allowed[0]}: 1")
