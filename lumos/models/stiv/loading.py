"""Checks a model folder against its config before transformers loads it, by the headers of its files alone.

transformers only warns of missing tensors, and then starts them anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lumos.errors import NotFound, UserError, as_text, reason_of, shown
from lumos.files import read_json
from lumos.lora import check_no_adapter
from lumos.models.stiv.configuration import StivConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN_KEYS = 20


def check_folder(folder: Path, model_class: type, config: StivConfig | None = None) -> None:
    """Raise UserError unless the folder holds exactly the tensors of the model that its config describes.

    The message lists tensors that are missing, unknown or of another shape. `config` takes the place of the folder's.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no model folder {folder}; give the folder of a saved model")
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder} has no config.json; give the folder of a saved model")
    check_no_adapter(folder)
    config = config or read_config(folder)
    shapes = read_shapes(weight_files(folder))
    if config.num_hidden_layers > len(shapes):  # checked first: building a model of very many layers takes long
        raise UserError(f"{folder} has {len(shapes)} tensors, too few for the {config.num_hidden_layers} blocks of its config.json")
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in model_class(config).state_dict().items()}
    check_keys(str(folder), wanted, shapes)


def check_keys(source: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError, which lists the names, unless the shapes `found` by name are those `wanted`."""
    parts = {
        "lacks": wanted.keys() - found.keys(),
        "has, unknown to this model,": found.keys() - wanted.keys(),
        "has in another shape": {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]},
    }
    if faults := [f"it {words} {listed(names)}" for words, names in parts.items() if names]:
        raise UserError(f"{source} does not fit the model: {'; '.join(faults)}; give a folder of this config")


def listed(names: Iterable[str]) -> str:
    """Return the names for a message, at most SHOWN_KEYS of them and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(as_text(name, 80) for name in names[:SHOWN_KEYS]) + more


def read_config(folder: Path) -> StivConfig:
    """Return the config of a folder. Raises UserError for a config that is damaged or that describes no model."""
    try:
        return StivConfig.from_pretrained(folder)
    except UserError:
        raise
    except ValueError as error:  # the message names the field
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # transformers raises errors of many types for a damaged file
        raise UserError(f"{folder / 'config.json'} is damaged ({reason_of(error)}); copy it again") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder. Raises UserError if there are none or some are missing."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        raise NotFound(f"{folder} has no weights; it needs {WEIGHTS}, or shards with {INDEX}")
    try:
        names = sorted(set(read_json(index, "an index of weights")["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{shown(outside[0])} is not the name of a file in the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({reason_of(error)}); copy it again") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise NotFound(f"{folder} lacks {len(missing)} of its {len(names)} weight shards: {listed(missing)}; copy them again")
    return [folder / name for name in names]


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name, from the headers. Raises UserError for a file that is damaged."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or no safetensors file ({reason_of(error)}); copy it again") from error
    return shapes
