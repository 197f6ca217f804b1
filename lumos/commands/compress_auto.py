"""`compress auto`: score, prune, recover and report, for a wanted speed, with good defaults; resumes where it stopped."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.cli import add_json
from lumos.commands import subcommands

if TYPE_CHECKING:
    from lumos.compression.networks import Network
    from lumos.compression.plans import Plan

WORLDS = "worlds"
MAX_STEPS = 10**8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add("--target-speedup", type=float, default=1.5, metavar="X", help="how many times as fast sampling a clip must be, by its "
        "FLOPs; as many layers stay as that allows; default: %(default)s")  # fmt: skip
    add("--data", default=WORLDS, help="folder of shards to score on and to learn from, or worlds: synthetic scenes; "
        "default: %(default)s")  # fmt: skip
    add("--out", help="folder of all results; the same command resumes where it stopped; default: runs/NAME-faster, for the "
        "folder NAME of the model")  # fmt: skip
    add("--steps", type=int, default=900, help="training steps of the recovery; 5 to 10 %% of the model's own training are usual; "
        "default: %(default)s")  # fmt: skip
    add("--clips", type=int, default=64, help="clips to score on; default: %(default)s")
    add("--count", type=int, default=50, help="prompts of each kind in the report; default: %(default)s")
    add("--kinds", nargs="+", help="kinds of prompts in the report; default: those of `compress report`")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of the recovery, for example training.lr=1e-3")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from lumos.commands.counts import MAX_CLIPS, check_counts
    from lumos.compression import auto
    from lumos.compression.networks import network_of, weights_sha256
    from lumos.compression.settings import load_settings
    from lumos.errors import UserError, printable
    from lumos.evaluation.prompts import check_kinds
    from lumos.files import file_sha256, read_json, write_bytes, write_json
    from lumos.runtime import pick_device, versions
    from lumos.stages import Stages
    from lumos.training.record import training_record

    check_counts(args, clips=(1, MAX_CLIPS), count=(1, MAX_CLIPS), steps=(1, MAX_STEPS))
    check_kinds(args.kinds or ())  # before hours of training
    if not 1 < args.target_speedup < float("inf"):
        raise UserError(f"--target-speedup {args.target_speedup:g} is not allowed; give a number above 1")
    device = str(pick_device(args.device))
    args.model, args.data = str(Path(args.model)), str(Path(args.data))  # shards/ and shards are the same for a resumed run
    network = network_of(args.model, "model")
    auto.least_pruning(network, args.target_speedup, lambda keep: plan_of(network, keep))  # a speed out of reach is an error now
    out = Path("runs") / f"{Path(args.model).resolve().name}-faster" if args.out is None else Path(args.out)
    shards = [] if args.data == WORLDS else ["--data", args.data]
    data = WORLDS if args.data == WORLDS else {path.name: file_sha256(path) for path in json_files(args.data)}
    stages, model = Stages(out), {"model": network.sha256}
    scores, pruned, config, recovered, report = (
        out / name for name in ("scores.json", "pruned", "distill.yaml", "distill/export", "report.json")
    )

    def stage(name: str, words: list[Any], result: Path, inputs: dict[str, Any]) -> None:
        words = list(map(str, words))
        print(printable(f"$ python -m lumos compress {shlex.join([name, *words])}"), flush=True)
        if not stages.run(name, result, {"command": words, **inputs}, lambda: subcommands.typed(f"compress {name}", words)):
            print(printable(f"{result} is there already"))

    settings = auto.recovery_settings(
        network, pruned, args.data, args.steps, out / "distill", training_record(network.folder)
    )
    text = "# Written by `compress auto`. An edited file is used as it is.\n" + yaml.safe_dump(settings, sort_keys=False)
    stages.run("config", config, {"settings": settings}, lambda: write_bytes(config, text.encode()))
    overrides = [*args.overrides, f"training.device={device}"]
    load_settings(config, overrides)  # a wrong override is an error before the first stage

    stage("score", ["--model", args.model, "--output", scores, "--clips", args.clips, "--device", device, *shards], scores,
          {**model, "data": data})  # fmt: skip
    found = read_json(scores, "scores of `compress score`", 2**26)
    plan, predicted, speedup = auto.least_pruning(network, args.target_speedup, lambda keep: plan_of(network, keep, found))
    keep = predicted.after["units"]
    of_scores = ["--scores", scores] if plan.plan == "least" else []
    stage("prune", ["--model", args.model, "--keep", keep, "--plan", plan.plan, "--out", pruned, *of_scores], pruned,
          {**model, "scores": file_sha256(scores) if of_scores else None})  # fmt: skip
    small = {"pruned": weights_sha256(pruned)}
    stage("distill", ["--config", config, *overrides], recovered, {**model, **small, "config": file_sha256(config), "data": data})
    kinds = ["--kinds", *args.kinds] if args.kinds else []
    stage("report", ["--models", args.model, pruned, recovered, "--count", args.count, "--output", report, "--device", device,
                     *kinds], report, {**model, **small, "recovered": weights_sha256(recovered)})  # fmt: skip
    rows = read_json(report, "the report")["models"]
    losses = read_json(recovered / "compression.json", "the record of the recovery").get("losses", {})
    print("\n" + "\n".join(map(printable, table(rows, predicted, losses))))
    first, _, last = (row["seconds"]["sampling"] for row in rows)
    summary = {
        "compress": "auto", "model": args.model, "sha256": network.sha256, "target_speedup": args.target_speedup,
        "plan": plan.plan, "removed": list(plan.remove), "kept": predicted.kept, "predicted_speedup": round(speedup, 4),
        "measured_speedup": round(first / last, 4), "steps": args.steps, "losses": losses, "models": rows, **versions(),
    }  # fmt: skip
    write_json(out / "summary.json", summary)
    print(printable(f"{recovered}  is the smaller model"))
    return summary


def json_files(folder: str) -> list[Path]:
    """Return the files that describe the shards in a folder. Raises NotFound if it has none."""
    from lumos.errors import NotFound

    found = sorted(Path(folder).glob("*.json"))
    if not found:
        raise NotFound(f"--data {folder} is no folder of shards; give one that `python -m lumos ingest` wrote, or {WORLDS}")
    return found


def plan_of(network: Network, keep: int, scores: dict[str, Any] | None = None) -> Plan:
    """Return the plan that `compress prune --keep` makes by default, from scores that were made once; without scores, spaced."""
    from lumos.commands.compress_prune import usual_rule
    from lumos.commands.scoring import importance
    from lumos.compression.plans import Plan, removed_by

    whole = network.on_meta()
    units = list(whole.units())
    rule = "spaced" if scores is None else usual_rule(keep, len(units))
    removed = removed_by(rule, units, keep, scores=importance(scores, "loss") if rule == "least" else None, ends=network.ends)
    return Plan(rule, network.part, next(iter(whole.unit_kinds)), tuple(removed), parent=str(network.folder), sha256=network.sha256)


def table(rows: list[dict[str, Any]], predicted: Any, losses: dict[str, float]) -> list[str]:
    """Return the lines of the summary: the model, what was pruned, and what was recovered, side by side."""
    first, costs = rows[0]["seconds"]["sampling"], (predicted.before, predicted.after, predicted.after)
    cells = [["", "before", "pruned", "recovered"]]
    cells.append(["layers", *(str(cost["units"]) for cost in costs)])
    cells.append(["parameters", *(f"{row['parameters']:,}" for row in rows)])
    cells.append(["GFLOP of a clip", *(f"{cost['flops'] / 1e9:,.4g}" for cost in costs)])
    cells.append(["seconds of sampling", *(f"{row['seconds']['sampling']:.3g}" for row in rows)])
    cells.append(["times as fast", *(f"{first / row['seconds']['sampling']:.2f}" for row in rows)])
    for kind in rows[0]["shares"]:
        cells.append([f"{kind}: all right", *(f"{row['shares'][kind].get('all', 0.0):.2f}" for row in rows)])
        cells.append([f"{kind}: motion", *(f"{row['shares'][kind].get('motion', 0.0):.2f}" for row in rows)])
    cells += [[f"{name}, last step", "", "", f"{value:.4g}"] for name, value in losses.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in cells]  # fmt: skip
