"""`evaluate`: measure a model or a tokenizer.

Each measurement is a file `evaluate_NAME.py` in this folder, see `lumos.commands.subcommands`.
"""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json
from lumos.commands import subcommands


def measurements() -> dict[str, str]:
    """Return the modules of all measurements by name."""
    return subcommands.found("evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    subcommands.add(parser, measurements())


def run(args: argparse.Namespace) -> Any:
    return args.module.run(args)
