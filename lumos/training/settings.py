"""The settings of a training run, each with its meaning and, where there is one, the published default.

`load_settings` fills them from one YAML file and `section.key=value` overrides; `describe(TrainingSettings)` of
`yaml_settings` lists them.
"""



from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lumos import registry
from lumos.data.prefetch import check_processes
from lumos.data.shards.remote import is_url
from lumos.errors import UserError, as_text, shown
from lumos.files import MAX_YAML_LENGTH, read_json
from lumos.pipeline.options import SamplingOptions
from lumos.settings import build, read_yaml, setting, to_plain

MAX_STEPS = 10**9
MAX_CLIPS = 2**17
"""The most clips of an optimizer step, whose batches are laid out on the host, and of a validation set."""
MAX_TOKENS = 2**31
MAX_SIDE = 2**14
MAX_FRAMES = 2**14
MAX_PROCESSES = 256
"""Of one machine."""
OF_WORLDS = ("options", "height", "width", "fps", "scenes")
OF_SHARDS = ("size", "shuffle_shards", "cache_dir", "cache_gb", "min_frames")
DEFAULT_STAGE = 2  # of runs with several processes that name none; of Muon, which needs whole matrices, 0


def world_size() -> int:
    """Number of processes that the launcher (deepspeed, torchrun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class ModelSettings:
    preset: str | None = setting(None, "named model shape to start from random weights: tiny, 0.5b, 1b, 3b")
    overrides: dict[str, Any] = setting({}, "fields of the model config that differ from the preset")
    from_: str | None = setting(
        None, "model folder whose weights and config to start from; with a preset too, it must have the preset's shape"
    )


@dataclass
class LoraSettings:
    rank: int | None = setting(
        None, "rank of low-rank adapters (arXiv 2106.09685), which are then all that is trained; null: the whole model is",
        low=1, high=2**16,
    )
    alpha: float = setting(16.0, "adapters are scaled by alpha / rank", low=0)
    dropout: float = setting(0.0, "dropout on what goes into the adapters", low=0, high=1)
    targets: list[str] = setting([], "linear layers of every block that get adapters")


@dataclass
class TokenizerSettings:
    video: str | None = setting(None, "folder of the trained video tokenizer; default: the one inside model.from")
    text: str | None = setting(None, "folder or file of the text tokenizer; default: the one inside model.from")


@dataclass
class StageSettings:
    steps: int | None = setting(
        None, "optimizer steps of this stage; null in the last stage: up to training.max_steps", low=1, high=MAX_STEPS,
    )
    image_share: float = setting(
        0.0, "share of the steps whose batch holds pictures (one-frame clips); published: 1, then 0.5", low=0, high=1
    )
    batch_size: int | None = setting(
        None, "clips in a video step, over all processes; default: as the run has it", low=1, high=MAX_CLIPS,
    )
    image_batch_size: int | None = setting(
        None,
        "pictures in an image step, over all processes; default: batch_size (published: 6 pictures for 1 clip)",
        low=1, high=MAX_CLIPS,
    )
    first_frames: int | None = setting(
        None,
        "frames of its clips that a short video step trains on, 1 + a multiple of the temporal compression; text and header tell "
        "of the whole clip. As no frame sees later ones, they are learned as in whole clips, in less time; null: no short steps",
        low=1, high=MAX_FRAMES,
    )
    short_share: float = setting(1.0, "share of the video steps that are short ones, if first_frames is set", low=0, high=1)


@dataclass
class DataSettings:
    source: str = setting("worlds", "where clips come from: the small worlds, or what ingest wrote", choices=("worlds", "shards"))
    path: str | None = setting(None, "folder of the shards, or its URL (s3://, gs://, hf://, https://, any that fsspec knows)")
    shuffle_shards: int = setting(16, "shards whose clips are shuffled together; so many are in use at a time", low=1, high=10_000)
    cache_dir: str | None = setting(None, "folder for copies of remote shards; default: ~/.cache/lumos/shards")
    cache_gb: float = setting(20.0, "size to which the copies of remote shards may grow, in GB", low=0, high=1e9)
    size: str | None = setting(
        None, "--size with which the shards must have been ingested, for example 256p; null: any. `plan` counts with it"
    )
    options: dict[str, Any] = setting({}, "options of the source, for worlds those of lumos.data.synthetic.render.sample_scene")
    num_frames: int = setting(
        17, "frames of a clip, 1 + a multiple of the tokenizer's temporal compression", low=1, high=MAX_FRAMES,
    )
    min_frames: int | None = setting(
        None, "frames of the shortest clip of shards to use, each as it is; null: num_frames, shorter ones are left out",
        low=2, high=MAX_FRAMES,
    )
    height: int = setting(64, "frame height of worlds in pixels; shards have their own sizes", low=1, high=MAX_SIDE)
    width: int = setting(64, "frame width of worlds in pixels", low=1, high=MAX_SIDE)
    fps: int = setting(8, "frames per second of worlds", low=1, high=1000)
    scenes: int | None = setting(None, "use only this many different worlds, over and over; null: endless", low=1, high=2**31)
    stages: list[StageSettings] = setting([], "curriculum, in order; empty: one stage of video only")
    workers: int = setting(
        1, "threads that make batches ahead of the training step; 0: make each batch when it is needed", low=0, high=MAX_PROCESSES,
    )
    prefetch: int = setting(2, "batches to keep ready; only with workers", low=1, high=1000)
    processes: int = setting(
        0,
        "processes that draw or read clips ahead, for devices that outrun threads; one thread then encodes; 0: none",
        low=0, high=MAX_PROCESSES,
    )
    pad_to: int = setting(
        1, "rows are padded to a multiple of so many tokens: fewer different lengths, for attention or code that is compiled",
        low=1, high=2**20,
    )
    validation_clips: int = setting(32, "clips of the fixed validation set, whose masks are fixed too", low=1, high=MAX_CLIPS)


@dataclass
class OptimizationSettings:
    max_steps: int = setting(1000, "optimizer steps of the whole run", low=1, high=MAX_STEPS)
    max_minutes: float | None = setting(
        None, "end after so many minutes of steps, with the schedule of lr compressed to fit; null: after max_steps", above=0
    )
    batch_size: int | None = setting(
        16, "clips in an optimizer step, over all processes and micro-batches; null: by tokens_per_batch", low=1, high=MAX_CLIPS
    )
    tokens_per_batch: int | None = setting(
        None,
        "codes in an optimizer step, on average and within a clip, text not counted; instead of batch_size, which must be null",
        low=1, high=MAX_TOKENS,
    )
    micro_batch_size: int | None = setting(None, "clips in one forward of one process; null: all at once", low=1, high=MAX_CLIPS)
    optimizer: str = setting(
        "adamw",
        "adamw (published), or muon for the layers' matrices and AdamW for the rest: with ZeRO 0 or without",
        choices=("adamw", "muon"),
    )
    lr: float = setting(1e-3, "peak learning rate (published: 2.5e-5 to 1e-4)", low=0)
    min_lr: float = setting(0.0, "learning rate at the end of the schedule (published: equal to lr)", low=0)
    warmup_steps: int = setting(100, "steps of linear warm-up", low=0, high=MAX_STEPS)
    schedule: str = setting("cosine", "shape after the warm-up (published: constant)", choices=("constant", "cosine", "wsd"))
    decay_steps: int | None = setting(
        None, "steps of the final linear decay of wsd; null: a fifth of max_steps", low=1, high=MAX_STEPS,
    )
    weight_decay: float = setting(0.1, "decoupled weight decay of AdamW (published 0.1)", low=0)
    decay_parameters: str = setting("matrices", "which parameters decay (published: all)", choices=("matrices", "all"))
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW betas (published 0.9, 0.95)", low=0, high=1)
    eps: float = setting(1e-8, "AdamW epsilon (published 1e-8)", low=0)
    clip_grad: float = setting(1.0, "largest gradient norm; 0: no clipping (published 4)", low=0)
    seed: int = setting(0, "seed of weights, data, masks and text dropout", low=0)
    ema_decay: float = setting(
        0.0, "decay of the averaged weights, which are then the exported ones; 0: none (published: none)", low=0, high=1
    )
    precision: str = setting(
        "auto",
        "fp32 or bf16 compute; auto: fp32 on CPU, bf16 on CUDA (published bf16)",
        choices=("auto", "fp32", "bf16"),
    )
    device: str = setting("auto", "auto (CUDA if there is one), cpu, cuda, mps", choices=("auto", "cpu", "cuda", "mps"))
    attention: str | None = setting(None, "attention implementation of the run; null: as the model's config says")
    compile: bool = setting(False, "torch.compile for norms and MLPs; the first steps wait for the compiler")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass to save memory (published: on)")
    skip_not_finite: int = setting(
        0, "updates of the run that may be left out because loss or gradient is not finite; one more stops it",
        low=0, high=MAX_STEPS,
    )
    output_dir: str | None = setting(None, "where checkpoints, log and export go; default runs/<name>")
    log_every: int = setting(10, "steps between log lines, each the mean since the last", low=1, high=MAX_STEPS)
    eval_every: int = setting(0, "steps between validation losses; 0: never", low=0, high=MAX_STEPS)
    save_every_steps: int = setting(0, "steps between checkpoints; 0: not by steps (published 1000 to 3000)", low=0, high=MAX_STEPS)
    save_every_minutes: float = setting(10.0, "minutes between checkpoints; 0: not by time", low=0)
    keep_last: int = setting(2, "newest complete checkpoints to keep (published 20)", low=1, high=MAX_STEPS)
    keep_every: int = setting(
        0, "keep those of every so many steps as well, a multiple of save_every_steps; 0: none", low=0, high=MAX_STEPS,
    )
    export_every_save: bool = setting(False, "write the from_pretrained folder at each checkpoint, not only at the end")
    export_dtype: str = setting("float32", "number format of exported weights", choices=("float32", "float16", "bfloat16"))


@dataclass
class SampleSettings:
    every: int = setting(0, "steps between sample clips, rendered with the weights of that step; 0: never", low=0, high=MAX_STEPS)
    prompts: list[str] = setting([], "what the samples show, a clip each")
    seed: int = setting(0, "seed of the first sample; the next ones count on from it", low=0)
    options: dict[str, Any] = setting({}, "how samples are drawn where it is not as in the section generation")
    max_seconds: float = setting(
        120.0, "rendering ends after so many seconds with the clips done by then; all processes wait", low=1, high=1200
    )


@dataclass
class LoggingSettings:
    to: list[str] = setting([], "where to write beside log.jsonl", choices=("tensorboard", "wandb", "trackio"))
    project: str = setting("lumos", "project of wandb and trackio")
    peak_tflops: float | None = setting(
        None,
        "what one device can do at most, TFLOP/s, as the measure of mfu; null: of the data sheet for known GPUs in bf16, "
        "else measured at the start by a matrix product",
        low=1e-6,
        high=1e9,
    )


@dataclass
class DeepSpeedSettings:
    zero_stage: int | None = setting(
        None,
        "ZeRO stage; null: no DeepSpeed in one process, 2 in several (published: full sharding, as stage 3)",
        low=0,
        high=3,
    )
    config: str | None = setting(None, "JSON file of further DeepSpeed options (offload, buckets, ...)")
    timeout_minutes: float = setting(
        30.0, "how long processes wait for one that died or hangs before they end with an error", high=1e6
    )

    def file_options(self) -> dict[str, Any]:
        """What the JSON file holds; UserError if it cannot be used."""
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
    """All settings of a run. `name` is the config file's stem, and names the default output folder.

    The settings class of a generator inherits from this one: it adds sections, replaces a section by one with more keys, and
    adds to `check`.
    """

    sampling: ClassVar[type[SamplingOptions]] = SamplingOptions
    """The generator's sampling options, which the sections generation and samples.options hold."""

    name: str = setting("train", "name of the run")
    generator: str = setting("lumos1", "kind of model that is trained, see `lumos.registry`")
    model: ModelSettings = setting(ModelSettings, "what is trained")
    lora: LoraSettings = setting(LoraSettings, "fine-tuning by low-rank adapters")
    tokenizer: TokenizerSettings = setting(TokenizerSettings, "the two tokenizers, which are not trained here")
    data: DataSettings = setting(DataSettings, "what it is trained on")
    training: OptimizationSettings = setting(OptimizationSettings, "how it is trained")
    deepspeed: DeepSpeedSettings = setting(DeepSpeedSettings, "how it is spread over processes")
    logging: LoggingSettings = setting(LoggingSettings, "where it can be watched")
    samples: SampleSettings = setting(SampleSettings, "which clips it draws on the way")
    generation: dict[str, Any] = setting({}, "how the exported model samples by default: its sampling options")

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage of the run, or None for plain PyTorch."""
        return self.zero_stage_with(world_size())

    def zero_stage_with(self, processes: int) -> int | None:
        """The same of a run that has so many processes."""
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
        """Plain dicts, lists and numbers with the YAML's key names: `build_settings(s.to_dict())` equals `s`."""
        return to_plain(self)

    def key(self, name: str) -> str:
        """What the user's file calls the setting `section.key`: the same, unless a file is laid out in another way."""
        return name

    def check(self) -> None:
        """UserError for fields that contradict each other."""
        for check in CHECKS:
            check(self)


def load_settings(path: str | Path, overrides: list[str] | None = None) -> TrainingSettings:
    """Read a YAML file and apply overrides such as `training.max_steps=200`, in order.

    Raises UserError for a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    raw = read_yaml(path, overrides or [])
    raw.setdefault("name", Path(path).stem)
    return build_settings(raw)


def build_settings(raw: dict[str, Any]) -> TrainingSettings:
    """Settings of the generator that `raw` names, from nested dicts; UserError as in `load_settings`."""
    settings = build(registry.generator(raw.get("generator")).load("settings"), raw)
    settings.check()
    return settings


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
        raise UserError(f"logging.to names one place twice: {', '.join(settings.logging.to)}")


def check_data(settings: TrainingSettings) -> None:
    data, usual = settings.data, DataSettings()
    if (data.source == "shards") != (data.path is not None):
        raise UserError(f"data.source is {data.source} and data.path is {as_text(data.path)}; shards need a path, worlds have none")
    for name in OF_WORLDS if data.source == "shards" else OF_SHARDS:
        if getattr(data, name) != getattr(usual, name):
            why = ", which was ingested as it is" if data.source == "shards" else ""
            raise UserError(f"data.{name} has no effect with data.source={data.source}{why}; leave it out")
    for name in ("cache_dir", "cache_gb"):
        if getattr(data, name) != getattr(usual, name) and not is_url(data.path):
            raise UserError(f"data.{name} has no effect with the local data.path {as_text(data.path)}; leave it out")
    if (data.min_frames or 0) > data.num_frames:
        raise UserError(f"data.min_frames {data.min_frames} is above data.num_frames {data.num_frames}; it must be at most that")
    check_processes(data.processes)
    if data.processes and data.workers > 1:
        raise UserError(f"data.workers is {data.workers}, but with data.processes one thread encodes what they draw; leave it out")


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
        raise UserError("training.tokens_per_batch has no effect, as every stage has its batch_size; set one of them")
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
