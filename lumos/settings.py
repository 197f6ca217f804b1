"""Settings as nested dataclasses, filled from a YAML file and from `section.key=value` overrides.

A field is declared with `setting(default, meaning, ...)`. A trailing underscore in a field's name
(`from_`) is not part of its key in the file.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from lumos.errors import UserError, as_text, instead, shown
from lumos.files import MAX_YAML_LENGTH, parse_yaml, read_text
from lumos.shipped import find_config, find_shipped_models

MAX_WHOLE = 2**63 - 1
"""The largest whole number of a setting without `high`."""
MAX_TEXT = 10_000
"""The maximum number of characters of a text, for example a path or a prompt."""
MAX_DEPTH = 16
"""The maximum number of parts in the key of an override."""
MAX_ENTRIES = 10_000
"""The maximum number of entries of a list."""
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "keys with values",
    list: "a list",
}


def is_whole(value: object) -> bool:
    """Return whether the value is an int. True and False do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether the value is an int or a float. True and False do not count."""
    return is_whole(value) or isinstance(value, float)


def is_finite(value: object) -> bool:
    """Return whether the value is a number, and neither infinite nor NaN."""
    return is_number(value) and math.isfinite(value)


def setting(
    default: Any,
    meaning: str,
    *,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    allowed: str | None = None,
    **more: Any,
) -> Any:
    """Return a dataclass field with its one-line meaning and its allowed values.

    `low` and `high` are inclusive bounds, `above` and `below` exclusive ones. `allowed` describes the range
    in error messages, for ranges that the bounds alone do not explain. A field that is a number of things
    (steps, clips, pixels, processes) needs a `high`. `more` is added to the metadata of the field;
    `lumos.pipeline.options` reads step, slider_high, label, pictures, given, trade and cost from there.
    """
    metadata = {
        "meaning": meaning, "choices": choices, "low": low, "high": high, "above": above, "below": below, "allowed": allowed,
        **more,
    }  # fmt: skip
    if isinstance(default, (list, dict)) or (isinstance(default, type) and dataclasses.is_dataclass(default)):
        factory = default if isinstance(default, type) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_yaml(path: str | Path, overrides: list[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Return the nested dict in a YAML file after the overrides.

    The file may be the name of a shipped recipe; `kinds` are the folders of recipes, see `lumos.shipped.find_config`. Paths of
    shipped models, checkpoints/NAME, lead to them from any working folder.
    Raises UserError for a missing or malformed file and for a malformed override.
    """
    path = find_config(path, kinds)
    raw = parse_yaml(read_text(path, "a config in YAML", 4 * MAX_YAML_LENGTH), str(path))
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as model, data, training, not a {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    find_shipped_models(raw)
    return raw


def describe(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (key, default, meaning) of every setting of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key = f"{prefix}{f.name.rstrip('_')}"
        if dataclasses.is_dataclass(hints[f.name]):
            yield from describe(hints[f.name], f"{key}.")
        else:
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            yield key, default, f.metadata["meaning"]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().lstrip("-").split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise UserError(f"{shown(override)} is not of the form section.key=value, for example training.max_steps=200")
    value = parse_yaml(text, f"the value in {shown(override)}")
    node = raw
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"{shown(override)}: {shown('.'.join(parts[: depth + 1]))} is a value, not a section")
    node[parts[-1]] = value


def build(cls: type, raw: Any, path: str = "") -> Any:
    """Return an instance of the dataclass from nested dicts.

    Raises UserError for an unknown key, a wrong type or a value out of range.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path or 'the config'} must be a section with keys, not {shown(raw)}")
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            where = f"allowed in {path or 'a config'}:"
            raise UserError(f"unknown key {_join(path, key)}{instead(key, fields, where)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        f = fields[key]
        values[f.name] = _convert(hints[f.name], value, _join(path, key))
        _check_range(f.metadata, values[f.name], _join(path, key))
    return cls(**values)


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Return the value as the annotated type. Raises UserError if it is of another type.

    A float setting also takes a whole number, and text such as 1e-3, which YAML does not read as a number.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        fitting = [a for a in kinds if isinstance(value, typing.get_origin(a) or a)]
        return _convert((fitting or kinds)[0], value, path)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    if origin is list and isinstance(value, (list, tuple)):
        if len(value) > MAX_ENTRIES:
            raise UserError(f"{path} has {len(value):,} entries; allowed: at most {MAX_ENTRIES:,}")
        return [_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        return tuple(_convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(args, value, strict=True)))
    if origin is dict and (isinstance(value, dict) or value is None):
        return dict(value or {})
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if kind is str and isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(f"{path} has {len(value):,} characters; allowed: at most {MAX_TEXT:,}")
    if kind in (int, bool, str) and type(value) is kind:
        return value
    wanted = f"a list of {len(args)} values" if origin is tuple else WORDS[origin or kind]
    raise UserError(f"{path} must be {wanted}, not {shown(value)}")


def _check_range(metadata: typing.Mapping[str, Any], value: Any, path: str) -> None:
    choices, low, high = metadata["choices"], metadata["low"], metadata["high"]
    above, below = metadata["above"], metadata["below"]
    for item in value if isinstance(value, list) else [value]:
        if choices and item not in choices:
            allowed = ("null" if choice is None else str(choice) for choice in choices)
            raise UserError(f"{path} is {shown(item)}{instead(item, allowed)}")
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        most = high if high is not None else MAX_WHOLE if isinstance(number, int) else sys.float_info.max
        is_low = number < (-most if low is None else low) or (above is not None and number <= above)
        if is_low or not number <= most or (below is not None and number >= below):
            limits = metadata["allowed"] or _range_in_words(low, high, above, below, most)
            raise UserError(f"{path} is {shown(number)}; it must be {limits}")


def _range_in_words(low: float | None, high: float | None, above: float | None, below: float | None, most: float) -> str:
    if low is not None and high is not None:
        return f"between {low} and {high}"
    start = f" of {low} or more" if low is not None else f" above {above}" if above is not None else ""
    end = f"at most {high}" if high is not None else f"below {below}" if below is not None else f"at most {most:.3g}"
    return f"a finite number{start}, {end}"


def to_plain(value: Any) -> Any:
    """Return settings as plain dicts, lists and numbers with the keys of the file; the inverse of `build`."""
    if dataclasses.is_dataclass(value):
        return {f.name.rstrip("_"): to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}  # as JSON has them
    return value


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Return one line for each key whose value differs between two results of `to_plain`."""
    lines = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, _join(path, key))
        elif old != new:
            lines.append(f"{_join(path, key)} was {as_text(old)}, now {as_text(new)}")
    return lines


def _join(path: str, key: Any) -> str:
    return f"{path}.{as_text(key)}" if path else as_text(key)
