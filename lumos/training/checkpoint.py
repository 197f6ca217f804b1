"""Checkpoints that appear only when they are complete, and that any engine can read.

    <output_dir>/checkpoints/step-00000200/
        rank-0000.safetensors    the tensors of one process: its part of the weights and of the
                                 optimizer state, and its random state
        state.json               step, settings, meters, the size and CRC-32 of every other file,
                                 and its own CRC-32; this file is written last

A tensor is stored under the key "kind/name/start". It holds the values start, start + 1, ... of the
parameter `name` in its flat order. The kinds are weight, average (the exponential moving average of the
weights), exp_avg and exp_avg_sq (AdamW), and row_var, col_var and variance (Adafactor), of which the
first two have shapes of their own. All of them are fp32. `Stored` reads any range of any parameter,
whichever engine and however many processes wrote the checkpoint.
DeepSpeed's own converter, ds_to_universal, is not used: it unpickles files, needs DeepSpeed to read
them, and supports neither averaged weights nor ZeRO stage 0 nor plain PyTorch.

A checkpoint is written into a hidden folder, which is renamed once all of it is on the disk. A kill
or a power cut at any moment therefore leaves the older checkpoints untouched. A checkpoint is
damaged if a checksum, its list of files or the step in its folder name does not match; a resume
then takes the next older one.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lumos.durable import make_folder, put_folder, remove, sync_tree
from lumos.errors import RunError, UserError, printable, shown
from lumos.files import read_json
from lumos.progress import LOGGER
from lumos.settings import to_plain
from lumos.training.sections import StageSettings

FORMAT = 3
"""The format that is written. Format 2, which has no checksum of state.json, can still be read."""
STATE, CHECKSUM = "state.json", "checksum"
WRITING, REMOVING = ".writing-", ".removing-"
LEFT_OVER = (f"{WRITING}*", f"{REMOVING}*", ".old-step-*")
"""Name patterns of the folders that an interrupted save may leave behind."""
RUN_FIELDS: dict[str, type] = {
    "settings": dict, "identity": dict, "task": dict, "engine": str, "world": int, "updates": int, "skipped": int,
    "averaged": bool, "meter": dict,
}  # fmt: skip
"""Names and types of the fields in the state of a generator's training run."""
WEIGHT, AVERAGE = "weight", "average"
AUXILIARY = "auxiliary."
"""Beginning of the names of the weights of a second network, see `lumos.training.auxiliary`."""


class Damaged(RunError):
    """A checkpoint is certainly damaged. This is not raised if it cannot be read at the moment, or if a later version wrote it."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the folders of all finished checkpoints in `root`, the oldest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir() and _step_in(p.name) is not None), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step that the name of a checkpoint folder states."""
    return int(folder.name.removeprefix("step-"))


def _step_in(name: str) -> int | None:
    return int(name.removeprefix("step-")) if re.fullmatch(r"step-[0-9]{1,18}", name) else None


def writing_folder(root: Path, step: int) -> Path:
    """Return the hidden folder in which the checkpoint of `step` is written."""
    return root / f"{WRITING}{step:08d}"


def begin(root: Path, step: int) -> Path:
    """Create the empty hidden folder for the checkpoint of `step` and return it.

    Files and folders that interrupted saves left behind are removed first. Call on one process only.
    """
    make_folder(root)
    remove_left_overs(root)
    folder = writing_folder(root, step)
    folder.mkdir()
    return folder


def remove_left_overs(root: Path) -> None:
    """Remove what killed saves left in `root`. Call on one process only, and only if no other run uses the folder."""
    for left_over in [path for pattern in LEFT_OVER for path in root.glob(pattern)]:
        remove(left_over)


def save_tensors(folder: Path, rank: int, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Write the tensors of one process and return the size and the CRC-32 of the file.

    Views are copied first, because safetensors does not store tensors that share memory.
    """
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        whole[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    path = tensor_file(folder, rank)
    save_file(whole, path)
    sync_tree(path)
    return path.stat().st_size, crc32(path)


def key(kind: str, name: str, start: int) -> str:
    """Return the key under which a range of a parameter is stored, see the top of this module."""
    return f"{kind}/{name}/{start}"


class Stored:
    """The tensors of a checkpoint, joined from the files of all processes that wrote it.

    Values are read from the disk only when a method returns them.
    """

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

    def names(self, kind: str) -> list[str]:
        """Return the names of the parameters of the model that have tensors of this kind."""
        return [name for found, name in self.parts if found == kind and not name.startswith(AUXILIARY)]

    def has(self, kind: str, name: str) -> bool:
        """Return whether a parameter has tensors of this kind."""
        return (kind, name) in self.parts

    def check_size(self, kind: str, name: str, count: int) -> None:
        """Raise RunError if a parameter has more than `count` values of a kind."""
        found = max((begin + length for begin, length, _ in self.parts.get((kind, name), ())), default=0)
        if found > count:
            raise RunError(f"checkpoint {self.folder} has {found} values of {kind} {name}, the model {count}")

    def read_whole(self, kind: str, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Return all parameters of a kind, by name, in the given shapes.

        Raises RunError if a value is missing, or if the checkpoint has more names or values of this
        kind than `shapes`.
        """
        names = set(self.names(kind))
        for name in sorted(names ^ shapes.keys()):
            found = "it has" if name in names else "it lacks"
            raise RunError(f"checkpoint {self.folder} has {len(names)} tensors of {kind}, the model {len(shapes)}: {found} {name}")
        for name, shape in shapes.items():
            self.check_size(kind, name, shape.numel())
        return {name: self.read(kind, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Return the values start .. start + count - 1 of a parameter as a tensor [count].

        Raises RunError unless the checkpoint has each of these values exactly once.
        """
        values, end = torch.empty(count), start  # the values before `end` have been read
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
        """Return the tensors that the process of this rank stored for itself, by name.

        They are its random state; in the training of a tokenizer, all tensors. The result is {} if
        the run that wrote the checkpoint had no process of this rank.
        """
        file = self.files.get(tensor_file(self.folder, rank).name)
        return {} if file is None else {label: file.get_tensor(label) for label in file.keys() if "/" not in label}  # noqa: SIM118


def tensor_file(folder: Path, rank: int) -> Path:
    """Return the file that the process of this rank writes."""
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
    """Write state.json, give the folder its final name, and return the renamed folder.

    Call on one process, after every process has written its tensors. `written` holds the result of
    `save_tensors` of each process, in the order of ranks. `fields` are those of `read_state`.

    Older checkpoints are then removed, except the newest `keep_last`, counting the new one, and those
    whose step is a multiple of `keep_every`. A damaged checkpoint of a later step, which the resume
    of this run has skipped, is renamed to damaged-step-....
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
        elif step_of(other) > step and _is_damaged(other, fields):  # a resume has skipped it
            put_folder(other, root / f"damaged-{other.name}")
    for old in older[: max(0, len(older) + 1 - keep_last)]:
        if not keep_every or step_of(old) % keep_every:
            gone = root / f"{REMOVING}{old.name}"  # a kill must not leave half a checkpoint under a final name
            try:
                os.replace(old, gone)
            except OSError as error:  # the new checkpoint is complete even so
                LOGGER.warning(f"warning: cannot remove {printable(str(old))}: {error.strerror}")
            remove(gone)
    return target


def _is_damaged(folder: Path, fields: Mapping[str, type] | None) -> bool:
    try:
        read_state(folder, fields=fields)
    except Damaged:
        return True
    except (RunError, UserError):
        pass
    return False


def give_up(root: Path, step: int) -> None:
    """Remove the files of a failed save, so that they do not fill the disk further."""
    remove(writing_folder(root, step))


def read_state(folder: Path, rank: int = 0, world: int = 1, fields: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Return the content of state.json after checking the whole checkpoint.

    `fields` holds the names and types of the fields that the caller needs. With `world` processes,
    each process verifies the checksums of only its own share of the files. Raises Damaged, which names
    the damage, if the state or a file does not match, RunError if a file cannot be read, and UserError
    for a checkpoint of an earlier version that cannot be resumed.
    """
    try:
        state = read_json(folder / STATE, "the state of a checkpoint")
    except UserError as error:
        unreadable = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
        raise (RunError if unreadable else Damaged)(f"checkpoint {folder}: {error}") from error
    files = _check_state(folder, state, fields or {})
    for name, (size, checksum) in list(files.items())[rank::world]:
        path = folder / name
        try:
            if not path.is_file():
                raise Damaged(f"checkpoint {folder}: {name} is missing")
            if path.stat().st_size != size:
                raise Damaged(f"checkpoint {folder}: {name} has {path.stat().st_size} bytes instead of {size}")
            if crc32(path) != checksum:
                raise Damaged(f"checkpoint {folder}: {name} is damaged (its checksum differs)")
        except OSError as error:
            raise RunError(f"checkpoint {folder}: {name} cannot be read ({error.strerror})") from error
    return state


def _check_state(folder: Path, state: Any, fields: Mapping[str, type]) -> dict[str, tuple[int, int]]:
    """Return the size and CRC-32 of each file, by name.

    Raises Damaged unless the state matches its checksum, its folder, its files and `fields`.
    """
    if not isinstance(state, dict):
        raise Damaged(f"checkpoint {folder}: {STATE} cannot be read (it holds {shown(state)} in place of fields)")
    if (format_ := state.get("format")) not in (2, FORMAT):
        later = type(format_) is int and format_ > FORMAT
        kind = RunError if later else Damaged
        raise kind(f"checkpoint {folder} has format {shown(format_)}; this version reads 2 and {FORMAT}")
    told = state.pop(CHECKSUM, None)
    if told != (_checksum(state) if state["format"] == FORMAT else None):
        raise Damaged(f"checkpoint {folder}: {STATE} is damaged (its checksum differs)")
    if "identity" not in state and "meters" in state:
        raise UserError(
            f"{folder} was written by an earlier version, whose training of a video tokenizer this version cannot resume; name "
            f"another output_dir, or move {folder.parent} away to start over"
        )
    for name, kind in {"step": int, "files": dict, **fields}.items():
        if type(state.get(name)) is not kind:
            raise Damaged(f"checkpoint {folder}: {STATE} has no {name}, or {shown(state.get(name))} in its place")
    named = _step_in(folder.name)
    if state["step"] < 0 or named not in (None, state["step"]):
        raise Damaged(f"checkpoint {folder} is of step {shown(state['step'])} according to {STATE}, not of the step in its name")
    world = state.get("world", 1)
    files, wanted = state["files"], [tensor_file(folder, rank).name for rank in range(_counted(world))]
    if not wanted or sorted(files) != wanted:
        raise Damaged(f"checkpoint {folder}: {STATE} lists {shown(sorted(files))}, not the files of {shown(world)} processes")
    for name, facts in files.items():
        if not (isinstance(facts, list) and [type(fact) for fact in facts] == [int, int]):
            raise Damaged(f"checkpoint {folder}: {STATE} has {shown(facts)} in place of size and checksum of {name}")
    if others := sorted({path.name for path in folder.glob("rank-*.safetensors")} - files.keys()):
        raise Damaged(f"checkpoint {folder}: {shown(others[0])} is not in the list of {STATE}")
    return files


def _counted(world: Any) -> int:
    return world if type(world) is int and 0 < world <= 10**6 else 0


def _checksum(state: dict[str, Any]) -> int:
    """Return the CRC-32 of a state, which does not depend on the order or spacing of its JSON fields."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def latest(
    root: Path,
    rank: int = 0,
    world: int = 1,
    any_of: Callable[[bool], bool] = bool,
    fields: Mapping[str, type] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest undamaged checkpoint and its state, or None if `root` has no checkpoint.

    `rank`, `world` and `fields` are those of `read_state`. A damaged checkpoint is skipped with a
    warning on stderr. Raises RunError if all are damaged, because starting from the beginning would
    hide the loss. `any_of` returns whether its argument is true in any of the processes, so that all
    of them choose the same checkpoint.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        state = None
        try:
            state = read_state(folder, rank, world, fields)
        except RunError as error:
            LOGGER.warning(f"warning: {printable(str(error))}; trying the checkpoint before it")
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
    """Raise UserError if a checkpoint belongs to another model or other data, or is past `max_steps`.

    `identity` is the resume fingerprint of the run that starts now. `defaults` holds the values of
    entries that the checkpoint lacks because it is older. `key` translates the name of a setting to
    the name in the user's file. The message names the remedy.
    """
    remedy = f"name another {key('training.output_dir')}, or move {folder.parent} away to start over"
    now, before = (json.loads(json.dumps(found)) for found in (identity, {**(defaults or {}), **state["identity"]}))
    if "data.stages" in before:  # a field that is newer than the checkpoint had its default value
        before["data.stages"] = [to_plain(StageSettings()) | stage for stage in before["data.stages"]]
    for name in sorted(now.keys() | before.keys()):
        if now.get(name) != before.get(name):
            raise UserError(f"{folder} is of another run: {name} was {before.get(name)}, now {now.get(name)}; {remedy}")
    if state["step"] > max_steps:
        raise UserError(f"{folder} is past {key('training.max_steps')} {max_steps}; raise it, or {remedy}")


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's global random generators, on the CPU and on the current GPU."""
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(tensors: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned; without it (a new process) the generators stay as they are."""
    if "random.cpu" in tensors:
        torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
