"""The sections that the settings of every training have in common, see `lumos.training.settings`.

Each setting has a one-line meaning, with the published value where there is one. In this module, "published" means the published
training of Lumos-1; other values of a generator are in its recipes and among its own settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumos.errors import UserError, shown
from lumos.files import MAX_YAML_LENGTH, read_json
from lumos.settings import setting

MAX_STEPS = 10**9
MAX_CLIPS = 2**17
"""The most clips in an optimizer step, for which the loop reserves host memory, and in a validation set."""
MAX_TOKENS = 2**31
MAX_SIDE = 2**14
MAX_FRAMES = 2**14
MAX_PROCESSES = 256
"""Largest number of threads or processes that make batches on one machine."""
MAX_TRAINING_SEED = 2**32 - 1
"""The largest seed of a training. Torch reads 32 bits of a seed when it draws weights: larger seeds would repeat smaller ones."""
DEFAULT_STAGE = 2
"""ZeRO stage of a run with several processes whose settings name no stage. With optimizers of `WHOLE_MATRICES`, it is 0."""
WHOLE_MATRICES = ("muon", "adafactor")
"""The optimizers that need whole matrices, which ZeRO 1 to 3 divide."""


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
        "first frames of each clip that a short video step trains on, in less time; as many as a clip may have. In Lumos-1, no "
        "frame sees later frames, and text and header still describe the whole clip, so these frames are trained as in a whole "
        "clip; in STIV, they are a clip of their own; null: no short steps",
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
        None, "end this many minutes after the first step began, with lr compressed to fit; null: end after max_steps", above=0
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
        "adamw (published); muon for the matrices of the layers and AdamW for the rest; or adafactor (torch's), which keeps "
        "rows and columns in place of moments; STIV was trained with AdaFactor. muon and adafactor need ZeRO 0 or no DeepSpeed",
        choices=("adamw", *WHOLE_MATRICES),
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
    weight_decay: float = setting(0.1, "decoupled weight decay, times lr (published 0.1)", low=0)
    decay_parameters: str = setting("matrices", "which parameters have weight decay (published: all)", choices=("matrices", "all"))
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW betas (published 0.9, 0.95); adafactor has none", low=0, high=1)
    eps: float = setting(1e-8, "AdamW epsilon (published 1e-8), or epsilon 1 of adafactor", low=0)
    clip_grad: float = setting(1.0, "largest gradient norm; 0: no clipping (published 4)", low=0)
    seed: int = setting(0, "seed of weights, data, masks and text dropout", low=0, high=MAX_TRAINING_SEED)
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
