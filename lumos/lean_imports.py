"""A shorter import of transformers, for a process that makes one clip and ends.

The module of `PreTrainedModel` imports packages for uses that a clip does not have: scipy for losses of object detection,
accelerate and torch.distributed for models on several devices, and torch's compiler, with sympy, because some functions carry
marks for it. These imports take about as long as torch itself. All are optional in transformers, which runs without them where
they are not installed.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

OPTIONAL = ("is_scipy_available", "is_accelerate_available", "is_torch_distributed_available")
"""Functions of transformers.utils that tell whether an optional package is there."""
COMPILER = "torch._dynamo"
MODELS = "transformers.modeling_utils"


class Marks(ModuleType):
    """Stands for torch's compiler while transformers is imported. Its marks of functions mark nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mark


def mark(function: Any = None, *args: Any, **options: Any) -> Any:
    """Return a function as it is. Without a function, return a decorator that does so."""
    return mark if function is None else function


def import_lean() -> bool:
    """Import the module of PreTrainedModel without the optional packages, and return whether that was possible.

    Use it only in a process of one's own that neither compiles nor spreads a model over devices: other models of transformers
    in this process would miss what was left out. If the module or torch's compiler is already imported, or if transformers needs
    more of the compiler than marks, nothing is left out, and a later import is the usual one.
    """
    if MODELS in sys.modules or COMPILER in sys.modules:
        return False
    import torch
    import transformers.utils.import_utils

    if COMPILER in sys.modules:
        return False
    usual = {(place, name): getattr(place, name) for place in (transformers.utils, transformers.utils.import_utils)
             for name in OPTIONAL if hasattr(place, name)}  # fmt: skip
    for place, name in usual:
        setattr(place, name, bool)  # bool() is False
    sys.modules[COMPILER] = torch._dynamo = Marks(COMPILER)
    try:
        with suppress(ImportError, AttributeError, TypeError):
            import transformers.modeling_utils
    finally:
        del sys.modules[COMPILER], torch._dynamo
        for (place, name), function in usual.items():
            setattr(place, name, function)
    return MODELS in sys.modules
