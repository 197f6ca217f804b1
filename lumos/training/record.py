"""The record of a model's last training, training.json in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumos.errors import UserError
from lumos.files import read_json
from lumos.settings import is_number

USUAL_LR = 1e-3
"""The learning rate of a training whose record does not state it."""


def training_record(folder: Path) -> dict[str, Any]:
    """Return the content of the training.json of a model folder; {} if it has none. Raises UserError if it is damaged."""
    path = folder / "training.json"
    if not path.is_file():
        return {}
    found = read_json(path, "the record of a training")
    settings = found.get("settings", {}) if isinstance(found, dict) else None
    sections = [settings.get(name, {}) for name in ("data", "training")] if isinstance(settings, dict) else [None]
    if not all(isinstance(section, dict) for section in sections) or not is_number(sections[1].get("lr", USUAL_LR)):
        raise UserError(f"{path} is damaged: its settings are not those of a training; copy the model again, or remove the file")
    return found
