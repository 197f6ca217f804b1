"""Settings of the training by `finetune`, and the data of the model's earlier training that it repeats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumos.data.ingest.encode import TARGET_SIZES
from lumos.data.shards.remote import is_url
from lumos.errors import as_text
from lumos.pipeline.defaults import ClipDefaults
from lumos.registry import Generator
from lumos.training.settings import training_settings_of

LR, LR_PARAMETERS = 4e-4, 13.6e6
"""A learning rate and the number of parameters of the model for which it is right, the smallest preset; see `usual_lr`."""
LORA_LR = 5.0
"""The factor between the learning rate of adapters and the learning rate of a whole model."""
BATCH_SIZE = 6
NOT_TAKEN_OVER = (
    "name", "generator", "model", "lora", "tokenizer", "data", "training", "deepspeed", "logging", "samples", "generation", "init",
)  # fmt: skip
"""Sections of the settings of the model's earlier training that the fine-tuning does not take over."""
STORED = {"F16": "float16", "BF16": "bfloat16"}


def clip_size(clip: ClipDefaults) -> str:
    """Return the size at which clips are ingested for a model: the name of its buckets, or HEIGHTxWIDTH."""
    names = {side: name for name, side in TARGET_SIZES.items()}
    return names.get(clip.target_size, f"{clip.height}x{clip.width}")


def usual_lr(parameters: int, lora: bool) -> float:
    """Return a learning rate: 4e-4 for the smallest preset, and less by the square root of the size of larger models.

    For the presets of 0.5 to 3.6 B parameters it is 6.6e-5 to 2.5e-5; published for Lumos-1 are 1e-4 to 2.5e-5.
    """
    lr = LR * min(1.0, math.sqrt(LR_PARAMETERS / parameters)) * (LORA_LR if lora else 1.0)
    return float(f"{lr:.2g}")


def own_data(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the sources of a model's own training, as in data.replay with shares of sum 1, and the folders that are gone.

    record: the content of the model's training.json, {} if it has none. The list is empty if no source is known.
    """
    data = record.get("settings", {}).get("data", {})
    replays = data.get("replay") or []
    rest = 1.0 - sum(replay["share"] for replay in replays)
    sources = [{"share": rest, **{name: data.get(name) for name in ("source", "path", "options")}}, *replays] if data else []
    found, gone = [], []
    for source in sources:
        if source["source"] == "worlds":
            found.append({"share": source["share"], "source": "worlds", "options": source["options"] or {}})
        elif not isinstance(source["path"], str):  # the record of another program
            gone.append(f"the source {as_text(source['source'])}")
        elif is_url(source["path"]) or Path(source["path"]).is_dir():
            found.append({"share": source["share"], "source": "shards", "path": source["path"]})
        else:
            gone.append(source["path"])
    total = sum(source["share"] for source in found)
    return [source | {"share": source["share"] / total} for source in found], gone


def finetune_settings(
    generator: Generator,
    model: str,
    clip: ClipDefaults,
    record: Mapping[str, Any],
    *,
    shards: Path,
    out: Path,
    steps: int,
    lora: bool,
    replay: float,
    parameters: int,
    dtype: str,
) -> dict[str, Any]:
    """Return the settings of a training of `model` on ingested clips, with the curriculum of the model's own training.

    Args:
        generator: the model's generator.
        model: its folder.
        clip: the shape of its clips.
        record: the content of its training.json; {} if it has none.
        shards: the folder of the clips.
        out: the folder of the run.
        steps: the number of training steps.
        lora: whether adapters are trained, and not the whole model.
        replay: the share of the steps that have the data of the model's own training.
        parameters: the number of the model's parameters.
        dtype: the number format of its file, as safetensors names it.
    """
    before = record.get("settings", {})
    sections = {name: values for name, values in before.items() if name not in NOT_TAKEN_OVER}
    sources = [source | {"share": round(source["share"] * replay, 6)} for source in own_data(record)[0]] if replay else []
    adapters = {"lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05}} if lora else {}
    data = {"source": "shards", "path": str(shards), "num_frames": clip.num_frames, "replay": sources}
    training = {
        "max_steps": steps, "batch_size": BATCH_SIZE, "lr": usual_lr(parameters, lora), "warmup_steps": min(20, steps // 10),
        "schedule": "cosine", "weight_decay": 0.0 if lora else 0.1, "ema_decay": 0.98, "log_every": 20, "save_every_minutes": 2.0,
        "activation_checkpointing": bool(before.get("training", {}).get("activation_checkpointing", False)),
        "export_dtype": "float32" if lora else STORED.get(dtype, "float32"), "output_dir": str(out),
    }  # fmt: skip
    return {
        "generator": generator.name, "name": out.name or "finetune", "model": {"from": model}, **adapters,
        "data": data | {"stages": stages(before.get("data", {}), clip)},
        **training_settings_of(generator).for_ingested(sections, lora), "training": training,
    }  # fmt: skip


def stages(before: Mapping[str, Any], clip: ClipDefaults) -> list[dict[str, Any]]:
    """Return the curriculum: the last stage of the model's own training, with batches of the usual size."""
    if clip.num_frames == 1:
        return [{"image_share": 1.0}]
    last = {name: value for stage in before.get("stages", [])[-1:] for name, value in stage.items()}
    kept = {name: last[name] for name in ("image_share", "first_frames", "short_share") if last.get(name) is not None}
    if not 1 < kept.get("first_frames", 0) < clip.num_frames:
        kept = {name: value for name, value in kept.items() if name == "image_share"}
    return [kept] if any(kept.values()) and kept.get("image_share") != 1 else []
