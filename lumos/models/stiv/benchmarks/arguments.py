"""Flags of the benchmark of STIV. They have a file of their own so that `--help` does not load torch."""

from __future__ import annotations

import argparse

SIZES = ("tiny", "large", "micro")
PARTS = ("sampling", "memory", "training")


def stiv(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=["tiny", "large"], metavar="SIZE",
        help="transformers of STIV whose sampling step is measured: tiny (17 frames of 8 x 8 latents, 8 layers of 192), large (16 "
             "frames of 32 x 32 latents, 12 layers of 512) or micro; the training step is that of the last one; "
             "default: tiny large")  # fmt: skip
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help="what to measure of STIV: sampling, memory and training (time) of a step; default: all three")  # fmt: skip
