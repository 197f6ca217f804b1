"""`evaluate vbench-i2v`: make clips of VBench-I2V's prompts in its official layout, or sum up the official results."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.commands import official_benchmarks

NAME = "vbench-i2v"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    official_benchmarks.add_arguments(parser, NAME)


def run(args: argparse.Namespace) -> Any:
    return official_benchmarks.run(args, NAME)
