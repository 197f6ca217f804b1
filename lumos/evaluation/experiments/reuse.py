"""Trainings that several studies share: one with the same settings is done once, and its result is copied."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from lumos.errors import UserError
from lumos.files import read_text, replacing_folder, write_bytes
from lumos.settings import to_plain
from lumos.training.settings import load_settings

LOG, EXPORT = "log.jsonl", "export"
"""What an experiment reads of a training."""


def settings_key(command: tuple[str, ...]) -> str | None:
    """Return a hash of the settings of a `train` command, the folder of its results aside; None for other commands.

    Two commands that say the same in other words have one key. None also for settings that `train` will refuse.
    """
    if command[:2] != ("train", "--config"):
        return None
    try:
        settings = to_plain(load_settings(command[2], list(command[3:])))
    except UserError:
        return None
    del settings["training"]["output_dir"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def key_file(folder: Path) -> Path:
    """Return the file beside the folder of a training that holds the key of its settings."""
    return folder.with_name(f"{folder.name}.key")


def mark(folder: Path, key: str | None) -> None:
    """Write the key of a training that is done."""
    if key is not None:
        write_bytes(key_file(folder), key.encode())


def copy_trained(key: str | None, folder: Path, studies: Path) -> Path | None:
    """Copy the log and the model of a training with this key to `folder`; return where they are from, or None if there is none.

    studies: the folder with a folder for each study, which has one for each run.
    """
    for file in sorted(studies.glob("*/*/*.key")) if key is not None else ():
        trained = file.with_suffix("")
        whole = trained != folder and (trained / EXPORT / "config.json").is_file() and (trained / LOG).is_file()
        if whole and read_text(file, "the key of a training") == key:
            with replacing_folder(folder) as writing:
                shutil.copytree(trained / EXPORT, writing / EXPORT)
                shutil.copy2(trained / LOG, writing / LOG)
            return trained
    return None
