"""`compress distill`: train a pruned model with what it was pruned from; `section.key=value` arguments override the config."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("--config", required=True, help="YAML file, for example configs/compression/lumos-tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, for example distill.icd=0.2")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from lumos.compression.recipes import read_recipe
    from lumos.runtime import is_first_process

    settings, train = read_recipe(args.config, args.overrides)
    result = train(settings)
    return result if is_first_process() else None  # all processes of a launcher have the same result
