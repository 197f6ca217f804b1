"""`compress`: make a model smaller and faster, and measure what that costs."""

from __future__ import annotations

import argparse

from lumos.commands import compress_distill

STEPS = {"distill": compress_distill}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", metavar=" | ".join(STEPS), required=True)
    for name, module in STEPS.items():
        text = module.__doc__.partition(": ")[2]
        step = steps.add_parser(name, description=text, help=text)
        module.add_arguments(step)
        step.set_defaults(run_step=module.run)


def run(args: argparse.Namespace) -> None:
    args.run_step(args)
