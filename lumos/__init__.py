"""Lumos: make video from text and pictures.

The public names are `VideoPipeline`, and the config, the model and the pipeline of each generator. They are
imported when they are first used, so that `import lumos` loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import Any

from lumos.version import __version__ as __version__


def _places() -> dict[str, str]:
    """Return the place of each public class as "module:Name", by its name."""
    from lumos.registry import generators

    places = ["lumos.pipeline.base:VideoPipeline"]
    places += [place for found in generators().values() for place in (found.config, found.model, found.pipeline)]
    return {place.partition(":")[2]: place for place in places}


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name and return the value, which this module then keeps."""
    if name == "__all__":
        return ["__version__", *_places()]
    # Only names of classes are looked up: Python asks for a submodule here first when it imports one, the registry too.
    place = _places().get(name) if name[:1].isupper() else None
    if place is None:
        raise AttributeError(f"module 'lumos' has no attribute {name!r}")
    from lumos.registry import load

    value = globals()[name] = load(place)
    return value


def __dir__() -> list[str]:
    return __getattr__("__all__")
