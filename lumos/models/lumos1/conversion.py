"""Reads checkpoint folders, checks that they are complete, and adapts released checkpoints to this model.

A folder holds config.json and model.safetensors, or several weight files (shards) with
model.safetensors.index.json. Released Lumos-1 folders use the same key names, with these differences
(reference, section 10):

- Prefixes that FSDP and activation checkpointing add to keys are removed.
- QK-norm weights of shape [head_dim] are read as [1, head_dim].
- Keys `model.vqmodel.*` are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.initialization import no_init_weights

from lumos.errors import RunError, UserError, as_text, reason_of, shown
from lumos.files import read_json
from lumos.lora import check_no_adapter
from lumos.models.lumos1.configuration import LumosConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
IGNORED = re.compile(r"^(model\.vqmodel\.|.*rotary_emb\.)")
QK_NORM = re.compile(r"\.self_attn\.[qk]_norm\.(weight|bias)$")


def prepare_checkpoint(
    folder: str | os.PathLike | None, model_class: type, kwargs: dict[str, Any]
) -> tuple[str | os.PathLike | None, dict[str, Any]]:
    """Check a local folder against the model that its config describes.

    Returns the name and the keyword arguments with which transformers loads the model. If tensors must
    be renamed or reshaped, the name is None and the arguments hold a `state_dict`. A name that is no
    local folder is returned unchanged, as it may be a repository on the hub.
    Raises UserError for missing files, shards and keys, and for wrong shapes.
    """
    if folder is None:
        return folder, kwargs
    path = Path(folder, kwargs.get("subfolder") or "")
    if not path.is_dir():
        if path.suffix or path.is_absolute() or str(folder).startswith("."):
            raise UserError(f"no model folder at {folder}; give a folder with config.json and {WEIGHTS}")
        return folder, kwargs
    check_no_adapter(path)
    config = kwargs.get("config") or read_config(path)
    shapes = read_shapes(weight_files(path))
    renamed, found = match_layout(path, shapes, config, model_class)
    as_is = all(key == new and shapes[key] == found[new] for key, new in renamed.items())
    if as_is:
        return folder, kwargs
    tensors = {}
    for file in weight_files(path):
        tensors.update({renamed[k]: v.view(found[renamed[k]]) for k, v in load_file(file).items() if k in renamed})
    kwargs.pop("subfolder", None)
    return None, {**kwargs, "config": config, "state_dict": tensors}


def match_layout(
    path: Path, shapes: dict[str, tuple[int, ...]], config: LumosConfig, model_class: type
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Match the tensors of a folder with those of the model.

    Returns {stored key: key in the model}, without ignored keys, and {key in the model: shape}.
    Raises UserError if keys or shapes do not match.
    """
    if config.num_hidden_layers > len(shapes):  # checked first: building a model of very many layers takes long
        raise UserError(f"{path} has {len(shapes)} tensors, too few for the {config.num_hidden_layers} layers of its config.json")
    try:
        with torch.device("meta"), no_init_weights():
            expected = {key: tuple(value.shape) for key, value in model_class(config).state_dict().items()}
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"no model can be built from the config.json of {path} ({reason_of(error)}); download or copy it again"
        ) from error
    renamed = {key: clean_key(key) for key in shapes if not IGNORED.match(clean_key(key))}
    found = {renamed[key]: clean_shape(renamed[key], shapes[key], expected) for key in renamed}
    check_layout(path, found, expected)
    return renamed, found


def read_config(folder: Path) -> LumosConfig:
    """Return the config of a folder. Raises UserError if config.json is missing or cannot be read."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a saved or released model")
    try:
        return LumosConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises errors of many types for a damaged file
        if isinstance(error, ValueError) and not isinstance(error, UserError):  # the message names the field
            raise UserError(f"{file}: {error}") from error
        raise UserError(f"{file} is damaged ({reason_of(error)}); download or copy it again") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder. Raises UserError if there are none or some are missing."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(read_json(index, "an index of weights")["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{shown(outside[0])} is not the name of a file in the same folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({reason_of(error)}); download or copy it again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight shards: {some(missing)}; download or copy them again"
            )
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    raise UserError(f"{folder} has no weights; it needs {WEIGHTS}, or shards with {INDEX}")


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by key. Only the headers of the files are read.

    Raises UserError for a file that is damaged or no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes.update({key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is damaged or no safetensors file ({reason_of(error)}); download or copy it again"
            ) from error
    return shapes


def check_written(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Check weight files that were just written, by their headers.

    Raises RunError unless the folder holds exactly the tensors `expected`, as shapes by name.
    """
    expected, found, count = {clean_key(name): shape for name, shape in expected.items()}, {}, 0
    for file in weight_files(folder):
        of_file = read_shapes([file])
        found, count = found | {clean_key(name): shape for name, shape in of_file.items()}, count + len(of_file)
    wrong = [name for name in sorted(expected.keys() | found.keys()) if found.get(name) != expected.get(name)]
    if wrong or count != len(found):
        first = f", {wrong[0]} differs" if wrong else ""
        raise RunError(f"{folder} should hold {len(expected)} tensors and holds {count}{first}; check the disk and write it again")


def clean_key(key: str) -> str:
    """Return a key without the prefixes of wrapper modules."""
    return WRAPPERS.sub("", key)


def clean_shape(key: str, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a tensor in the model: [1, head_dim] for a QK-norm that is stored as [head_dim]."""
    if QK_NORM.search(key) and len(shape) == 1 and expected.get(key) == (1, *shape):
        return (1, *shape)
    return shape


def some(keys: Collection[str]) -> str:
    """Return the first three names and the number of the others, for a message."""
    first = ", ".join(as_text(key, 80) for key in sorted(keys)[:3])
    return first + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def check_layout(path: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raise UserError unless keys and shapes of `found` equal those of `expected`."""
    if missing := expected.keys() - found.keys():
        raise UserError(f"{path} lacks the tensors {some(missing)}; its config.json describes another model")
    if extra := found.keys() - expected.keys():
        raise UserError(f"{path} has tensors that this model does not know: {some(extra)}")
    for key in expected:
        if found[key] != expected[key]:
            raise UserError(f"{path}: {key} has shape {shown([*found[key]])}, config.json asks for {list(expected[key])}")
