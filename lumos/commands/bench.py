"""`bench`: measure speed and memory on this machine.

The forms of a comparison are measured in the same run. The last line of the output is JSON. A target that measures whole processes,
not parts of a generator, is a module bench_NAME.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from typing import Any

from lumos import registry
from lumos.benchmarks import targets
from lumos.cli import add_json
from lumos.commands import subcommands
from lumos.commands.counts import MAX_CLIPS, check_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    known = targets()
    whole = subcommands.found("bench")
    told = f"{', '.join(known)}, all of these, or {', '.join(whole)}"
    names = parser.add_subparsers(dest="target", metavar="TARGET", required=True, help=told)
    for name, text in {**{name: benchmark.summary for name, benchmark in known.items()}, "all": "all of them"}.items():
        sub = names.add_parser(name, description=text, help=text)
        add_json(sub)
        add = sub.add_argument
        add("--repetitions", type=int, default=3, help="number of timed runs (the median counts) or clips; default: %(default)s")
        add("--device", help="cpu or cuda; default: cuda if there is one")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")
        add("--output", help="also write the result to this JSON file")
        for target in known if name == "all" else (name,):
            registry.load(known[target].arguments)(sub)
    for name, path in whole.items():
        module, text = import_module(path), subcommands.summary(path)
        sub = names.add_parser(name, description=text, help=text)
        add_json(sub)
        module.add_arguments(sub)
        sub.set_defaults(whole=module)


def run(args: argparse.Namespace) -> dict[str, Any]:
    # Targets that measure whole processes must not compute before they fork, because threads do not survive a fork.
    result = args.whole.run(args) if hasattr(args, "whole") else run_targets(args)
    if not getattr(args, "json", False):  # the last line of a bench is its result, with the tables or without
        print(json.dumps(result))
    return result


def run_targets(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lumos.errors import UserError
    from lumos.files import check_writable, write_json
    from lumos.runtime import pick_device

    check_counts(args, repetitions=(1, MAX_CLIPS))
    device = pick_device(args.device)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device} cannot be measured here; give cpu{' or cuda' if torch.cuda.is_available() else ''}")
    if args.output:
        check_writable(args.output)
    # check the settings of all targets before the first one starts
    known = targets()
    names = known if args.target == "all" else (args.target,)
    chosen = {name: registry.load(known[name].module).settings_from(args) for name in names}

    result = measure(args, str(device), chosen)
    if args.output:
        write_json(args.output, result)
    return result


def measure(args: argparse.Namespace, device: str, chosen: dict) -> dict:
    """Run the chosen targets (name -> settings) one after the other, print a table for each and return all results."""
    import torch

    from lumos.benchmarks.measure import Bench, hardware, render_table, rounded
    from lumos.device_peak import matrix_peak_gflops
    from lumos.progress import progress_bar
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
        with progress_bar(desc=name, leave=False) as bar:
            bench = Bench(**common, peak_gflops=peaks, step=bar.update)
            bar.reset(module.steps(settings, bench))
            report = module.run(settings, bench)
        print(f"\n{name}: {targets()[name].summary}")
        print("\n\n".join(render_table(table) for table in report.tables), flush=True)
        result["settings"][name], result["measured"][name] = report.settings, report.measured
        result["ratios"][name] = report.ratios
    print()
    return result
