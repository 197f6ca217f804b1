"""The manifest.json of a folder of results, which holds the inputs that decide the results and the environment of the run.

When a run is resumed, the manifest shows whether its inputs are still the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lumos.errors import RunError, UserError, as_text, reason_of
from lumos.files import read_json, write_json

MANIFEST = "manifest.json"
SHOWN = 4  # differences that a message names at most


def keep_manifest(out: Path, results: Path, inputs: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    """Write `out/manifest.json`, or compare with it if there are results, and return the differences of the environment.

    inputs: values that decide the results, with hashes of files; UserError if they differ from
    those in the manifest. environment: versions, device and paths; the caller reports their
    differences. UserError if `results` holds files and there is no manifest, RunError if the
    manifest is damaged.
    """
    path = out / MANIFEST
    begun = results.exists() and any(results.iterdir())  # checked first, because a parallel process may write the manifest
    inputs, environment = (json.loads(json.dumps(part, default=str)) for part in (inputs, environment))
    if not begun:
        write_json(path, {"inputs": inputs, "environment": environment})
        return []
    if not path.exists():
        raise UserError(f"{results} holds files, but no {path} says what made them; choose another folder")
    try:
        old = read_json(path, "a manifest")
        before, around = dict(old["inputs"]), dict(old["environment"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is damaged ({reason_of(error)}); choose another folder, or delete this one and begin again"
        ) from error
    if changed := differences(before, inputs):
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(f"{out} was begun with other inputs: {'; '.join(changed[:SHOWN])}{more}; choose another folder")
    return differences(around, environment)


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Return "key was old, now new" for each value that differs.

    The keys of nested objects are joined by dots.
    """
    found = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}{as_text(key)}.")
        elif old != new:
            found.append(f"{path}{as_text(key)} was {as_text(old)}, now {as_text(new)}")
    return found


