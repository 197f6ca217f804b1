"""`bench`: measure speed and memory on this machine.

The forms of a comparison are measured in the same run. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys

from lumos import registry
from lumos.benchmarks import targets
from lumos.commands import bench_faults
from lumos.commands.counts import MAX_CLIPS, MAX_THREADS, check_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = targets()
    told = f"{', '.join(known)}, all of these, faults, or compare"
    names = parser.add_subparsers(dest="target", metavar="TARGET", required=True, help=told)
    for name, text in {**{name: benchmark.summary for name, benchmark in known.items()}, "all": "all of them"}.items():
        sub = names.add_parser(name, description=text, help=text)
        add = sub.add_argument
        add("--threads", type=int, help="CPU threads; default: torch's own choice")
        add("--repetitions", type=int, default=3, help="number of timed runs (the median counts) or clips; default: %(default)s")
        add("--device", help="cpu or cuda; default: cuda if there is one")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")
        add("--output", help="also write the result to this JSON file")
        for target in known if name == "all" else (name,):
            registry.load(known[target].arguments)(sub)
    kills = "kill trainings, ingests and lists of clips at random, and compare their results with uninterrupted ones"
    bench_faults.add_arguments(names.add_parser("faults", description=kills, help=kills))
    beside = "show the times of several results side by side; they must be of one machine"
    compare = names.add_parser("compare", description=beside, help=beside)
    compare.add_argument("results", nargs="+", metavar="FILE", help="two or more JSON files that --output wrote")


def run(args: argparse.Namespace) -> None:
    if args.target == "faults":  # this process must not compute anything before it forks: threads do not survive a fork
        bench_faults.run(args)
        return
    if args.target == "compare":
        compare(args.results)
        return
    import torch

    from lumos.errors import UserError
    from lumos.files import check_writable, write_json
    from lumos.runtime import pick_device

    check_counts(args, threads=(1, MAX_THREADS), repetitions=(1, MAX_CLIPS))
    device = pick_device(args.device)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device} cannot be measured here; give cpu{' or cuda' if torch.cuda.is_available() else ''}")
    if args.output:
        check_writable(args.output)
    # check the settings of all targets before the first one starts
    known = targets()
    names = known if args.target == "all" else (args.target,)
    chosen = {name: registry.load(known[name].module).settings_from(args) for name in names}

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        result = measure(args, str(device), chosen)
    finally:
        torch.set_num_threads(threads)
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))


def compare(paths: list[str]) -> None:
    """Print the times of several results side by side. Raises UserError for results of different machines."""
    from lumos.benchmarks.compare import comparison, different_settings, read_result
    from lumos.benchmarks.measure import render_table
    from lumos.errors import UserError

    if len(set(paths)) < 2:
        raise UserError("bench compare needs two different files or more")
    results = {path: read_result(path) for path in paths}
    table = comparison(results)
    for target in different_settings(results):
        print(f"note: {target} was measured with different settings", file=sys.stderr)
    print(render_table(table))


def measure(args: argparse.Namespace, device: str, chosen: dict) -> dict:
    """Run the chosen targets (name -> settings) one after the other, print a table for each and return all results."""
    import torch
    from tqdm import tqdm

    from lumos.benchmarks.measure import Bench, hardware, render_table, rounded
    from lumos.device_peak import matrix_peak_gflops
    from lumos.runtime import versions

    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    peaks = {name: matrix_peak_gflops(device, getattr(torch, name)) for name in dict.fromkeys(("float32", dtype))}
    machine, threads = hardware(device), torch.get_num_threads()
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + f", threads {threads}, dtype {dtype}")
    print("matrix product peak: " + ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in peaks.items()), flush=True)
    common = {"device": device, "dtype": dtype, "threads": threads, "repetitions": args.repetitions}
    result = {
        "target": args.target, "hardware": machine, "versions": versions(), "settings": dict(common),
        "measured": {"matrix_product_gflops": {name: rounded(value) for name, value in peaks.items()}}, "ratios": {},
    }  # fmt: skip
    for name, settings in chosen.items():
        module = registry.load(targets()[name].module)
        with tqdm(desc=name, file=sys.stderr, disable=None, leave=False) as bar:
            bench = Bench(**common, peak_gflops=peaks, step=bar.update)
            bar.reset(module.steps(settings, bench))
            report = module.run(settings, bench)
        print(f"\n{name}: {targets()[name].summary}")
        print("\n\n".join(render_table(table) for table in report.tables), flush=True)
        result["settings"][name], result["measured"][name] = report.settings, report.measured
        result["ratios"][name] = report.ratios
    print()
    return result
