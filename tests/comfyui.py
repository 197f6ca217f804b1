"""Stand-ins for the modules of ComfyUI, and calls of nodes as the application makes them."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "integrations" / "comfyui" / "__init__.py"


class Stopped(Exception):
    """comfy.model_management.InterruptProcessingException"""


def install(monkeypatch: pytest.MonkeyPatch, models: Path) -> types.SimpleNamespace:
    """Install `comfy.utils`, `comfy.model_management` and `folder_paths` with the folder of models `models`.

    In the returned namespace, `seen` holds the calls of the progress bar. If `stop_after` is a number, the application
    interrupts the node after that many calls.
    """
    application = types.SimpleNamespace(seen=[], stop_after=None)

    class ProgressBar:
        def __init__(self, total, node_id=None):
            self.total, self.current = total, 0

        def update_absolute(self, value, total=None, preview=None):
            self.total = total or self.total
            self.current = min(value, self.total)
            application.seen.append((self.current, self.total, preview))

    def stop():
        if application.stop_after is not None and len(application.seen) >= application.stop_after:
            raise Stopped

    places: dict[str, list[str]] = {}
    modules = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"), "throw_exception_if_processing_interrupted": stop,
        },
        "folder_paths": {
            "models_dir": str(models), "get_folder_paths": lambda name: places.get(name, [])[:],
            "add_model_folder_path": lambda name, path, is_default=False: places.setdefault(name, []).append(path),
        },
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["comfy"], name.split(".")[1], module)
    return application


def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Yield the package, loaded as the application loads a folder of custom_nodes: under a name that is no identifier."""
    name = "/ComfyUI/custom_nodes/lumos"
    spec = importlib.util.spec_from_file_location(name, PACKAGE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    for key in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[key]


def execute(nodes: types.ModuleType, kind: str, **inputs: Any) -> tuple:
    """Run a node as the application does: a new object, the method named FUNCTION, inputs by name, a tuple for RETURN_TYPES."""
    node = nodes.NODE_CLASS_MAPPINGS[kind]
    result = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(result, tuple)
    assert len(result) == len(node.RETURN_TYPES)
    return result


def widgets(node: type) -> dict[str, Any]:
    """Return the defaults of the inputs that are typed in, not connected, by name."""
    found = {}
    for group in node.INPUT_TYPES().values():
        for name, (kind, *options) in group.items():
            if isinstance(kind, list):
                found[name] = kind[0]
            elif kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                found[name] = options[0]["default"]
    return found
