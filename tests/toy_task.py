"""A small task for tests of the training loop: flow matching over points of a circle, with a critic as the second network.

It shows that the training loop knows no model. Tests add the name of this module to `registry.PACKAGES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lumos.data.curriculum import StepShape
from lumos.data.seeding import sample_generator
from lumos.files import replacing_folder, write_json
from lumos.registry import Generator
from lumos.settings import setting, to_plain
from lumos.training import checkpoint
from lumos.training.settings import CHECKS, TrainingSettings, check_model
from lumos.training.task import Batch, TrainingTask

CHANNELS, LONGEST, TIMES = 2, 6, 4

GENERATOR = Generator(
    name="toy", summary="flow matching over points of a circle", model_types=("toy",), config="toy_task:NoConfig",
    model="toy_task:Velocity", pipeline="", task="toy_task:ToyTask", settings="toy_task:ToySettings",
    sampling="lumos.pipeline.options:SamplingOptions", cost={},
)  # fmt: skip


class NoConfig:
    """The configuration of a model without presets."""

    @staticmethod
    def presets() -> list[str]:
        return []


@dataclass
class CriticSettings:
    weight: float = setting(0.1, "of the critic in the losses of the velocity; 0: no critic", low=0)
    lr: float = setting(2e-3, "peak learning rate of the critic", low=0)


@dataclass
class ToySettings(TrainingSettings):
    critic: CriticSettings = setting(CriticSettings, "the second network")

    def check(self) -> None:
        for check in CHECKS:
            if check is not check_model:
                check(self)


class Velocity(nn.Module):
    """(x [B, L, C], time [B]) -> velocity [B, L, C]."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(CHANNELS + 1, width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, CHANNELS))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        known = torch.cat([x, time[:, None, None].expand(*x.shape[:2], 1)], dim=-1)
        return self.layers(known.to(self.layers[0].weight.dtype))


class Critic(nn.Module):
    """x [B, L, C] -> scores [B, L], high for points that look real."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(CHANNELS, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype))[..., 0]


class ToySource:
    """Rows of 1 to LONGEST latents, which lie on a circle."""

    most_codes: Mapping[str, int] = {}

    def clips_in(self, shape: StepShape) -> int:
        return shape.batch_size


class ToyTask(TrainingTask):
    """Return losses of each latent: squared error of the velocity, and the critic's score of the point to which it leads."""

    def __init__(self, settings: ToySettings, device: torch.device):
        self.settings, self.device = settings, device
        self.loss_groups, self.source = {"time": TIMES}, ToySource()
        self.critic: nn.Module | None = None

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.settings.training.seed)
        return Velocity().train()

    def build_auxiliary(self) -> nn.Module | None:
        torch.manual_seed(self.settings.training.seed + 1)
        self.critic = Critic().train() if self.settings.critic.weight else None
        return self.critic

    def auxiliary_optimization(self) -> dict[str, Any]:
        return {"lr": self.settings.critic.lr, "betas": (0.5, 0.9), "schedule": "constant", "min_lr": 0.0, "weight_decay": 0.0}

    def prepare(self, step: int, shape: StepShape, positions: range, *, dropout: bool = True) -> Batch:
        rows: dict[str, list[Tensor]] = {"latents": [], "noise": [], "time": [], "counts": []}
        for position in positions:
            generator = sample_generator(self.settings.training.seed, step, position, "toy")
            angles = torch.rand(LONGEST, generator=generator) * 2 * math.pi
            length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
            rows["latents"].append(torch.stack([angles.cos(), angles.sin()], dim=1))
            rows["noise"].append(torch.randn(LONGEST, CHANNELS, generator=generator))
            rows["time"].append(torch.rand((), generator=generator))
            rows["counts"].append(torch.arange(LONGEST) < length)
        tensors = {name: torch.stack(values) for name, values in rows.items()}
        lengths = [int(row.sum()) for row in rows["counts"]]
        names = [f"toy {step}/{position}" for position in positions]
        return Batch(
            step, shape.kind, tensors, names, lengths, flops=1000.0 * sum(lengths), supervised=sum(lengths),
            padded=("latents", "noise", "counts"), idle={"counts": False},
        )  # fmt: skip

    def encode(self, prepared: Batch) -> Batch:
        prepared.tensors.update({name: tensor.to(self.device) for name, tensor in prepared.tensors.items()})
        return prepared

    def losses(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, end = self._drawn(model, micro)
        losses = (velocity - (micro["latents"] - micro["noise"])).square().mean(dim=-1)
        if self.critic is not None:
            losses = losses + self.settings.critic.weight * nn.functional.softplus(-self.critic(end))
        places = (micro["time"] * TIMES).long().clamp(max=TIMES - 1)[:, None].expand_as(losses)
        return losses[micro["counts"]], {"time": places[micro["counts"]]}

    def auxiliary_losses(self, model: nn.Module, auxiliary: nn.Module, micro: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            _, end = self._drawn(model, micro)
        both = nn.functional.softplus(auxiliary(end)) + nn.functional.softplus(-auxiliary(micro["latents"]))
        counts = micro["counts"]
        means = (both * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        return means[counts.any(dim=1)]

    def _drawn(self, model: nn.Module, micro: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the velocity, and the point to which it leads in one step."""
        time = micro["time"][:, None, None]
        x = (1 - time) * micro["noise"] + time * micro["latents"]
        velocity = model(x, micro["time"])
        return velocity, x + (1 - time) * velocity

    def resume_fingerprint(self) -> dict[str, Any]:
        training = self.settings.training
        return {"generator": "toy", "training.seed": training.seed, "training.batch_size": training.batch_size} | {
            f"critic.{name}": value for name, value in to_plain(self.settings.critic).items()
        }

    def export_metadata(self) -> dict[str, Any]:
        with torch.device("meta"):
            return {"shapes": {name: list(p.shape) for name, p in Velocity().named_parameters()}}

    def export(self, folder: Path, target: Path) -> None:
        state, stored = checkpoint.read_state(folder), checkpoint.Stored(folder)
        kind = checkpoint.AVERAGE if state["averaged"] else checkpoint.WEIGHT
        shapes = {name: torch.Size(shape) for name, shape in state["task"]["shapes"].items()}
        with replacing_folder(target) as writing:
            write_json(writing / "config.json", {"model_type": "toy"})
            weights = {name: stored.read(kind, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}
            save_file(weights, writing / "model.safetensors")
