"""The targets that networks of diffusers predict from a clip with noise, in one form for all networks.

A noisy clip is x = a x0 + s n, with the noise n, and with a and s that depend on the level of noise:

    objective     a, s                              prediction F       clean clip from F
    flow          1 - s, s                          n - x0             x - s F
    epsilon       sqrt(A), sqrt(1 - A)              n                  (x - s F) / a
    v_prediction  sqrt(A), sqrt(1 - A)              a n - s x0         a x - s F
    edm           1/sqrt(e^2+1), e/sqrt(e^2+1)      a n - s x0         a x - s F

A is alphas_cumprod of the model's scheduler; e is the standard deviation of noise in EDM (arXiv 2206.00364), of which Stable
Video Diffusion reads log(e)/4 as the time. Its preconditioning is v_prediction in other words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lumos.errors import NotFound, UserError, reason_of, shown
from lumos.files import read_json

OBJECTIVES = ("flow", "epsilon", "v_prediction", "edm")
OF_CLASS = {
    "UNetSpatioTemporalConditionModel": "edm",
    "UNet3DConditionModel": "epsilon",
    "CogVideoXTransformer3DModel": "v_prediction",
    "HunyuanVideoTransformer3DModel": "flow",
    "WanTransformer3DModel": "flow",
    "LTXVideoTransformer3DModel": "flow",
}
"""The usual targets of models, by their class in diffusers."""
SCHEDULED = ("epsilon", "v_prediction")
"""Objectives whose levels come from a scheduler."""
TIMES = 1000.0
MEAN, STD = -1.0, 1.0
"""Mean and standard deviation of the logarithm of the noise level of re-noised clips (SF-V, arXiv 2406.04324)."""
SCHEDULER = "scheduler_config.json"


class NoiseLevel(NamedTuple):
    """The levels of noise of B clips, each [B]: factors of the clip and of the noise, and the time that the network reads."""

    alpha: Tensor
    sigma: Tensor
    time: Tensor


@dataclass(frozen=True)
class Objective:
    """The target of the prediction, and the levels of noise.

    kind       one of OBJECTIVES
    shift      of flow: the share of noise u becomes shift u / (1 + (shift - 1) u)
    mean, std  of flow: of the logit of u; of edm: of log e
    kept       [N], alphas_cumprod of the scheduler
    """

    kind: str
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    kept: Tensor | None = None

    def drawn(self, generator: torch.Generator) -> NoiseLevel:
        """Return a random level, three scalars."""
        if self.kept is not None:
            return self._of_step(torch.randint(0, len(self.kept), (), generator=generator))
        normal = self.mean + self.std * torch.randn((), generator=generator)
        if self.kind == "edm":
            return self._of_ratio(normal.exp())
        u = torch.sigmoid(normal)
        return self._of_share(self.shift * u / (1 + (self.shift - 1) * u))

    def at(self, time: Tensor) -> NoiseLevel:
        """Return the levels at which the network reads these times, [B]."""
        if self.kept is not None:
            return self._of_step(time.long())
        return self._of_share(time.float() / TIMES) if self.kind == "flow" else self._of_ratio((4 * time.float()).exp())

    def near(self, left: Tensor) -> NoiseLevel:
        """Return the levels (of a scheduler: the nearest) at which the noise is 1 / left - 1 times as strong as the clip.

        left: [B], between 0 and 1.
        """
        if self.kept is None:
            return self._of_share(1 - left) if self.kind == "flow" else self._of_ratio(1 / left - 1)
        kept = self.kept.to(left.device)
        ratios = ((1 - kept) / kept).sqrt().log()
        return self._of_step((ratios[None] - (1 / left - 1).log()[:, None]).abs().argmin(dim=1))

    def _of_step(self, step: Tensor) -> NoiseLevel:
        kept = self.kept.to(step.device)[step]
        return NoiseLevel(kept.sqrt(), (1 - kept).sqrt(), step)

    @staticmethod
    def _of_share(share: Tensor) -> NoiseLevel:
        return NoiseLevel(1 - share, share, TIMES * share)

    @staticmethod
    def _of_ratio(ratio: Tensor) -> NoiseLevel:
        alpha = (ratio.square() + 1).rsqrt()
        return NoiseLevel(alpha, ratio * alpha, ratio.log() / 4)

    def target(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """Return what the network should predict, [B, C, T, h, w] as the clips."""
        if self.kind == "flow":
            return noise - clean
        return noise if self.kind == "epsilon" else wide(level.alpha) * noise - wide(level.sigma) * clean

    def clean(self, noisy: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        """Return the clean clips that follow from a prediction for noisy ones."""
        alpha, sigma = wide(level.alpha), wide(level.sigma)
        if self.kind == "flow":
            return noisy - sigma * prediction
        return (noisy - sigma * prediction) / alpha if self.kind == "epsilon" else alpha * noisy - sigma * prediction


def with_noise(clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Return a x0 + s n for clips x0 [B, C, T, h, w]."""
    return wide(level.alpha) * clean + wide(level.sigma) * noise


def wide(values: Tensor) -> Tensor:
    """Return values [B] as [B, 1, 1, 1, 1]."""
    return values[:, None, None, None, None]


def read_schedule(folder: str | Path) -> Tensor:
    """Return alphas_cumprod of the scheduler in a folder, float32 [N]. Raises NotFound, and UserError for one without such."""
    import diffusers

    path = Path(folder) / SCHEDULER
    if not path.is_file():
        raise NotFound(f"there is no {path}; set noise.scheduler to the folder of the pipeline's scheduler")
    config = read_json(path, "the config of a scheduler")
    name = config.get("_class_name") if isinstance(config, dict) else None
    scheduler_class = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise UserError(f"{path} is of the class {shown(name)}, which diffusers lacks")
    try:
        kept = scheduler_class.from_config(config).alphas_cumprod
    except Exception as error:  # of many kinds: the classes of diffusers check little themselves
        raise UserError(f"{path} makes no schedule of alphas_cumprod: {reason_of(error)}") from error
    return torch.as_tensor(kept, dtype=torch.float32)
