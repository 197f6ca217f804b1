"""Model folders of diffusers: reads a config and weights, and writes the folder of a pruned model.

Tensors are read and written one after the other, so that the memory needed is that of one shard. Only
safetensors files are opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumos.compression.record import RECORD
from lumos.errors import NotFound, RunError, UserError, cut, reason_of, shown
from lumos.files import MAX_CONFIG_BYTES, check_writable, file_sha256, read_json, replacing_folder, write_json
from lumos.runtime import versions

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Pruning:
    """The result of a plan applied to one model. A unit is a block, or a slot of a block, by its name in the parent.

    Attributes:
        class_name: class of the parent.
        plan: name of the plan, or the path of its file.
        remove: units that the plan removes.
        reduced: units among them that keep their shortcut, because a width or a size changes there.
        kept: for each list of blocks, the parent's index of each block or slot that is left, in order.
        config: content of the new config.json.
        tensors: name of each tensor of the pruned model -> name of the parent's tensor that it equals.
        shapes: name of each tensor of the pruned model -> its shape.
        taps: pairs of modules (pruned, parent) whose outputs can be compared in training.
        rows: for each unit of the parent, its name and its parameters before and after.
        stock: whether the class of the same name in diffusers loads the result.
    """

    class_name: str
    plan: str
    remove: tuple[str, ...]
    kept: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    taps: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, int, int], ...]
    reduced: tuple[str, ...] = ()
    stock: bool = True

    @property
    def before(self) -> int:
        """The number of parameters of the parent."""
        return sum(before for _, before, _ in self.rows)

    @property
    def after(self) -> int:
        """The number of parameters of the pruned model."""
        return sum(after for _, _, after in self.rows)

    def ends_removed(self) -> tuple[str, ...]:
        """Return the removed units that are the first or the last of a transformer's list of blocks."""
        blocks: dict[str, list[str]] = {}
        for unit, _, _ in self.rows:
            blocks.setdefault(unit.rpartition(".")[0], []).append(unit)
        is_unet = "mid_block" in self.kept
        ends = [] if is_unet else [unit for name, units in blocks.items() if name for unit in (units[0], units[-1])]
        return tuple(unit for unit in dict.fromkeys(ends) if unit in self.remove)

    def record(self) -> dict[str, Any]:
        """Return the entries of compression.json that follow from the plan. The file is itself a plan that can be used again."""
        return {
            "class": self.class_name, "plan": self.plan, "remove": list(self.remove), "reduced": list(self.reduced),
            "kept": self.kept, "parameters": {"before": self.before, "after": self.after},
            "taps": [list(pair) for pair in self.taps],
        }  # fmt: skip


def on_meta(model_class: type, config: Mapping[str, Any]) -> Any:
    """Return a model on the meta device, which needs no memory. Raises UserError for a config that its class does not take."""
    try:
        import torch

        with torch.device("meta"):
            return model_class.from_config(dict(config))
    except Exception as error:  # diffusers checks little, so a wrong config raises errors of many types
        raise UserError(f"no {model_class.__name__} can be made with this config.json: {reason_of(error)}") from error


def check_diffusers() -> None:
    """Raise UserError if diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "models of diffusers need diffusers, which is not installed; pip install 'lumos-video[diffusers]'"
        ) from error


def read_config(folder: str | Path, supported: Iterable[str]) -> dict[str, Any]:
    """Return the config.json of a folder whose class is one of `supported`.

    Raises NotFound if there is none, UserError for another class, a whole pipeline or quantized weights.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} holds a whole pipeline; give the folder of its network, as in {folder / 'unet'} or "
                        f"{folder / 'transformer'}")  # fmt: skip
    if not (folder / CONFIG).is_file():
        raise NotFound(f"{folder} has no {CONFIG}; give the folder of a U-Net or transformer of diffusers")
    config = read_json(folder / CONFIG, "a model's config", MAX_CONFIG_BYTES)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in supported:
        held = "no model of diffusers" if name is None else f"{shown(name)}, which cannot be pruned"
        raise UserError(f"{folder} holds {held}; supported: {', '.join(supported)}")
    if config.get("quantization_config") is not None:
        raise UserError(f"{folder} holds quantized weights; prune the model before it is quantized, and quantize the result")
    return config


def read_plan(path: str | Path, class_name: str) -> tuple[str, ...]:
    """Return the units that a plan file removes: a JSON list of names, or an object with such a list under "remove".

    A compression.json is such an object. Raises NotFound or UserError for other content, and for the plan
    of a model of another class.
    """
    found = read_json(path, "a plan")
    if isinstance(found, dict):
        other = found.get("class", class_name)
        if other != class_name:
            raise UserError(f"{path} is a plan for {shown(other)}; this model is a {class_name}")
        found = found.get("remove")
    if not isinstance(found, list) or not found or not all(isinstance(unit, str) for unit in found):
        raise UserError(f'{path} is not a plan; a plan is a JSON list of units to remove, or {{"remove": [...]}}')
    return tuple(found)


def check_units(remove: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UserError if a plan names a unit that the model does not have."""
    known = list(known)
    for unit in remove:
        if unit not in known:
            raise UserError(f"{where} removes {shown(unit)}, which this model does not have; its units: {cut(', '.join(known))}")


def weight_files(folder: str | Path, variant: str | None = None) -> dict[str, Path]:
    """Return the safetensors file that holds each tensor of a folder, by the tensor's name.

    Args:
        folder: model folder, with one file or with shards and an index.
        variant: name of the variant, as "fp16" in diffusion_pytorch_model.fp16.safetensors.

    Raises NotFound if there are no such files, RunError for a damaged one.
    """
    folder = Path(folder)
    single = folder / ".".join(filter(None, (STEM, variant, "safetensors")))
    index = folder / ".".join(filter(None, (STEM, "safetensors", "index", variant, "json")))
    if index.is_file():
        found = read_json(index, "an index of shards")
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict) or not all(isinstance(file, str) and Path(file).name == file for file in names.values()):
            raise RunError(f"{index} does not say in which file each tensor is; copy the folder again")
        shards = {name: folder / file for name, file in names.items()}
        if missing := sorted({path.name for path in shards.values() if not path.is_file()}):
            raise NotFound(f"{folder} lacks the shard {missing[0]}, which {index.name} names; copy the folder again")
        return shards
    if single.is_file():
        with opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    there = sorted(path.name for path in folder.iterdir() if path.name.startswith(STEM))
    if any(name.endswith(".safetensors") for name in there):
        raise NotFound(f"{folder} has no {single.name}; give --variant for one of {cut(', '.join(there))}")
    if any(name.endswith((".bin", ".bin.index.json")) for name in there):
        raise NotFound(f"{folder} has its weights as .bin only, which is not opened because it can run code; "
                       "write it again as safetensors (save_pretrained of diffusers does)")  # fmt: skip
    raise NotFound(f"{folder} has no weights; it needs {single.name}, or shards and {index.name}")


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Turn an error of safetensors within this context into a RunError that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise RunError(f"cannot read {path}: {reason_of(error)}; copy it again") from error


def opened(path: Path) -> Any:
    """Return a safetensors file, open for reading, as a context manager; raise RunError if it is damaged."""
    from safetensors import safe_open

    with damage_of(path):
        return safe_open(path, framework="pt")


def check_out(out: str | Path) -> None:
    """Raise UserError if the folder `out` has content or cannot be written."""
    out = Path(out)
    if not out.is_dir():
        if os.path.lexists(out):
            raise UserError(f"{out} exists and is no folder; name another --out")
        check_writable(out)
    elif any(out.iterdir()):
        raise UserError(f"{out} exists already and is not empty; name another --out, or move it away")


def write_pruned(
    folder: str | Path, pruning: Pruning, out: str | Path, variant: str | None = None, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write the folder of a pruned model and return the content of its compression.json.

    The folder appears when it is complete. Tensors keep the dtypes of the parent.

    Args:
        folder: the parent's folder.
        pruning: what is kept of the parent.
        out: the folder to write; it may exist if it is empty.
        variant: variant of the parent's weights that is read; the result is written without a variant.
        shard_bytes: the size of the written files; a larger tensor has a file of its own.

    Raises UserError if `out` has content, NotFound or RunError if the parent's weights cannot be read or do
    not fit its config.
    """
    check_out(out)
    files = weight_files(folder, variant)
    for name, source in pruning.tensors.items():
        if source not in files:
            raise RunError(f"the weights of {folder} lack {source} (for {name}), which its {CONFIG} implies; copy the folder again")
    hashes = {path.name: file_sha256(path) for path in sorted({Path(folder) / CONFIG, *files.values()})}
    record = {"parent": {"folder": str(folder), "variant": variant, "sha256": hashes}, **pruning.record(), **versions()}
    with replacing_folder(out) as writing:
        _write_weights(folder, files, pruning, writing, shard_bytes)
        write_json(writing / CONFIG, pruning.config)
        write_json(writing / RECORD, record)
    return record


@dataclass
class _Shards:
    """Collects tensors and writes them to files of a limited size."""

    folder: Path
    limit: int
    waiting: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    total: int = 0
    files: list[list[str]] = field(default_factory=list)

    def add(self, name: str, tensor: Any) -> None:
        if self.waiting and self.size + tensor.nbytes > self.limit:
            self.flush()
        self.waiting[name] = tensor
        self.size += tensor.nbytes
        self.total += tensor.nbytes

    def flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(self.waiting, self.folder / f"{len(self.files)}", metadata={"format": "pt"})
        except SafetensorError as error:
            raise RunError(f"cannot write the weights: {reason_of(error)}; check free space and permissions") from error
        self.files.append(list(self.waiting))
        self.waiting, self.size = {}, 0

    def close(self) -> None:
        """Write the tensors that are left, and give the files the names that diffusers reads."""
        self.flush()
        if len(self.files) == 1:
            (self.folder / "0").rename(self.folder / f"{STEM}.safetensors")
            return
        places = {}
        for number, names in enumerate(self.files):
            file = f"{STEM}-{number + 1:05}-of-{len(self.files):05}.safetensors"
            (self.folder / f"{number}").rename(self.folder / file)
            places |= dict.fromkeys(names, file)
        write_json(
            self.folder / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": self.total}, "weight_map": places}
        )


def _write_weights(folder: str | Path, files: Mapping[str, Path], pruning: Pruning, writing: Path, limit: int) -> None:
    shards = _Shards(writing, limit)
    with ExitStack() as stack:
        handles = {path: stack.enter_context(opened(path)) for path in set(files.values())}
        for name, source in pruning.tensors.items():
            with damage_of(files[source]):
                tensor = handles[files[source]].get_tensor(source)
            if tuple(tensor.shape) != pruning.shapes[name]:
                raise RunError(f"{source} of {folder} has the shape {list(tensor.shape)}; its {CONFIG} implies "
                               f"{list(pruning.shapes[name])}")  # fmt: skip
            shards.add(name, tensor)
        shards.close()
