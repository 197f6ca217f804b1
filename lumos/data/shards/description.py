"""The files that describe a folder of shards: `dataset.json` and the report of the last ingest, `report.json`.

`dataset.json` has the video tokenizer and the settings that made the codes of all shards.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lumos.data.shards.remote import Remote
from lumos.errors import RunError, UserError, shown
from lumos.files import parse_json, read_bytes
from tokenizer.fingerprint import tokenizer_facts

FORMAT = 2
DESCRIPTION, REPORT = "dataset.json", "report.json"
SHEET = "sheet.png"
"""Preview of the clips, drawn by the command `inspect`; it is not part of the data."""


def read_description(folder: Path | Remote) -> dict[str, Any]:
    """Return the content of dataset.json: the tokenizer and the settings that made the codes.

    Raise UserError if the folder has no ingested data or another format, and RunError if the file is
    damaged.
    """
    path = folder / DESCRIPTION
    try:
        text = _document(path)
    except (FileNotFoundError, UserError) as error:
        if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, NotADirectoryError):
            raise UserError(
                f"{folder} holds no ingested clips (no {DESCRIPTION}); make them with `python -m lumos ingest`"
            ) from error
        if isinstance(path, Remote):  # for example an unknown protocol
            raise
        raise RunError(f"{path} is damaged ({error}); copy it again from a backup, or ingest into a new folder") from error
    try:
        description = parse_json(text.decode("utf-8"), str(path))
        facts, format_ = description["tokenizer"], description.get("format")
        facts["fingerprint"]
        if not 0 < float(fps := description["settings"]["fps"]) < math.inf:
            raise ValueError(f"settings.fps is {shown(fps)}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); copy it again from a backup, or ingest into a new folder") from error
    if format_ != FORMAT:
        raise UserError(f"{path} has format {shown(format_)}, this version reads {FORMAT}; ingest again")
    for name in ("num_codes", "spatial_compression", "temporal_compression"):
        if not isinstance(value := facts.get(name), int) or value < 1:
            raise RunError(
                f"{path} is damaged ({name} {shown(value)}); copy it again from a backup, or ingest into a new folder"
            )
    return description


def check_tokenizer(description: dict[str, Any], tokenizer: Any, what: str) -> None:
    """Raise UserError if another video tokenizer made the codes; `what` is the name of the setting of `tokenizer`."""
    made, given = description["tokenizer"], tokenizer_facts(tokenizer)
    if made["fingerprint"] != given["fingerprint"]:
        raise UserError(
            f"{what} is another video tokenizer than the one that made the shards ({made.get('folder')}, "
            f"{made['num_codes']} codes; this one has {given['num_codes']}): give that one, or ingest again with this one"
        )


def check_frame_codes(description: dict[str, Any], path: str | Path | Remote, what: str = "latents per_frame") -> None:
    """Raise UserError if the shards have no codes of single frames, which the setting `what` needs."""
    if not description["settings"].get("per_frame_codes"):
        other = "use latents causal" if what == "latents per_frame" else f"leave {what} out"
        raise UserError(
            f"{path} holds the codes of clips only, and {what} need those of single frames: ingest into a new folder "
            f"with --per-frame-codes, or {other}"
        )


def check_size(description: dict[str, Any], size: str | None, path: str | Path) -> None:
    """Raise UserError if the shards were ingested with another --size; with None any size is allowed."""
    made = description["settings"].get("size")
    if size is not None and size != made:
        raise UserError(f"data.size is {size}, but {path} was ingested with --size {made}; use other shards or leave data.size out")


def check_count(folder: Path | Remote, clips: int) -> None:
    """Raise RunError if the shards of a folder have fewer clips than the report of the last ingest counted.

    `clips` is the number of clips of the shards. A folder without a report is not checked.
    """
    path = folder / REPORT
    try:
        report = parse_json(_document(path).decode("utf-8", "replace"), str(path))
    except FileNotFoundError:
        return
    except UserError as error:
        if isinstance(path, Remote):
            raise
        raise RunError(f"{path} is damaged ({error}); delete it and run the same ingest again, which writes it anew") from error
    counted = report.get("clips") if isinstance(report, dict) else None
    if not isinstance(counted, int):
        raise RunError(f"{path} is damaged (it has no count of clips); run the same ingest again, which writes it anew")
    if clips < counted:
        raise RunError(
            f"the shards of {folder} hold {clips} of the {counted} clips that its {REPORT} counts; run the same ingest again, "
            f"which fills the gap, or delete {REPORT} if you removed some shards on purpose"
        )


def _document(path: Path | Remote) -> bytes:
    """Return the bytes of a JSON file of a folder of shards; raise the errors of `read_bytes`."""
    return path.read_bytes() if isinstance(path, Remote) else read_bytes(path, "a file of ingested data")
