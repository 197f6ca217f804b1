"""`compress diffusers`: write a smaller copy of a U-Net or video transformer of diffusers."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json
from lumos.progress import LOGGER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--model", required=True, help="folder of the network: FOLDER/unet or FOLDER/transformer of a pipeline")
    add("--plan", required=True, help="for U-Nets vdmini, vdmini-mid, B or B-mid; for transformers spaced, shallow or deep; "
        "or a JSON file with the units to remove, whose names --dry-run shows")  # fmt: skip
    add("--keep", type=int, nargs="+", default=[], metavar="N", help="transformers: blocks to keep; HunyuanVideo has two lists "
        "of blocks and takes two numbers")  # fmt: skip
    add("--out", help="folder to write; it must not exist yet, or be empty")
    add("--variant", help="variant of the weights to read, for example fp16")
    add("--dry-run", action="store_true", help="print the table only; reads config.json alone")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.compression.diffusers_folder import check_out, weight_files, write_pruned
    from lumos.compression.diffusers_models import plan_folder
    from lumos.errors import UserError, printable

    if not args.dry_run:
        if args.out is None:
            raise UserError("give --out FOLDER, or --dry-run to see the table only")
        check_out(args.out)
    pruning = plan_folder(args.model, args.plan, args.keep)
    if not args.dry_run:
        weight_files(args.model, args.variant)
    print("\n".join(table(pruning)))
    for line in notes(pruning):
        LOGGER.warning(f"note: {line}")
    name = pruning.config["_class_name"]
    module = "diffusers" if pruning.stock else "lumos.compression.unets"
    if not args.dry_run:
        write_pruned(args.model, pruning, args.out, args.variant)
        print(printable(f"{args.out}  is written; load it with {module}.{name}.from_pretrained"))
    return {
        "parent": args.model, "plan": args.plan, "class": f"{module}.{name}", "reduced": list(pruning.reduced),
        "units": {unit: {"before": before, "after": after} for unit, before, after in pruning.rows},
        "before": {"parameters": pruning.before}, "after": {"parameters": pruning.after}, "notes": notes(pruning),
        "out": None if args.dry_run else args.out,
    }  # fmt: skip


def table(pruning) -> list[str]:
    """Return the lines of the table: a line a unit, and the sum."""
    reduced = set(pruning.reduced)
    rows = []
    for unit, before, after in pruning.rows:
        what = "reduced to its shortcut" if unit in reduced else "removed" if after < before else "kept"
        rows.append((unit, f"{before:,}", f"{after:,}", what))
    share = 1 - pruning.after / pruning.before
    rows.append(("parameters", f"{pruning.before:,}", f"{pruning.after:,}", f"{share:.1%} removed"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [f"{unit:{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}  {what}" for unit, before, after, what in rows]


def notes(pruning) -> list[str]:
    """Return what a user should know before the model is written, one line each."""
    found = []
    name = pruning.config["_class_name"]
    if not pruning.stock:
        found.append(f"stock diffusers cannot load the result; lumos.compression.unets.{name} loads it")
    if pruning.reduced:
        found.append(f"{', '.join(pruning.reduced)} cannot be removed, because a width, a size or a skip connection depends on "
                     "it; the shortcut stays")  # fmt: skip
    if pruning.after < pruning.before / 2:
        found.append("more than half of the parameters are removed; expect a long recovery")
    if ends := pruning.ends_removed():
        found.append(f"{', '.join(ends)} is at an end of its list; such blocks are the hardest to recover")
    return found
