"""The settings of recovery by distillation: those of the generator's training, and one more section, `distill`.

The defaults of the section are ours for the decoder of Lumos-1 and the transformer of STIV; a setting names the published
value where there is one (arXiv 2411.18375).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.compression.critic import GROUPS
from lumos.compression.features import chosen_layers
from lumos.errors import UserError
from lumos.registry import Generator
from lumos.settings import setting
from lumos.training import settings as training
from lumos.training.settings import TrainingSettings

MOTIONS = ("adversarial", "difference")


@dataclass
class DistillSettings:
    teacher: str | None = setting(None, "folder of the model that the student learns from, usually the one it was pruned from")
    teacher_precision: str | None = setting(
        None, "number format of the teacher: fp32, bf16 or fp16; null: that of the training. On CPUs with instructions for "
        "bfloat16, bf16 beside a training in fp32 makes the teacher several times as fast", choices=(None, "fp32", "bf16", "fp16"),
    )  # fmt: skip
    task: float = setting(0.1, "weight of the training's own loss on the data (published: 1)", low=0)
    kd: float = setting(
        1.0, "weight of the distance between the outputs of student and teacher (published: none); 0: off", low=0
    )
    icd: float = setting(
        0.1, "weight of the error of features, frame by frame (individual content distillation; published 0.1); 0: off", low=0
    )
    icd_decay: bool = setting(True, "let distill.icd fall linearly to 0 over the run (published: constant)")
    icd_k: float | None = setting(
        2.0, "features beyond this number of standard deviations do not count; null: all count (published: all)", above=0
    )
    icd_raw: bool = setting(False, "the mean squared error summed over layers (published), not the mean of relative errors")
    icd_layers: Any = setting(
        "all", "layers of the student that are compared: all, last, or a number n for every n-th, the last one among them"
    )
    kept: list[int] = setting(
        [], "for each layer of the student, the layer of the teacher it is compared with; empty: as its compression.json says",
        low=0, high=2**16,
    )  # fmt: skip
    mca: float = setting(0.1, "weight of the motion loss (motion content adversarial; published 1); 0: off", low=0)
    motion: str = setting(
        "adversarial",
        "motion loss: adversarial, a critic that is trained along with the student (published); or difference, the relative "
        "error of the change of features from frame to frame",
        choices=MOTIONS,
    )
    generator: str = setting(
        "hinge", "the student's adversarial loss: hinge, -D; or log, softplus(-D)", choices=("hinge", "log")
    )
    gamma: float = setting(0.0, "weight of the gradient penalty R1 of the critic", low=0)
    gamma_interval: int = setting(
        1, "steps from one gradient penalty to the next, whose weight is multiplied by this number (StyleGAN2: 16)",
        low=1, high=10**6,
    )  # fmt: skip
    critic_taps: int = setting(
        4, "blocks in the first half of the teacher behind which heads of the critic stand", low=1, high=64
    )
    critic_width: int = setting(64, f"channels of the critic's heads, a multiple of {GROUPS}", low=GROUPS, high=4096)
    critic_lr: float | None = setting(None, "peak learning rate of the critic; null: 10 times training.lr", above=0)
    critic_warmup: int = setting(200, "steps in which the critic learns before its judgement counts", low=0, high=10**9)

    @property
    def adversarial(self) -> bool:
        """Whether a critic is trained."""
        return self.mca > 0 and self.motion == "adversarial"

    @property
    def compares_features(self) -> bool:
        """Whether features of student and teacher are compared."""
        return self.icd > 0 or (self.mca > 0 and self.motion == "difference")

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss needs the teacher."""
        return max(self.kd, self.icd, self.mca) > 0

    @property
    def k(self) -> float:
        """`icd_k` as a number."""
        return math.inf if self.icd_k is None else self.icd_k

    def layers(self, count: int) -> list[int]:
        """Return which of `count` layers are compared, ascending."""
        return chosen_layers(count, self.icd_layers)


CRITIC = ("generator", "gamma", "gamma_interval", "critic_taps", "critic_width", "critic_lr", "critic_warmup")
"""Settings of the critic."""


def check_distill(settings: Any) -> None:
    """Raise UserError if settings of the section distill cannot work; warn once of those without effect."""
    distill = settings.distill
    usual, only_icd = type(distill)(), distill.mca == 0 or distill.motion != "difference"
    if distill.needs_teacher and distill.teacher is None:
        raise UserError("distill.teacher is missing: name the folder of the model that the student learns from")
    if distill.task == 0 and not distill.needs_teacher:
        raise UserError("distill.task, kd, icd and mca are all 0, so there is nothing to learn; set at least one above 0")
    chosen_layers(1, distill.icd_layers, "distill.icd_layers")
    if distill.critic_width % GROUPS:
        raise UserError(f"distill.critic_width is {distill.critic_width}; it must be a multiple of {GROUPS}")
    if distill.needs_teacher and settings.zero_stage == 3:
        raise UserError("ZeRO 3 cuts the weights into pieces, which distillation cannot compare; set deepspeed.zero_stage=2")
    off = {
        "icd is 0": ("icd_decay", "icd_raw") if distill.icd == 0 else (),
        "no features are compared": ("icd_k", "icd_layers", "kept") if not distill.compares_features else (),
        "icd_raw counts all features": ("icd_k",) if distill.icd > 0 and distill.icd_raw and only_icd else (),
        "mca is 0": ("motion",) if distill.mca == 0 else (),
        "gamma is 0": ("gamma_interval",) if distill.adversarial and distill.gamma == 0 else (),
        "no critic is trained": CRITIC if not distill.adversarial else (),
        "kd, icd and mca are 0": ("teacher", "teacher_precision") if not distill.needs_teacher else (),
    }
    changed = {why: [f"distill.{name}" for name in names if getattr(distill, name) != getattr(usual, name)]
               for why, names in off.items()}  # fmt: skip
    if any(changed.values()):
        reasons = "; ".join(f"{', '.join(names)}, because {why}" for why, names in changed.items() if names)
        warnings.warn(f"without effect: {reasons}")


def settings_of(generator: Generator) -> type[TrainingSettings]:
    """Return the class of a generator's training settings with the section distill."""
    return _with_distill(generator.load("settings"))


@functools.cache
def _with_distill(base: type[TrainingSettings]) -> type[TrainingSettings]:
    def check(settings: Any) -> None:
        base.check(settings)
        check_distill(settings)

    return dataclasses.make_dataclass(
        f"Distillation{base.__name__}",
        [("distill", DistillSettings, setting(DistillSettings, "what the student learns from its teacher"))],
        bases=(base,),
        namespace={"check": check},
    )


def load_settings(path: str | Path, overrides: list[str] | None = None) -> TrainingSettings:
    """Read a YAML file of a generator's training with the section distill, see `lumos.training.settings.load_settings`."""
    return training.load_settings(path, overrides, settings_of)


def build_settings(raw: dict[str, Any]) -> TrainingSettings:
    """Return the settings from nested dicts, see `lumos.training.settings.build_settings`."""
    return training.build_settings(raw, settings_of)
