"""`serve`: serve the HTTP API without the page, for programs."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from lumos.commands.demo import add_server, start
from lumos.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser, port=8000, root="outputs/serve")
    parser.add_argument(
        "--api-keys", type=Path, metavar="FILE",
        help="YAML file with one client a line, NAME: KEY, or NAME: {key: KEY, queue_length: 4, clips_per_hour: 100}; requests "
             "then need the header Authorization: Bearer KEY. Default: no key is needed",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("fastapi") is None:
        raise UserError("serve needs fastapi, which is not installed; install it with pip install 'lumos-video[serve]'")
    from lumos.demo.keys import read_keys

    start(args, None, None if args.api_keys is None else read_keys(args.api_keys))
