"""Flags of the measurements that only Lumos-1 has. They have a file of their own so that `--help` does not load torch."""

from __future__ import annotations

import argparse

from lumos.models.lumos1.settings import MASK_KINDS


def loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mask", choices=MASK_KINDS, default="tube", help="mask pattern; default: tube")
    parser.add_argument(
        "--bins", type=int, default=10, help="number of equal bins for the mask ratio from 0 to 1; default: %(default)s"
    )
