"""`evaluate`: measure a model or a tokenizer.

Each measurement is a file `evaluate_NAME.py` in this folder. Such a file has `add_arguments(parser)` and
`run(args)`, like a verb, and a docstring "`evaluate NAME`: what it measures", which is its help text.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Any

from lumos import commands

PREFIX = "evaluate_"


def measurements() -> dict[str, str]:
    """Return the modules of all measurements by name (`vbench-i2v` for evaluate_vbench_i2v.py)."""
    modules = (found.name for found in pkgutil.iter_modules(commands.__path__) if found.name.startswith(PREFIX))
    return {name.removeprefix(PREFIX).replace("_", "-"): f"{commands.__name__}.{name}" for name in sorted(modules)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    found = measurements()
    what = parser.add_subparsers(dest="what", metavar="|".join(found), required=True, parser_class=lazy(type(parser)))
    for name, path in found.items():
        module = importlib.import_module(path)
        text = module.__doc__.splitlines()[0].partition(": ")[2].replace("%", "%%")
        sub = what.add_parser(name, description=text, help=text)
        sub.fill = module.add_arguments
        sub.set_defaults(measure=module.run)


def lazy(kind: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """Return a subclass of a parser class that calls its `fill` to add arguments when it first parses.

    So only the measurement in use pays for the imports that its arguments need.
    """

    class LazyParser(kind):
        def parse_known_args(self, *args: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
            self.fill(self)
            return super().parse_known_args(*args, **options)

    return LazyParser


def run(args: argparse.Namespace) -> None:
    args.measure(args)
