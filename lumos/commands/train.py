"""`train`: train or fine-tune a generator from a YAML config; `section.key=value` arguments override it."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, for example configs/lumos1/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, for example training.max_steps=200")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")


def run(args: argparse.Namespace) -> None:
    from lumos.training.loop import train
    from lumos.training.settings import load_settings

    train(load_settings(args.config, args.overrides))
