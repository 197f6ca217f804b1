"""`evaluate`: measure a model. Each measurement is a file `evaluate_NAME.py` beside this one and is found by its name.

Such a file is a small verb of its own: add_arguments(parser), run(args), and a docstring "`evaluate NAME`: what it measures."
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Any

from lumos import commands

PREFIX = "evaluate_"


def measurements() -> dict[str, str]:
    """Name of each measurement as it is typed (`vbench-i2v` for evaluate_vbench_i2v.py) -> its module."""
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
    """A parser that adds its arguments, by its `fill`, when it parses: some need imports that the others need not wait for."""

    class LazyParser(kind):
        def parse_known_args(self, *args: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
            self.fill(self)
            return super().parse_known_args(*args, **options)

    return LazyParser


def run(args: argparse.Namespace) -> None:
    args.measure(args)
