"""compression.json, which stands beside the weights of a pruned model and says where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lumos.errors import UserError, shown
from lumos.files import read_json
from lumos.settings import is_whole

RECORD = "compression.json"


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return what a folder's compression.json says; {} if it has none. Raises UserError if it is damaged."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    found = read_json(path, "the record of a pruned model")
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds {shown(found)}, not an object of fields; prune the model again")
    return found


def kept_of(record: dict[str, Any], sha256: str) -> Any:
    """Return the entry `kept` of a record, as blocks of the teacher with this hash.

    A model that was pruned twice has the record of its parent under "earlier". If the teacher is the parent's parent, its blocks
    follow from both records. A teacher that no record names counts as the parent, for example one that was trained further.
    """
    kept, later = record.get("kept", []), record
    while later.get("sha256") != sha256 and isinstance(earlier := later.get("earlier"), dict) and "kept" in earlier:
        try:
            kept, later = [earlier["kept"][i] for i in kept], earlier
        except (IndexError, TypeError):
            break
    return kept if later.get("sha256") == sha256 else record.get("kept", [])


def kept_blocks(folder: str | None, stated: Sequence[int], student: int, teacher: int, sha256: str) -> list[int]:
    """Return the block of the teacher for each block of a student, strictly ascending.

    They are those stated by distill.kept, those of the student's compression.json, or all if both networks have equally many.

    Args:
        folder: the student's folder; None if it was made from random weights.
        stated: the setting distill.kept.
        student, teacher: numbers of blocks.
        sha256: the hash of the teacher's config and weights.

    Raises UserError if nothing says them, or if they do not fit.
    """
    where, kept = "distill.kept", list(stated)
    if not kept and folder is not None:
        where, kept = str(Path(folder) / RECORD), kept_of(read_record(folder), sha256)
    if not kept and student == teacher:
        return list(range(student))
    if not kept:
        raise UserError(
            f"nothing says from which of the teacher's {teacher} layers the student's {student} came: the student has no "
            f"{RECORD}; set distill.kept to {student} numbers, such as [0, 2, 5], or distill.icd=0 and no distill.motion=difference"
        )
    whole = isinstance(kept, list) and all(is_whole(i) and 0 <= i < teacher for i in kept)
    if not whole or len(kept) != student or any(a >= b for a, b in pairwise(kept)):
        raise UserError(
            f"{where} {shown(kept)} does not fit; it must be {student} ascending numbers, one for each layer of the student, "
            f"from 0 to {teacher - 1}, the teacher's last layer"
        )
    return kept
