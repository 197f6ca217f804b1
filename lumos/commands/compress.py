"""`compress`: make a model smaller and faster, and measure what that costs.

Each step is a file `compress_NAME.py` in this folder, see `lumos.commands.subcommands`.
"""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json
from lumos.commands import subcommands

STEPS = """A model becomes smaller and faster in four steps:

  1. score     say how much each layer matters
               python -m lumos compress score --model checkpoints/lumos-tiny
  2. prune     write a smaller model, without the layers of a plan; it loads like any other
               python -m lumos compress prune --model checkpoints/lumos-tiny --keep 5 --out runs/small
  3. distill   train the smaller model with the larger one as its teacher, to win back what was lost
               python -m lumos compress distill --config configs/compression/lumos-tiny.yaml
  4. report    compare the models: parameters, seconds of a clip, prompts followed
               python -m lumos compress report --models checkpoints/lumos-tiny runs/small runs/lumos-mini/export

  `auto` does all four for a wanted speed:
               python -m lumos compress auto --model checkpoints/lumos-tiny --target-speedup 1.5 --out runs/faster

`python -m lumos compress STEP --help` lists the options of a step. Steps:"""


def steps() -> dict[str, str]:
    """Return the modules of all steps by name."""
    return subcommands.found("compress")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    subcommands.add(parser, steps(), required=False)


def run(args: argparse.Namespace) -> Any:
    if args.module is None:
        print(STEPS)
        print("\n".join(f"  {name:12}{subcommands.summary(path)}" for name, path in steps().items()))
    else:
        return args.module.run(args)
