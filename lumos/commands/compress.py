"""`compress`: make a model smaller."""

from __future__ import annotations

import argparse

from lumos.commands import compress_diffusers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="diffusers", required=True)
    text = compress_diffusers.__doc__.partition(": ")[2]
    sub = what.add_parser("diffusers", description=text, help=text)
    compress_diffusers.add_arguments(sub)
    sub.set_defaults(compress=compress_diffusers.run)


def run(args: argparse.Namespace) -> None:
    args.compress(args)
