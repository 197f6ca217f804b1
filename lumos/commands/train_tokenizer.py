"""`train-tokenizer`: train a video tokenizer from a YAML config; any `key=value` behind it overrides."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, for example configs/tokenizer/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example max_steps=200")


def run(args: argparse.Namespace) -> None:
    from lumos.training.tokenizer.loop import load_settings, train

    train(load_settings(args.config, args.overrides))
