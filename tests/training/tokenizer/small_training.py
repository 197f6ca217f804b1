"""The smallest training of a video tokenizer."""

from __future__ import annotations

import json
import os
import signal

from lumos.training.loop import Run
from lumos.training.tokenizer.settings import TokenizerTrainingSettings

MODEL = {
    "channels": 8,
    "channels_mult": [1, 2],
    "num_res_blocks": 1,
    "levels": [5, 5, 4],
    "embedding_dim": 3,
    "z_channels": 8,
    "attn_resolutions": [],
}
SMALL = {
    "model": MODEL,
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "batch_size": 2,
    "pictures_per_batch": 1,
    "share_worlds": 1.0,
    "validation_clips": 2,
    "warmup_steps": 1,
    "log_every": 2,
    "validate_every": 100,
    "lr": 3e-3,
}


def small(output_dir, **changes) -> TokenizerTrainingSettings:
    return TokenizerTrainingSettings.from_dict(SMALL | {"output_dir": str(output_dir), "steps": 6} | changes)


def log_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder) -> list[float]:
    return [line["loss"] for line in log_lines(folder) if "loss" in line and "event" not in line]


def stop_in_step(patch, step: int) -> None:
    """Send SIGTERM during the step of this number (the first is 0), which makes it the last step."""
    train_step = Run._train_step

    def told(run: Run, batch, stop, due):
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, batch, stop or run.step == step, due)

    patch.setattr(Run, "_train_step", told)


def stopped_after(summary: dict) -> int:
    assert (summary["stopped_by"], summary["export"]) == ("SIGTERM", None)
    return summary["steps"]
