"""`experiment`: train and evaluate the variants in an experiment's YAML, and write the comparison as JSON and PNG."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lumos.commands.counts import check_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="YAML", help="the experiment, for example configs/experiments/positions.yaml")
    add("--out", help="path of the two files to write, without suffix; default: docs/results/<name of the YAML>")
    add("--runs", help="folder of the runs; default: runs/experiments/<name of the YAML>")
    add("--parallel", type=int, default=1, help="number of runs at a time, which share the cores; default: %(default)s")
    add("--list", action="store_true", help="print the commands that are not done yet, without running them")


def run(args: argparse.Namespace) -> None:
    from lumos.errors import printable
    from lumos.evaluation.experiments import results, runs
    from lumos.evaluation.experiments.settings import load
    from lumos.evaluation.experiments.tables import claims_table
    from lumos.files import check_outputs
    from lumos.progress import progress_bar
    from lumos.threads import MAX_THREADS

    check_counts(args, parallel=(1, MAX_THREADS))
    experiment = load(args.config)
    name = Path(args.config).stem
    out = Path(args.out or Path("docs") / "results" / name)
    jobs = runs.jobs(experiment, Path(args.runs or Path("runs") / "experiments" / name))
    if args.list:
        for job in jobs:
            for _, command in job.missing():
                print(printable(shlex.join(["python", "-m", "lumos", *command])))
        return
    places = [results.named(out, suffix) for suffix in (".json", ".png")]
    check_outputs(others=places)
    for job in jobs:
        list(job.missing())  # raises an error for a folder of another command before the first run starts
    with progress_bar(total=len(jobs), unit="run") as bar:
        runs.run(jobs, args.parallel, bar.update)
    result = results.gather(experiment, jobs)
    results.write(experiment, result, out)
    for variant, row in result["variants"].items():
        figures = (f"{name} {mean:.3f}" + f" ± {spread:.3f}" * (spread > 0) for name, (mean, spread) in row["summary"].items())
        print(f"{printable(variant):24}  {'  '.join(figures)}")
    for line in claims_table([result]).splitlines() if result["claims"] else ():
        print(printable(line))
    print(printable("  ".join(map(str, places))))
