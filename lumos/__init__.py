"""Lumos: make video from text and pictures.

The public names are imported when they are first used, so that `import lumos` loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lumos.version import __version__

_MODULES = {
    "LumosConfig": "lumos.models.lumos1.configuration",
    "LumosForVideoGeneration": "lumos.models.lumos1.modeling",
    "LumosPipeline": "lumos.models.lumos1.pipeline",
    "StivConfig": "lumos.models.stiv.configuration",
    "StivForVideoGeneration": "lumos.models.stiv.modeling",
    "StivPipeline": "lumos.models.stiv.pipeline",
    "VideoPipeline": "lumos.pipeline.base",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name, store the value in this module and return it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lumos' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
