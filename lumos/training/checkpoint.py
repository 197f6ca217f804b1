"""Checkpoints that are complete or invisible.

    <output_dir>/checkpoints/step-00000200/
        rank-0000.safetensors    weights, optimizer, averaged weights, random state of one process
        state.json               step, settings, meters, and size and CRC-32 of every other file: written last
        deepspeed/               DeepSpeed's own files, only with DeepSpeed

A folder is written under a hidden name and renamed when it is whole, so a kill at any moment leaves the older ones
untouched.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lumos.errors import RunError, UserError

FORMAT = 1
STATE = "state.json"


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Renamed, so once complete, checkpoints; oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())


def writing_folder(root: Path, step: int) -> Path:
    return root / f".writing-{step:08d}"


def begin(root: Path, step: int) -> Path:
    """Make that folder, empty, and remove what killed runs left behind. Call on one process only."""
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(".writing-*"):
        shutil.rmtree(left_over)
    folder = writing_folder(root, step)
    folder.mkdir()
    return folder


def save_tensors(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """One process's tensors. Views are copied, because safetensors stores no shared memory."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        whole[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    save_file(whole, tensor_file(folder, rank))


def load_tensors(folder: Path, rank: int) -> dict[str, Tensor]:
    return load_file(tensor_file(folder, rank))


def tensor_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.safetensors"


def finish(root: Path, folder: Path, step: int, state: dict[str, Any], keep_last: int) -> Path:
    """Write state.json, make the folder visible, remove all but the newest `keep_last`. Call when every process has written."""
    files = {str(p.relative_to(folder)): [p.stat().st_size, crc32(p)] for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in files:
        _sync(folder / name)
    path = folder / STATE
    path.write_text(json.dumps({"format": FORMAT, "step": step, **state, "files": files}, indent=1), encoding="utf-8")
    _sync(path)
    target = checkpoint_folder(root, step)
    if target.exists():
        shutil.rmtree(target)
    os.replace(folder, target)
    _sync(root)
    for old in list_checkpoints(root)[:-keep_last]:
        shutil.rmtree(old)
    return target


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all there and undamaged; RunError says which one is not."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version, files = state["format"], state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"checkpoint {folder}: {STATE} cannot be read ({error})") from error
    if version != FORMAT:
        raise RunError(f"checkpoint {folder} has format {version}; this version reads {FORMAT}")
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"checkpoint {folder}: {name} is missing")
        if path.stat().st_size != size:
            raise RunError(f"checkpoint {folder}: {name} has {path.stat().st_size} bytes instead of {size}")
        if crc32(path) != checksum:
            raise RunError(f"checkpoint {folder}: {name} is damaged (its checksum differs)")
    return state


def latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state, None if there is none at all.

    A damaged one is passed over with a warning on stderr. RunError if all are damaged, because starting anew would
    hide the loss.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        try:
            return folder, read_state(folder)
        except RunError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    if folders:
        raise RunError(f"no checkpoint in {root} can be read; move the folder away to start from the beginning")
    return None


def check_fits(folder: Path, state: dict[str, Any], *, identity: dict[str, Any], engine: str, world: int, max_steps: int) -> None:
    """UserError, with the remedy, if a checkpoint is of another model or other data, another engine or a longer run."""
    remedy = f"name another training.output_dir, or move {folder.parent} away to start over"
    now, before = json.loads(json.dumps(identity)), state["identity"]
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            raise UserError(f"{folder} is of another run: {key} was {before.get(key)}, now {now.get(key)}; {remedy}")
    for key, value in (("engine", engine), ("world", world)):
        if state[key] != value:
            raise UserError(
                f"{folder} was written with {key} {state[key]}, this run has {value}; start it the same way, or {remedy}"
            )
    if state["step"] > max_steps:
        raise UserError(f"{folder} is past training.max_steps {max_steps}; raise it, or {remedy}")


def random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    """Have the disk hold it before anything is renamed; a folder's names too, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)
