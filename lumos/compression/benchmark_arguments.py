"""Flags of the benchmark of compression. They have a file of their own so that `--help` does not load torch."""

from __future__ import annotations

import argparse

PARTS = ("scoring", "steps", "memory")


def compress(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--teacher", metavar="MODEL", help="model folder whose layers are scored, and that teaches a smaller one; default: the "
        "model of the repository")  # fmt: skip
    add("--keep", type=int, help="layers of the smaller model; default: three quarters")
    add("--clips", type=int, default=4, help="clips in a forward pass and in a training step; default: %(default)s")
    add("--of-compression", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help="what to measure of compression: scoring, steps (of distillation, their time), memory; default: all")  # fmt: skip
