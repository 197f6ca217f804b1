"""A shorter import of transformers, for a process that makes one clip and ends.

The module of `PreTrainedModel` imports packages for uses that a clip does not have: scipy for losses of object detection,
accelerate and torch.distributed for models on several devices, and torch's compiler, with sympy, because some functions carry
marks for it. These imports take about as long as torch itself. All are optional in transformers, which runs without them where
they are not installed. The package itself reads the files of all models that it has, some 2,500, to know which names it offers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

OPTIONAL = ("is_scipy_available", "is_accelerate_available", "is_torch_distributed_available")
"""Functions of transformers.utils that tell whether an optional package is there."""
COMPILER = "torch._dynamo"
MODELS = "transformers.modeling_utils"
PACKAGES = ("transformers", "transformers.models")
"""The packages that read the files of all models when they are imported."""


class Marks(ModuleType):
    """Stands for torch's compiler while transformers is imported. Its marks of functions mark nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mark


def mark(function: Any = None, *args: Any, **options: Any) -> Any:
    """Return a function as it is. Without a function, return a decorator that does so."""
    return mark if function is None else function


class Unread(ModuleType):
    """Stands for a package whose own file has not run. The package is imported when it is asked for a name beside its modules."""

    def __getattr__(self, name: str) -> Any:
        package, place = self.__name__, f"{self.__name__}.{name}"
        if name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if find_spec(place) is not None:
            return import_module(place)
        if sys.modules.get(package) is self:
            del sys.modules[package]
        return getattr(import_module(package), name)


def leave_unread(package: str) -> None:
    """Put an `Unread` in the place of a package that is not imported yet."""
    module = sys.modules[package] = module_from_spec(find_spec(package))
    module.__class__ = Unread
    parent, _, name = package.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)
    else:
        module.__version__ = metadata.version(package)


def import_lean() -> bool:
    """Import the module of PreTrainedModel without the optional packages, and return whether that was possible.

    Use it only in a process of one's own that neither compiles nor spreads a model over devices: other models of transformers
    in this process would miss what was left out. If transformers or torch's compiler is already imported, or if transformers needs
    more of the compiler than marks, nothing is left out, and a later import is the usual one.
    """
    if PACKAGES[0] in sys.modules or COMPILER in sys.modules:
        return False
    import torch  # noqa: F401

    if COMPILER in sys.modules:
        return False
    for package in PACKAGES:
        leave_unread(package)
    with suppress(ImportError, AttributeError, TypeError), without_options():
        import_module(MODELS)
    if MODELS in sys.modules:
        return True
    for package in PACKAGES:
        if isinstance(sys.modules[package], Unread):
            del sys.modules[package]
    return False


@contextmanager
def without_options() -> Iterator[None]:
    """Inside, transformers takes the optional packages for not installed, and `Marks` stands for torch's compiler."""
    import torch
    import transformers.utils.import_utils

    usual = {(place, name): getattr(place, name) for place in (transformers.utils, transformers.utils.import_utils)
             for name in OPTIONAL if hasattr(place, name)}  # fmt: skip
    for place, name in usual:
        setattr(place, name, bool)  # bool() is False
    sys.modules[COMPILER] = torch._dynamo = Marks(COMPILER)
    try:
        yield
    finally:
        del sys.modules[COMPILER], torch._dynamo
        for (place, name), function in usual.items():
            setattr(place, name, function)
