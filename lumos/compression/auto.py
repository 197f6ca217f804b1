"""What `compress auto` decides: how many units stay for a wanted speed, how the model is recovered, and which stages are done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lumos.compression.networks import Network
from lumos.compression.plans import Plan
from lumos.compression.pruning import Predicted, predict
from lumos.errors import UserError
from lumos.files import read_json, write_json
from lumos.settings import differences, is_number

KEPT_SETTINGS = (
    "batch_size", "tokens_per_batch", "micro_batch_size", "optimizer", "weight_decay", "decay_parameters", "betas", "eps",
    "clip_grad", "ema_decay", "precision", "attention",
)  # fmt: skip
"""Settings of the section training that the recovery has in common with the parent's training."""
NOT_OF_RECOVERY = ("name", "generator", "model", "lora", "tokenizer", "data", "training", "deepspeed", "logging", "samples", "init")
"""Sections of the parent's settings that the recovery does not take over as they are."""
USUAL_LR = 1e-3
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


def training_record(folder: Path) -> dict[str, Any]:
    """Return what the training.json of a model folder says; {} if it has none. Raises UserError if it is damaged."""
    path = folder / "training.json"
    if not path.is_file():
        return {}
    found = read_json(path, "the record of a training")
    settings = found.get("settings", {}) if isinstance(found, dict) else None
    sections = [settings.get(name, {}) for name in ("data", "training")] if isinstance(settings, dict) else [None]
    if not all(isinstance(section, dict) for section in sections) or not is_number(sections[1].get("lr", USUAL_LR)):
        raise UserError(f"{path} is damaged: its settings are not those of a training; copy the model again, or remove the file")
    return found


class Stages:
    """The stages of a run in a folder. stages.json in it says from which inputs each one was made.

    A stage whose result exists is not repeated. It must have been made from the same inputs.
    """

    def __init__(self, folder: Path):
        self.file = folder / "stages.json"
        self.inputs = read_json(self.file, "the stages of `compress auto`") if self.file.is_file() else {}
        if not isinstance(self.inputs, dict):
            raise UserError(f"{self.file} is damaged; delete {folder}, or name another --out")

    def run(self, name: str, result: Path, inputs: Mapping[str, Any], make: Callable[[], object]) -> bool:
        """Make the result of a stage unless it exists; return whether it was made now. `inputs` are JSON values.

        Raises UserError if the result exists and was made from other inputs.
        """
        inputs, before = json.loads(json.dumps(inputs)), self.inputs.get(name)
        if result.exists():
            if before == inputs:
                return False
            changes = "nothing says from which inputs" if before is None else "; ".join(differences(before, inputs)[:2])
            raise UserError(f"{result} was made from other inputs ({changes}); delete it, or name another --out")
        self.inputs[name] = inputs
        write_json(self.file, self.inputs)
        make()
        return True
