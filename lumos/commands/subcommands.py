"""Verbs whose first argument names a module: `evaluate NAME` is in evaluate_name.py, `compress NAME` in
compress_name.py, and some of `bench NAME` in bench_name.py.

Such a module has `add_arguments(parser)` and `run(args)`, like a verb, and a docstring "`verb name`: what it does", which is
its help text.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Any

from lumos import commands
from lumos.cli import Parser


def found(verb: str) -> dict[str, str]:
    """Return the modules of a verb by name (`vbench-i2v` for evaluate_vbench_i2v.py)."""
    prefix = f"{verb}_"
    modules = (found.name for found in pkgutil.iter_modules(commands.__path__) if found.name.startswith(prefix))
    return {name.removeprefix(prefix).replace("_", "-"): f"{commands.__name__}.{name}" for name in sorted(modules)}


def add(parser: argparse.ArgumentParser, modules: dict[str, str], required: bool = True) -> None:
    """Add a parser for each module. `args.module` is then the chosen module, None without a name."""
    what = parser.add_subparsers(dest="what", metavar="|".join(modules), required=required, parser_class=lazy(type(parser)))
    parser.set_defaults(module=None)
    for name, path in modules.items():
        module, text = importlib.import_module(path), summary(path).replace("%", "%%")
        sub = what.add_parser(name, description=text, help=text)
        sub.fill = module.add_arguments
        sub.set_defaults(module=module)


def summary(path: str) -> str:
    """Return what the docstring of a module says of it."""
    return importlib.import_module(path).__doc__.splitlines()[0].partition(": ")[2]


def lazy(kind: type[Parser]) -> type[Parser]:
    """Return a subclass of a parser class that calls its `fill` to add arguments when it first parses.

    So only the module in use pays for the imports that its arguments need. It parses all words that it gets, as the parser of
    a verb does, so that overrides may stand anywhere and the message on a wrong option is of its own options.
    """

    class LazyParser(kind):
        is_filled = False

        def parse_known_args(
            self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
        ) -> tuple[argparse.Namespace, list[str]]:
            if self.is_filled:
                return super().parse_known_args(args, namespace)
            self.is_filled = True
            self.fill(self)
            return self.parse_all(args), []

    return LazyParser


def typed(verb: str, words: list[str]) -> Any:
    """Run a verb, such as "ingest" or "compress prune", with the words that a user would type after it; return its result."""
    module = importlib.import_module(f"{commands.__name__}.{verb.replace(' ', '_').replace('-', '_')}")
    parser = Parser(prog=f"lumos {verb}")
    module.add_arguments(parser)
    return module.run(parser.parse_all(words))
