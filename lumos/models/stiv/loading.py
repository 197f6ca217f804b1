"""Loads a model folder as transformers does, and raises where transformers would only warn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lumos.errors import NotFound, UserError, as_text, reason_of

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SHOWN_KEYS = 20


def loaded(load: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> Any:
    """Return `load(folder, ...)`, a model of transformers, or the model and its loading info if the caller asks for it.

    Raises UserError for a folder without a config or weights, for damaged files, and for tensors that are missing,
    unknown or of another shape. All of these tensors are listed.
    """
    asked = kwargs.pop("output_loading_info", False)
    if folder is not None:
        _check_folder(Path(folder, kwargs.get("subfolder") or ""))
    try:
        model, info = load(folder, *args, output_loading_info=True, **{"ignore_mismatched_sizes": True, **kwargs})
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # what transformers raises for damaged files
        raise UserError(f"{folder} holds no model that can be loaded ({reason_of(error)}); copy it again") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"the weights of {folder} are damaged ({reason_of(error)}); copy it again") from error
    check_keys(str(folder), info["missing_keys"], info["unexpected_keys"], [name for name, *_ in info["mismatched_keys"]])
    return (model, info) if asked else model


def check_keys(source: str, missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str]) -> None:
    """Raise UserError, which lists the names, if any tensor is missing, unknown or of another shape."""
    parts = [(missing, "lacks"), (unknown, "has, unknown to this model,"), (misshapen, "has in another shape")]
    found = [f"{words} {listed(names)}" for names, words in ((sorted(names), words) for names, words in parts) if names]
    if found:
        raise UserError(f"{source} does not fit the model: it {'; it '.join(found)}; give the folder of a model of this config")


def listed(names: list[str]) -> str:
    """Return the names for a message, at most SHOWN_KEYS of them and the number of the others."""
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(as_text(name, 80) for name in names[:SHOWN_KEYS]) + more


def _check_folder(place: Path) -> None:
    if not place.is_dir():
        raise NotFound(f"there is no model folder {place}; give the folder of a saved model")
    if not (place / "config.json").is_file():
        raise NotFound(f"{place} has no config.json; give the folder of a saved model")
    if not any((place / name).is_file() for name in WEIGHTS):
        raise NotFound(f"{place} has no weights; it needs {WEIGHTS[0]}, or shards with {WEIGHTS[1]}")
