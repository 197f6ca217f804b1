"""`bench compare`: times of several results of `bench`, beside each other.

Times are compared only if one machine measured them: a table of two machines shows the machines, not the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumos.errors import UserError
from lumos.files import read_json

PARTS = ("target", "hardware", "versions", "settings", "measured")
NAMES = ("shape", "size", "length", "positions")  # the keys that tell the items of a list apart


def read_result(path: str | Path) -> dict[str, Any]:
    """Return a result that `bench --output` wrote. Raises UserError for another file."""
    result = read_json(path, "a result of `bench`")
    if not isinstance(result, dict) or not all(part in result for part in PARTS):
        raise UserError(f"{path} is no result of `bench`; give files that `bench TARGET --output FILE` wrote")
    return result


def machine_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal in results that are compared: processor, cores, GPU, torch, device, dtype and threads."""
    hardware, settings = result["hardware"], result["settings"]
    return {
        "cpu": hardware.get("cpu"), "cores": hardware.get("cores"), "gpu": hardware.get("gpu"),
        "torch": hardware.get("torch", result["versions"].get("torch")),  # older results name torch among the versions only
        **{name: settings.get(name) for name in ("device", "dtype", "threads")},
    }  # fmt: skip


def check_one_machine(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if the results, by file, were not all measured on one machine in one way."""
    (first, reference), *others = ((path, machine_of(result)) for path, result in results.items())
    for path, machine in others:
        if different := [name for name in machine if machine[name] != reference[name]]:
            shown = ", ".join(f"{name} {reference[name]} and {machine[name]}" for name in different)
            raise UserError(f"{first} and {path} cannot be compared: {shown}; measure both on one machine in the same way")


def times(measured: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Yield (place, seconds) of every time in the figures of a result; the place is the keys that lead to it."""
    if isinstance(measured, Mapping):
        for key, value in measured.items():
            if isinstance(value, int | float) and key.endswith("seconds"):
                yield " ".join((*place, key)), float(value)
            else:
                yield from times(value, (*place, key))
    elif isinstance(measured, Sequence) and not isinstance(measured, str):
        for index, item in enumerate(measured):
            names = [str(item[name]) for name in NAMES if name in item] if isinstance(item, Mapping) else []
            yield from times(item, (*place, *(names[:1] or [str(index)])))


def common_times(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the times that all results, by file, have: {place: seconds in each result}.

    Raises UserError for results of different machines, and if they have no time in common.
    """
    check_one_machine(results)
    columns = [dict(times(result["measured"])) for result in results.values()]
    common = {place: [column[place] for column in columns] for place in columns[0] if all(place in column for column in columns)}
    if not common:
        raise UserError(f"{' and '.join(results)} have no time in common; give results of the same target")
    return common


def different_settings(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the targets that were measured with different settings in some of the results."""
    (first, *others) = (result["settings"] for result in results.values())
    targets = [name for name in first if isinstance(first[name], Mapping)]
    return [name for name in targets if any(name in other and other[name] != first[name] for other in others)]
