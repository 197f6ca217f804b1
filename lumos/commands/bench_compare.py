"""`bench compare`: times of several results of one machine, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lumos.progress import LOGGER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", metavar="FILE", help="two or more JSON files that `bench TARGET --output` wrote")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the times side by side and return them. Raises UserError for results of different machines."""
    from lumos.benchmarks.compare import common_times, different_settings, machine_of, read_result
    from lumos.benchmarks.measure import ratio, render_table, shown
    from lumos.errors import UserError

    if len(set(args.results)) < 2:
        raise UserError("bench compare needs two different files or more")
    results = {path: read_result(path) for path in args.results}
    seconds = common_times(results)
    for target in different_settings(results):
        LOGGER.warning(f"note: {target} was measured with different settings")
    rows = [[place, *map(shown, spent), shown(ratio(spent[0], spent[-1]))] for place, spent in seconds.items()]
    print(render_table([["seconds", *(Path(path).name for path in results), "first / last"], *rows]))
    machine = machine_of(results[args.results[0]])
    return {"bench": "compare", "machine": machine, "files": list(results), "seconds": seconds}
