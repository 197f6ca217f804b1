"""Decisions of `compress auto`: the number of units that stay for a wanted speed, and the settings of the recovery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lumos.compression.networks import Network
from lumos.compression.plans import Plan
from lumos.compression.pruning import Predicted, predict
from lumos.errors import UserError
from lumos.training.record import USUAL_LR
from lumos.training.settings import training_settings_of

KEPT_SETTINGS = (
    "batch_size", "tokens_per_batch", "micro_batch_size", "optimizer", "weight_decay", "decay_parameters", "betas", "eps",
    "clip_grad", "ema_decay", "precision", "attention",
)  # fmt: skip
"""Settings of the section training that the recovery has in common with the parent's training."""
NOT_OF_RECOVERY = ("name", "generator", "model", "lora", "tokenizer", "data", "training", "deepspeed", "logging", "samples", "init")
"""Sections of the parent's settings that the recovery does not take over as they are."""
LARGEST_CRITIC_LR = 1e-3


def least_pruning(network: Network, target: float, plan_of: Callable[[int], Plan]) -> tuple[Plan, Predicted, float]:
    """Return the plan that keeps the most whole layers and makes a clip at least `target` times as fast.

    Also return what it will do, and by how much it divides the FLOPs of a clip, which stand for the seconds.

    plan_of: the plan that keeps a number of layers. The first and the last layer always stay.

    Raises UserError if no number of layers is fast enough.
    """
    whole = network.on_meta()
    count, fastest = len(whole.units()), 1.0
    for keep in range(count - 1, 1, -1):
        plan = plan_of(keep)
        found = predict(network, plan)
        fastest = found.before["flops"] / found.after["flops"]
        if fastest >= target:
            return plan, found, fastest
    raise UserError(
        f"--target-speedup {target:g} cannot be reached: with 2 of {count} layers a clip is {fastest:.2f} x as fast; ask for less"
    )


def recovery_settings(
    network: Network, pruned: Path, data: str, steps: int, output_dir: Path, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of the recovery of a pruned generator: those of its last training, with half of the learning rate.

    Args:
        network: the model that was pruned, which is the teacher.
        pruned: the folder of the student.
        data: "worlds" for synthetic scenes, or a folder of shards.
        steps: the number of training steps.
        output_dir: the folder of the run.
        record: what the model's training.json says; {} if it has none.
    """
    before = record.get("settings", {})
    sections = {name: values for name, values in before.items() if name not in NOT_OF_RECOVERY}
    if data != "worlds":
        sections = training_settings_of(network.generator).for_ingested(sections)
    training = {name: value for name, value in before.get("training", {}).items() if name in KEPT_SETTINGS}
    lr = before.get("training", {}).get("lr", USUAL_LR) / 2
    return {
        "generator": network.generator.name, "name": f"{pruned.parent.name}-recovery", "model": {"from": str(pruned)},
        "distill": {"teacher": str(network.folder), "critic_warmup": min(200, steps // 4),
                    "critic_lr": min(10 * lr, LARGEST_CRITIC_LR)},
        "data": data_settings(network, data, before.get("data", {})),
        **sections,
        "training": {**training, "max_steps": steps, "lr": lr, "min_lr": lr / 10, "schedule": "cosine",
                     "warmup_steps": min(50, steps // 10), "output_dir": str(output_dir)},
    }  # fmt: skip


def data_settings(network: Network, data: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section data of the recovery: clips of the shape that the model makes, of the kinds that it was trained on."""
    clip, source = network.clip, "worlds" if data == "worlds" else "shards"
    found: dict[str, Any] = {"source": source, "num_frames": clip.num_frames}
    if source == "worlds":
        found |= {"height": clip.height, "width": clip.width, "fps": clip.fps}
    else:
        found["path"] = data
    if before.get("source") == source:
        found["options"] = before.get("options", {})
        found["stages"] = [stage | {"steps": None} for stage in before.get("stages", [])[-1:]]
    if clip.num_frames == 1:
        found["stages"] = [{"image_share": 1.0}]
    return found
