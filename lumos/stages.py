"""The stages of a verb that does several things in a folder, and resumes where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lumos.errors import UserError
from lumos.files import read_json, write_json
from lumos.settings import differences


class Stages:
    """The stages of a run in a folder. stages.json in it says from which inputs each one was made.

    A stage whose result exists is not repeated. It must have been made from the same inputs.
    """

    def __init__(self, folder: Path):
        self.file = folder / "stages.json"
        self.inputs = read_json(self.file, "the stages of a run") if self.file.is_file() else {}
        if not isinstance(self.inputs, dict):
            raise UserError(f"{self.file} is damaged; delete {folder}, or name another --out")

    def run(self, name: str, result: Path, inputs: Mapping[str, Any], make: Callable[[], object]) -> bool:
        """Make the result of a stage unless it exists; return whether it was made now. `inputs` are JSON values.

        Raises UserError if the result exists and was made from other inputs.
        """
        inputs, before = json.loads(json.dumps(inputs)), self.inputs.get(name)
        if result.exists():
            if before == inputs:
                return False
            changes = "nothing says from which inputs" if before is None else "; ".join(differences(before, inputs)[:2])
            raise UserError(f"{result} was made from other inputs ({changes}); delete it, or name another --out")
        self.inputs[name] = inputs
        write_json(self.file, self.inputs)
        make()
        return True
