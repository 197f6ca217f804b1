"""`evaluate geneval`: draw pictures of GenEval's prompts in its official layout, or sum up the official results."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.commands import official_benchmarks

NAME = "geneval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    official_benchmarks.add_arguments(parser, NAME)


def run(args: argparse.Namespace) -> Any:
    return official_benchmarks.run(args, NAME)
