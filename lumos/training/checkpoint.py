"""Checkpoints that are complete or invisible, and that any engine can read.

    <output_dir>/checkpoints/step-00000200/
        rank-0000.safetensors    what one process keeps: its runs of each weight, its share of the optimizer, random state
        state.json               step, settings, meters, size and CRC-32 of every other file, and its own CRC-32: written last

A tensor is stored under "kind/name/start": values start, start + 1, ... of the parameter `name` in its flat order. Kinds are
weight, exp_avg, exp_avg_sq (AdamW) and average (EMA), all fp32. Whichever engine and however many processes wrote them,
`Stored` gives any run of any parameter. DeepSpeed's own way to this, ds_to_universal, unpickles, needs DeepSpeed to read,
and knows no averages, no stage 0 and no plain PyTorch.

A folder is written under a hidden name and renamed when it is whole and on the disk, so a kill or a power cut at any moment
leaves the older ones untouched. A checkpoint in which anything does not fit (a checksum, the step that its name says, the list
of its files) is damaged; the next older one is taken.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lumos.durable import make_folder, put_folder, remove, settle
from lumos.errors import RunError, UserError, shown
from lumos.files import read_json
from lumos.settings import to_plain
from lumos.training.settings import StageSettings

FORMAT = 3
"""Checkpoints of format 2 have no checksum of their state; they are still read."""
STATE, CHECKSUM = "state.json", "checksum"
WRITING, REMOVING = ".writing-", ".removing-"
LEFT_OVER = (f"{WRITING}*", f"{REMOVING}*", ".old-step-*")
"""Patterns of what a kill leaves in a save."""
RUN_FIELDS: dict[str, type] = {
    "settings": dict, "identity": dict, "task": dict, "engine": str, "world": int, "updates": int, "skipped": int,
    "averaged": bool, "meter": dict,
}  # fmt: skip
"""What the state of a training run of the decoder holds."""
WEIGHT, AVERAGE = "weight", "average"


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Renamed, so once complete, checkpoints; oldest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir() and _step_in(p.name) is not None), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _step_in(name: str) -> int | None:
    return int(name.removeprefix("step-")) if re.fullmatch(r"step-[0-9]{1,18}", name) else None


def writing_folder(root: Path, step: int) -> Path:
    return root / f"{WRITING}{step:08d}"


def begin(root: Path, step: int) -> Path:
    """Make that folder, empty, and remove what killed runs left behind, file or folder. Call on one process only."""
    make_folder(root)
    for left_over in [path for pattern in LEFT_OVER for path in root.glob(pattern)]:
        remove(left_over)
    folder = writing_folder(root, step)
    folder.mkdir()
    return folder


def save_tensors(folder: Path, rank: int, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Write one process's tensors; returns size and CRC-32 of the file. Views are copied: safetensors stores no shared memory."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        whole[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    path = tensor_file(folder, rank)
    save_file(whole, path)
    settle(path)
    return path.stat().st_size, crc32(path)


def key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


class Stored:
    """The tensors of a checkpoint, joined from the files of the processes that wrote it; reads only what is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = {path.name: safe_open(path, framework="pt") for path in sorted(folder.glob("rank-*.safetensors"))}
        self.parts: dict[tuple[str, str], list[tuple[int, int, Any]]] = defaultdict(list)
        for file in self.files.values():
            for label in file.keys():  # noqa: SIM118
                if label.count("/") == 2:
                    kind, name, start = label.split("/")
                    values = file.get_slice(label)
                    self.parts[kind, name].append((int(start), values.get_shape()[0], values))

    def has(self, kind: str, name: str) -> bool:
        """Whether a parameter has tensors of this kind."""
        return (kind, name) in self.parts

    def read_whole(self, kind: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """All parameters of a kind, by name; RunError unless the checkpoint holds these, whole, and no other value of the kind."""
        sizes = {name: max(begin + length for begin, length, _ in self.parts[kind, name]) for name in self.names(kind)}
        for name in sorted(sizes.keys() ^ shapes.keys()):
            found = "it has" if name in sizes else "it lacks"
            raise RunError(f"checkpoint {self.folder} has {len(sizes)} tensors of {kind}, the model {len(shapes)}: {found} {name}")
        for name, shape in shapes.items():
            if sizes[name] > shape.numel():
                raise RunError(f"checkpoint {self.folder} has {sizes[name]} values of {kind} {name}, the model {shape.numel()}")
        return {name: self.read(kind, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Values start .. start + count - 1 of a parameter, [count]; RunError unless each of them is there once."""
        values, end = torch.empty(count), start  # all before `end` is read
        for begin, length, stored in sorted(self.parts.get((kind, name), ()), key=lambda part: part[0]):
            low, high = max(start, begin), min(start + count, begin + length)
            if low == end < high:
                values[low - start : high - start] = stored[low - begin : high - begin]
                end = high
            elif low < high:
                raise RunError(f"checkpoint {self.folder}: value {min(low, end)} of {kind} {name} is missing, or there twice")
        if end != start + count:
            raise RunError(f"checkpoint {self.folder}: {end - start} of the {count} values of {kind} {name} are there")
        return values

    def own(self, rank: int) -> dict[str, Tensor]:
        """What the process of this rank stored for itself (random state); nothing if there was none."""
        file = self.files.get(tensor_file(self.folder, rank).name)
        return {} if file is None else {label: file.get_tensor(label) for label in file.keys() if "/" not in label}  # noqa: SIM118


def tensor_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.safetensors"


def finish(
    root: Path,
    folder: Path,
    step: int,
    state: dict[str, Any],
    written: list[tuple[int, int]],
    *,
    keep_last: int,
    keep_every: int = 0,
    fields: Mapping[str, type] | None = None,
) -> Path:
    """Write state.json, make the folder visible, remove the older ones. Call when every process has written.

    `written` is what `save_tensors` returned in each process. The newest `keep_last` stay, and those of steps that are
    multiples of `keep_every`. Damaged checkpoints of later steps, which a resume has passed over, become damaged-step-....
    """
    files = {tensor_file(folder, rank).name: facts for rank, facts in enumerate(written)}
    state = json.loads(json.dumps({"format": FORMAT, "step": step, **state, "files": files}))
    (folder / STATE).write_text(json.dumps({**state, CHECKSUM: _checksum(state)}, indent=1), encoding="utf-8")
    target = checkpoint_folder(root, step)
    put_folder(folder, target)
    older = []
    for other in list_checkpoints(root):
        if step_of(other) < step:
            older.append(other)
        elif step_of(other) > step and _is_damaged(other, fields):  # the run fell back past it
            put_folder(other, root / f"damaged-{other.name}")
    for old in older[: max(0, len(older) + 1 - keep_last)]:
        if not keep_every or step_of(old) % keep_every:
            gone = root / f"{REMOVING}{old.name}"  # else a kill would leave half of it under its name
            try:
                os.replace(old, gone)
            except OSError as error:  # the new one is there all the same
                print(f"warning: cannot remove {old}: {error.strerror}", file=sys.stderr, flush=True)
            remove(gone)
    return target


def _is_damaged(folder: Path, fields: Mapping[str, type] | None) -> bool:
    try:
        read_state(folder, fields=fields)
    except RunError:
        return True
    return False


def give_up(root: Path, step: int) -> None:
    """Remove what a save that failed has written, so that a full disk is not left fuller."""
    remove(writing_folder(root, step))


def read_state(folder: Path, rank: int = 0, world: int = 1, fields: Mapping[str, type] | None = None) -> dict[str, Any]:
    """state.json of a checkpoint in which everything fits; RunError says what does not.

    UserError for a checkpoint of an earlier version that cannot be resumed.

    `fields` are the names and types of what the caller needs of it. With several processes each reads only its share of the
    files through.
    """
    try:
        state = read_json(folder / STATE, "the state of a checkpoint")
    except UserError as error:
        raise RunError(f"checkpoint {folder}: {error}") from error
    files = _check_state(folder, state, fields or {})
    for name, (size, checksum) in list(files.items())[rank::world]:
        path = folder / name
        try:
            if not path.is_file():
                raise RunError(f"checkpoint {folder}: {name} is missing")
            if path.stat().st_size != size:
                raise RunError(f"checkpoint {folder}: {name} has {path.stat().st_size} bytes instead of {size}")
            if crc32(path) != checksum:
                raise RunError(f"checkpoint {folder}: {name} is damaged (its checksum differs)")
        except OSError as error:
            raise RunError(f"checkpoint {folder}: {name} cannot be read ({error.strerror})") from error
    return state


def _check_state(folder: Path, state: Any, fields: Mapping[str, type]) -> dict[str, tuple[int, int]]:
    """The list of files; RunError unless the state fits its checksum, its folder, its files and `fields`."""
    if not isinstance(state, dict):
        raise RunError(f"checkpoint {folder}: {STATE} cannot be read (it holds {shown(state)} in place of fields)")
    if state.get("format") not in (2, FORMAT):
        raise RunError(f"checkpoint {folder} has format {shown(state.get('format'))}; this version reads 2 and {FORMAT}")
    told = state.pop(CHECKSUM, None)
    if told != (_checksum(state) if state["format"] == FORMAT else None):
        raise RunError(f"checkpoint {folder}: {STATE} is damaged (its checksum differs)")
    if fields and "identity" not in state and "meters" in state:
        raise UserError(
            f"{folder} was written by an earlier version, whose training of a video tokenizer this version cannot resume; name "
            f"another output_dir, or move {folder.parent} away to start over"
        )
    for name, kind in {"step": int, "files": dict, **fields}.items():
        if type(state.get(name)) is not kind:
            raise RunError(f"checkpoint {folder}: {STATE} has no {name}, or {shown(state.get(name))} in its place")
    named = _step_in(folder.name)
    if state["step"] < 0 or named not in (None, state["step"]):
        raise RunError(f"checkpoint {folder} is of step {shown(state['step'])}, as {STATE} says, and not of that of its name")
    world = state.get("world", 1)
    files, wanted = state["files"], [tensor_file(folder, rank).name for rank in range(_counted(world))]
    if not wanted or sorted(files) != wanted:
        raise RunError(f"checkpoint {folder}: {STATE} lists {shown(sorted(files))}, not the files of {shown(world)} processes")
    for name, facts in files.items():
        if not (isinstance(facts, list) and [type(fact) for fact in facts] == [int, int]):
            raise RunError(f"checkpoint {folder}: {STATE} has {shown(facts)} in place of size and checksum of {name}")
    if others := sorted({path.name for path in folder.glob("rank-*.safetensors")} - files.keys()):
        raise RunError(f"checkpoint {folder}: {shown(others[0])} is not in the list of {STATE}")
    return files


def _counted(world: Any) -> int:
    return world if type(world) is int and 0 < world <= 10**6 else 0


def _checksum(state: dict[str, Any]) -> int:
    """CRC-32 of a state as it is read back, whatever the order and spacing of its fields."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def latest(
    root: Path,
    rank: int = 0,
    world: int = 1,
    any_of: Callable[[bool], bool] = bool,
    fields: Mapping[str, type] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state, None if there is none at all.

    `fields` are as in `read_state`. A damaged one is passed over with a warning on stderr. RunError if all are damaged, because
    starting anew would hide the loss. `any_of` tells whether something is true in any of the processes, which all come to the
    same answer.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        state = None
        try:
            state = read_state(folder, rank, world, fields)
        except RunError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
        if not any_of(state is None):
            return folder, state
    if folders:
        raise RunError(f"no checkpoint in {root} can be read; move the folder away to start from the beginning")
    return None


def check_fits(
    folder: Path,
    state: dict[str, Any],
    *,
    identity: dict[str, Any],
    max_steps: int,
    defaults: dict[str, Any] | None = None,
    key: Callable[[str], str] = str,
) -> None:
    """UserError, with the remedy, if a checkpoint is of another model or other data, or of a longer run.

    `defaults`: what entries of `identity` that are newer than a checkpoint were for it. `key`: what the user calls a setting.
    """
    remedy = f"name another {key('training.output_dir')}, or move {folder.parent} away to start over"
    now, before = (json.loads(json.dumps(found)) for found in (identity, {**(defaults or {}), **state["identity"]}))
    if "data.stages" in before:  # a field that is newer than the checkpoint was as it usually is
        before["data.stages"] = [to_plain(StageSettings()) | stage for stage in before["data.stages"]]
    for name in sorted(now.keys() | before.keys()):
        if now.get(name) != before.get(name):
            raise UserError(f"{folder} is of another run: {name} was {before.get(name)}, now {now.get(name)}; {remedy}")
    if state["step"] > max_steps:
        raise UserError(f"{folder} is past {key('training.max_steps')} {max_steps}; raise it, or {remedy}")


def random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(tensors: dict[str, Tensor]) -> None:
    """Of a process that stored one; a process that did not exist then keeps what it has."""
    if "random.cpu" in tensors:
        torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
