"""`compress score`: say how much each layer of a model matters, for content and for motion."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lumos.cli import add_json
from lumos.commands.scoring import MEASURES, add_clips, add_measures

USUAL = ("loss", "bi", "output")
PICTURES = (".png", ".svg", ".pdf")
MARKED = ("spaced", "shallow", "middle")
"""Plans whose removals the table marks, beside least by each measure."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--model", required=True, help="model folder, or the folder of a video tokenizer")
    add("--part", choices=("model", "decoder"), help="model, or decoder: that of the video tokenizer of the folder; "
        "default: model, decoder for the folder of a tokenizer")  # fmt: skip
    add("--units", help="kind of units: layer or block for whole ones (default), attention, mlp, temporal, cross, ...")
    add("--measures", nargs="+", choices=MEASURES, default=list(USUAL), help=f"what to measure; default: {' '.join(USUAL)}")
    add("--keep", type=int, help="units that the marked plans keep; default: three quarters")
    add("--output", default="scores.json", help="JSON file for all scores; default: %(default)s")
    add("--picture", help=f"picture of importance over depth ({', '.join(PICTURES)}); default: beside --output, as .png")
    add("--seed", type=int, default=0, help="learned, frechet: seed of draws and of the first clip; default: %(default)s")
    add_measures(parser)
    add_clips(parser, 64)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.commands.scoring import Scorer, kind_of
    from lumos.compression.figure import draw
    from lumos.compression.networks import in_one_place, network_of
    from lumos.errors import UserError, printable
    from lumos.files import check_outputs, write_json
    from lumos.runtime import versions

    picture = args.picture or str(Path(args.output).with_suffix(".png"))
    if not picture.lower().endswith(PICTURES):
        raise UserError(f"--picture {picture} has no suffix of {', '.join(PICTURES)}")
    check_outputs((), [args.output, picture])
    if args.picture and find_spec("matplotlib") is None:
        raise UserError("--picture needs matplotlib; install it with pip install 'lumos-video[plot]', or leave it out")
    network = network_of(args.model, args.part)
    whole = network.on_meta()
    kind = kind_of(whole, args.units)
    units = whole.units(kind)
    if len(units) < 2:
        raise UserError(f"{args.model} has {len(units)} units of the kind {kind}; there is nothing to compare")
    measures = [name for name in MEASURES if name in args.measures]
    if "bi" in measures and args.measures == list(USUAL) and kind != next(iter(whole.unit_kinds)):
        measures.remove("bi")  # it is a measure of whole layers only
    keep = min(len(units) - 1, round(0.75 * len(units))) if args.keep is None else args.keep
    if not 1 <= keep < len(units):
        raise UserError(f"--keep {keep} is not allowed; there are {len(units)} units: give 1 to {len(units) - 1}")
    scorer = Scorer(args, network, measures)
    found = scorer.score(kind)
    marks = removed_by_plans(found, measures, keep, network.ends)
    print("\n".join(map(printable, table(found["units"], measures, marks, keep))))
    if trend := found["motion_trend"]:
        low, high = trend["interval"]
        print(f"rank correlation of the motion share with depth: {trend['correlation']:.2f}; 95 % interval over {trend['clips']} "
              f"clips: {low:.2f} to {high:.2f}")  # fmt: skip
    result = {
        "compress": "score", "model": in_one_place(args.model), "sha256": network.sha256, "part": network.part, "units": kind,
        "measures": measures, "data": scorer.data, "clips": args.clips, "loss": found["loss"], "scores": found["units"],
        "distances": found["distances"], "motion_trend": found["motion_trend"], **scorer.facts, **versions(),
    }  # fmt: skip
    write_json(args.output, result)
    print(printable(args.output))
    if args.picture or find_spec("matplotlib") is not None:
        draw(found["units"], measures, f"{args.model}: {kind}", picture)
        print(printable(picture))
    else:
        print("no picture: it needs matplotlib; pip install 'lumos-video[plot]'")
    return {key: result[key] for key in ("compress", "model", "sha256", "part", "units", "clips", "loss")}


def removed_by_plans(found: dict[str, Any], measures: list[str], keep: int, ends: bool) -> dict[str, list[str]]:
    """Return {plan: units that it would remove to keep `keep`}: the plans of MARKED, and least by each measure."""
    from lumos.commands.scoring import importance
    from lumos.compression.plans import removed_by
    from lumos.errors import UserError

    names, marks = list(found["units"]), {}
    for plan in (*MARKED, *measures):
        try:
            if plan in measures:
                marks[plan] = removed_by("least", names, keep, ends=ends, scores=importance(found, plan))
            elif plan != "middle" or found["distances"]:
                marks[plan] = removed_by(plan, names, keep, ends=ends, distances=found["distances"])
        except (UserError, ValueError):  # the plan does not work for these numbers
            continue
    return marks


def table(units: dict[str, dict[str, Any]], measures: list[str], marks: dict[str, list[str]], keep: int) -> list[str]:
    """Return the lines of the table: a line a unit, with its scores and the plans that would remove it if `keep` units stay."""
    columns = ["parameters", "time_share"]
    for measure in measures:
        columns += ["output", "motion_share"] if measure == "output" else [measure]
    groups = list(dict.fromkeys(name for entry in units.values() for name in entry.get("loss_by", {}).get("frames", {})))
    heads = ["unit", "parameters", "time", *columns[2:], *(f"loss, {name}" for name in groups), f"removed by, if {keep} stay"]
    rows = [heads]
    for name, entry in units.items():
        by = entry.get("loss_by", {}).get("frames", {})
        values = [entry.get(column) for column in columns] + [by.get(group) for group in groups]
        rows.append([name, *map(cell, columns + ["loss"] * len(groups), values), " ".join(p for p in marks if name in marks[p])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return ["  ".join((cell.rjust, cell.ljust)[i in (0, len(heads) - 1)](widths[i]) for i, cell in enumerate(row)).rstrip()
            for row in rows]  # fmt: skip


def cell(column: str, value: float | None) -> str:
    """Return a value as text; "-" stands for a value that is not defined."""
    if value is None:
        return "-"
    if column == "parameters":
        return f"{value:,}"
    return f"{value:.1%}" if column.endswith("share") else f"{value:.4g}"
