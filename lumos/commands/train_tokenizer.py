"""`train-tokenizer`: train a video tokenizer from a YAML config; `key=value` arguments override it."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--config", required=True, help="YAML file, for example configs/tokenizer/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, for example steps=200")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from lumos.runtime import is_first_process
    from lumos.training.tokenizer.settings import load_settings
    from lumos.training.tokenizer.task import train

    result = train(load_settings(args.config, args.overrides))
    return result if is_first_process() else None  # all processes of a launcher have the same result
