"""The finished parts of a long clip in a folder, from which a run that was killed continues.

A pipeline that makes a clip in several runs of its sampler stores what each run has made. The next run
with the same inputs reads these parts in place of making them again, so the clip is bitwise the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumos.errors import NotFinite, UserError
from lumos.files import only_writer, read_json, replacing, write_json
from lumos.locks import LOCK, OWNER

INPUTS, SUFFIX, DIGITS = "inputs.json", ".safetensors", 6


def parts_folder(output: Path) -> Path:
    """Return the folder for the parts of the clip in a file: out.mp4 has out.mp4.parts."""
    return output.with_name(f"{output.name}.parts")


class Parts:
    """The parts that are in a folder, by number."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, number: int) -> dict[int, Tensor] | None:
        """Return the latents [B, ...] of a part by the number of their latent frame, or None if there are none."""
        try:
            stored = load_file(self._file(number))
            return {int(frame): values for frame, values in stored.items()}
        except (OSError, SafetensorError, ValueError):  # a part that is missing or damaged is made again
            return None

    def put(self, number: int, latents: Mapping[int, Tensor]) -> None:
        """Store the latents [B, ...] of a part by the number of their latent frame. RunError if they cannot be written."""
        with replacing(self._file(number)) as temporary:
            save_file({str(frame): values.contiguous().cpu() for frame, values in latents.items()}, temporary)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:0{DIGITS}d}{SUFFIX}"


@contextmanager
def stored_parts(folder: Path, inputs: Mapping[str, Any]) -> Iterator[Parts]:
    """Yield the parts in a folder. They are removed when the block ends.

    They stay if the block is interrupted, or if it fails for a reason such as a full disk or too
    little memory. inputs: everything that decides what the clip shows, as JSON. Parts that were made from
    other inputs are removed at the start. RunError if another process uses the folder.
    """
    told = json.loads(json.dumps(dict(inputs)))
    with removed_if_empty(folder), only_writer(folder, "run that makes this clip"):
        if _inputs_of(folder) != told:
            remove_parts(folder)
            write_json(folder / INPUTS, told)
        try:
            yield Parts(folder)
        except (NotFinite, UserError):
            remove_parts(folder, LOCK, OWNER)
            raise
        remove_parts(folder, LOCK, OWNER)


def remove_parts(folder: Path, *others: str) -> None:
    """Remove the files of `Parts` and `others` from a folder."""
    for file in [*folder.glob("[0-9]" * DIGITS + SUFFIX), folder / INPUTS, *(folder / name for name in others)]:
        file.unlink(missing_ok=True)


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove the folder after the block if it is empty then."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _inputs_of(folder: Path) -> Any:
    try:
        return read_json(folder / INPUTS, "the inputs of a clip")
    except (OSError, ValueError):
        return None


def digest(pictures: Mapping[int, np.ndarray]) -> str:
    """Return a hash of the pictures of given frames by frame number, for `inputs`."""
    found = hashlib.sha256()
    for number, picture in pictures.items():
        found.update(f"{number}/{picture.shape}".encode())
        found.update(np.ascontiguousarray(picture))
    return found.hexdigest()
