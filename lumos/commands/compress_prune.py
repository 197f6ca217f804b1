"""`compress prune`: write a smaller model, without the layers of a plan."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lumos.cli import add_json
from lumos.commands.scoring import MEASURES, add_clips, add_measures, kind_of
from lumos.progress import LOGGER

if TYPE_CHECKING:
    from lumos.compression.networks import Network
    from lumos.compression.plans import Plan

RULES = ("spaced", "least", "magnitude", "taylor", "learned", "middle", "bk", "shallow", "deep", "random", "scratch")
SPACED_FROM = 0.3
"""The share of removed units from which `spaced` is the default plan; below it is `least`."""
UNITS = (("parameters", 1, ""), ("weight_bytes", 2**20, " MiB"), ("flops", 1e9, " GFLOP"), ("kv_bytes", 2**20, " MiB"),
         ("seconds", 1, " s"))  # fmt: skip
NAMES = {
    "units": "units", "parameters": "parameters", "weight_bytes": "weights", "flops": "FLOPs of a clip", "kv_bytes": "KV cache",
    "seconds": "predicted seconds of a clip",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--model", required=True, help="model folder, or the folder of a video tokenizer")
    add("--part", choices=("model", "decoder"), help="model, or decoder: that of the video tokenizer of the folder; "
        "default: model, decoder for the folder of a tokenizer")  # fmt: skip
    add("--keep", type=int, help="number of units that stay")
    add("--plan", help=f"rule ({', '.join(RULES)}), a plan of the network's own (shallow of a decoder), or a JSON file of a plan; "
        f"default: spaced if at least {SPACED_FROM:.0%}% of the units go, else least")  # fmt: skip
    add("--units", help="kind of units: layer or block for whole ones (default), temporal, cross, mlp, idle")
    add("--remove", nargs="+", default=[], metavar="UNIT", help="units to remove beside those of the plan, or in place of a plan")
    add("--size", nargs="+", default=[], metavar="NAME=VALUE", help="sizes of the network to make smaller, for example "
        "intermediate_size=640 (Lumos-1), mlp_ratio=3 (STIV), decoder_channels=64 (decoder)")  # fmt: skip
    add("--measure", choices=MEASURES, help="importance for the plan least; default: loss")
    add("--scores", help="file of `compress score`: score once; default: score again after each removal")
    add("--allow-ends", action="store_true", help="let the plan remove the first and the last unit too")
    add("--seed", type=int, default=0, help="seed of the plans random and learned, of the first clip of frechet, "
        "and of the new weights of scratch; default: %(default)s")  # fmt: skip
    add("--out", help="folder to write; it must not exist yet")
    add("--plan-out", help="JSON file for the plan, to read or edit it and to give it as --plan")
    add("--dry-run", action="store_true", help="print the table only, and write no folder")
    add_measures(parser)
    add_clips(parser, 16)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lumos.commands.counts import MAX_SEED, check_counts
    from lumos.compression.networks import in_one_place, network_of
    from lumos.compression.pruning import predict, prune
    from lumos.device_peak import peak_flops
    from lumos.errors import UserError, printable
    from lumos.files import check_new, check_outputs
    from lumos.runtime import pick_device

    check_counts(args, seed=(0, MAX_SEED))
    if args.out is None and not args.dry_run:
        raise UserError("give --out FOLDER to write the smaller model, or --dry-run to see the table only")
    if args.out is not None and not args.dry_run:
        check_new(args.out)
    check_outputs((), [args.plan_out, None if args.dry_run else args.out])
    network = network_of(args.model, args.part)
    plan = chosen_plan(args, network)
    device = pick_device(args.device)
    predicted = predict(network, plan, peak_flops(device, torch.float32 if device.type == "cpu" else torch.bfloat16, None)[0])
    print(printable(f"plan {plan.plan}: removes {', '.join(plan.remove) or 'no unit'}"
                    + "".join(f", {name} becomes {size}" for name, size in plan.sizes.items())))  # fmt: skip
    print("\n".join(table(predicted.before, predicted.after, plan.units)))
    for warning in predicted.warnings:
        LOGGER.warning(printable(f"warning: {warning}"))
    if not args.dry_run:
        prune(network, plan, args.out, args.scores)
    if args.plan_out is not None:  # perhaps in the new folder
        plan.write(args.plan_out)
        print(printable(args.plan_out))
    if not args.dry_run:
        following = shlex.join(["compress", "report", "--models", args.model, args.out])
        print(printable(f"{args.out}  is written; python -m lumos {following}  shows what it lost"))
    return {"parent": in_one_place(network.folder), "sha256": network.sha256, "part": network.part, "kept": predicted.kept,
            "before": predicted.before, "after": predicted.after}  # fmt: skip


def chosen_plan(args: argparse.Namespace, network: Network) -> Plan:
    """Return the plan that the options describe. Raises UserError for options that contradict each other."""
    from lumos.compression.plans import read_plan
    from lumos.compression.prunable import check_known
    from lumos.errors import UserError, shown

    whole, sizes = network.on_meta(), dict(map(size_of, args.size))
    if len(sizes) < len(args.size):
        raise UserError("--size names a size twice; name it once")
    if args.plan is not None and args.plan.endswith(".json"):
        if args.keep is not None or args.units is not None:
            raise UserError("--keep and --units have no effect with a plan file, which names the units; leave them out")
        plan = read_plan(args.plan, network.sha256, network.part)
        if plan.units and plan.units not in whole.unit_kinds:
            raise UserError(f"{args.plan}: units is {shown(plan.units)}; allowed: {', '.join(whole.unit_kinds)}")
    else:
        plan = plan_by_rule(args, network, whole, bool(sizes))
    kind = kind_of(whole, plan.units or None)
    plan = replace(plan, units=kind, remove=(*plan.remove, *args.remove), sizes=plan.sizes | sizes)
    check_known(plan.remove, [name for kind in whole.unit_kinds for name in whole.units(kind)])
    if twice := [name for i, name in enumerate(plan.remove) if name in plan.remove[:i]]:
        raise UserError(f"--remove {twice[0]} is removed already; leave it out")
    if not (plan.remove or plan.sizes or plan.new):
        raise UserError("the plan removes no unit and makes no size smaller; name units with --keep, --remove or in the plan file")
    return plan


def plan_by_rule(args: argparse.Namespace, network: Network, whole: Any, has_sizes: bool) -> Plan:
    """Return the plan of --plan and --keep, before --remove and --size."""
    from lumos.compression.plans import OF_SCORES, Plan, check_keep
    from lumos.errors import UserError, instead, shown

    kind, own, usual = kind_of(whole, args.units), whole.named_plans(), next(iter(whole.unit_kinds))
    units = list(whole.units(kind))
    facts = {"part": network.part, "units": kind, "seed": args.seed, "parent": str(args.model), "sha256": network.sha256}
    if args.keep is None and args.plan in own:
        return Plan(args.plan, remove=own[args.plan], **facts)
    if args.keep is None and args.plan is None and (args.remove or has_sizes):
        return Plan("file", remove=(), **facts)
    if args.keep is None:
        raise UserError(f"--keep is missing: say how many of the {len(units)} units stay"
                        + (f", or name --plan {next(iter(own))}" if own else ""))  # fmt: skip
    ends = args.allow_ends or network.ends
    check_keep(units, args.keep, 1 if network.part == "model" and kind == usual else 0, ends)
    rule = args.plan or usual_rule(args.keep, len(units))
    if rule not in RULES:
        raise UserError(f"--plan {shown(rule)} is unknown{instead(rule, (*RULES, *own))}, or a JSON file of a plan")
    for flag, given in (("--scores", args.scores), ("--measure", args.measure)):
        if given is not None and rule not in OF_SCORES:
            raise UserError(f"{flag} has no effect with the plan {rule}; leave it out")
    removed = removed_units(args, network, rule, kind, units, ends)
    return Plan(rule, remove=tuple(removed), new=rule == "scratch", **facts)


def usual_rule(keep: int, count: int) -> str:
    """Return the rule of the default plan that keeps `keep` of `count` units."""
    return "spaced" if 1 - keep / count >= SPACED_FROM else "least"


def removed_units(args: argparse.Namespace, network: Network, rule: str, kind: str, units: list[str], ends: bool) -> list[str]:
    """Return the units that a rule removes; scores are read or made if the rule needs them."""
    from lumos.commands.scoring import Scorer, distances_of, importance, read_scores
    from lumos.compression.plans import OF_SCORES, greedy, removed_by
    from lumos.errors import UserError

    if rule not in OF_SCORES:
        return removed_by(rule, units, args.keep, seed=args.seed, ends=ends)
    own = {"middle": "bi", "magnitude": "magnitude", "taylor": "taylor", "learned": "learned"}
    measure = own.get(rule) or args.measure or "loss"
    if args.measure not in (None, measure):
        raise UserError(f"--measure {args.measure} has no effect with the plan {rule}; leave it out")
    if args.scores is None and rule == "least":
        scorer = Scorer(args, network, [measure])
        return greedy(units, args.keep, lambda removed: importance(scorer.score(kind, removed), measure), ends)
    scores = Scorer(args, network, [measure]).score(kind) if args.scores is None else read_scores(args.scores, network, kind)
    if rule == "middle":
        return removed_by(rule, units, args.keep, ends=ends, distances=distances_of(scores, len(units)))
    return removed_by(rule, units, args.keep, ends=ends, scores=importance(scores, measure))


def size_of(text: str) -> tuple[str, int]:
    """Return the name and the value in NAME=VALUE. Raises UserError for another form."""
    from lumos.errors import UserError, shown

    name, equals, value = text.partition("=")
    if not equals or not value.isdecimal():
        raise UserError(f"--size {shown(text)} is not of the form NAME=VALUE, for example intermediate_size=640")
    return name, int(value)


def table(before: dict[str, Any], after: dict[str, Any], kind: str) -> list[str]:
    """Return the lines of the table: what the network has and costs, before and after."""
    rows = [[f"units ({kind})", f"{before['units']:,}", f"{after['units']:,}", ""]]
    for name, scale, unit in UNITS:
        if name in before:
            cells = [f"{value / scale:,.4g}{unit}" if unit else f"{value:,}" for value in (before[name], after[name])]
            share = 1 - after[name] / before[name] if before[name] else 0
            rows.append([NAMES[name], *cells, f"-{share:.1%}"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}} -> {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
