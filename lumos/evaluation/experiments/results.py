"""The results of an experiment: what its runs wrote, gathered in one JSON file, and drawn."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lumos.errors import RunError, UserError, reason_of
from lumos.evaluation.experiments.claims import judged
from lumos.evaluation.experiments.intervals import intervals, summary
from lumos.evaluation.experiments.runs import ExperimentJob
from lumos.evaluation.experiments.settings import Experiment
from lumos.files import read_json, write_json
from lumos.runtime import versions
from lumos.settings import is_number
from lumos.training.logging import read_lines


def results_of(job: ExperimentJob, experiment: Experiment) -> dict[str, Any]:
    """Return the results of a job that is done.

    The keys are: seed; after training, curves: {field: [[step or FLOPs, value], ...]}; after
    `evaluate prompts`, kinds: {prompt kind: {figure: share}}, shares: {figure: mean over the
    kinds}, seconds, cpu_seconds and clips. UserError for a curve that is not in the log.
    """
    found: dict[str, Any] = {"seed": job.seed}
    if job.train:
        lines = lines_of(job.log)
        known = {field for line in lines for field in line}
        if unknown := [field for field in experiment.curves if field.partition("[")[0] not in known]:
            raise UserError(f"curves: {job.log} has no {unknown[0]}; there are {', '.join(sorted(known))}")
        spent = sum(flops_until(earlier[-1]["step"], earlier) for earlier in map(lines_of, job.logs_before))
        place = {line["step"]: line["step"] if experiment.over == "step" else spent + flops_until(line["step"], lines)
                 for line in lines}  # fmt: skip
        found["curves"] = {
            field: [[place[line["step"]], value] for line in lines if (value := value_of(line, field)) is not None]
            for field in experiment.curves
        }
        found["training_flops"] = spent + flops_until(lines[-1]["step"], lines)
    if job.prompts:
        judged = read_judged(job.folder / "prompts.json")
        found |= {"kinds": judged["shares"], "seconds": judged["seconds"], "clips": judged["count"] * len(judged["shares"])}
        found |= {name: judged[name] for name in ("cpu_seconds", "clip_flops", "peak_memory_mb", "frechet_features")
                  if name in judged}  # fmt: skip
        found["verdicts"] = verdicts_of(judged.get("clips", {}))
        found["counts"] = {name: [marks.count("1"), len(marks)] for name, marks in found["verdicts"].items()}
        figures = {figure for shares in judged["shares"].values() for figure in shares}
        found["shares"] = {
            figure: statistics.mean(shares[figure] for shares in judged["shares"].values() if figure in shares)
            for figure in sorted(figures)
        }
        for name in experiment.figures:
            figure, _, kind = name.partition(" of ")
            if figure in judged["shares"].get(kind, {}):
                found["shares"][name] = judged["shares"][kind][figure]
    return found


def lines_of(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log that hold numbers of steps."""
    return [line for line in read_lines(log) if "event" not in line]


def value_of(line: dict[str, Any], field: str) -> Any:
    """Return a field of a line of the log, or the place n of a list for `field[n]`; None if there is none."""
    name, _, place = field.partition("[")
    value = line.get(name)
    return value[int(place.rstrip("]"))] if place and value is not None else value


def verdicts_of(clips: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Return {figure: "1" for each clip that is right, "0" for others} of all kinds, and of one kind as 'all of two'.

    The order is that of the prompts, so two variants with the same prompts can be compared clip by clip.
    """
    marks: dict[str, str] = {}
    for kind, verdicts in clips.items():
        for verdict in verdicts:
            for figure, right in verdict.items():
                for name in (figure, f"{figure} of {kind}") if isinstance(right, bool) else ():
                    marks[name] = marks.get(name, "") + "01"[right]
    return marks


def read_judged(file: Path) -> dict[str, Any]:
    """Return the content of a file that `evaluate prompts --output` wrote; RunError if it is damaged."""
    try:
        judged = read_json(file, "what `evaluate prompts` wrote")
        times = [judged["seconds"], judged.get("cpu_seconds", 0.0)]
        numbers = [*times, judged["count"], *(s for shares in judged["shares"].values() for s in shares.values())]
        if not judged["shares"] or not all(map(is_number, numbers)):
            raise TypeError("shares, seconds and count must be numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged ({reason_of(error)}); delete it, and the same command makes it again") from error
    return judged


def flops_until(step: int, lines: list[dict[str, Any]]) -> float:
    """Return the training FLOPs of the first `step` steps.

    Each line of the log holds the mean FLOPs per step since the previous line.
    """
    spent = rate = last = 0
    for line in lines:
        if "flops" in line and last < step:
            rate, now = line["flops"], min(line["step"], step)
            spent, last = spent + (now - last) * rate, now
    return spent + (step - last) * rate


def gather(experiment: Experiment, done: list[ExperimentJob]) -> dict[str, Any]:
    """Return the settings of an experiment with the results of all its runs, by variant."""
    variants: dict[str, Any] = {}
    for job in done:
        variant = experiment.variants[job.name]
        row = variants.setdefault(job.name, {**vars(variant), "runs": []})
        row["runs"].append(results_of(job, experiment))
    for row in variants.values():
        row["summary"], row["intervals"] = summary(row["runs"]), intervals(row["runs"])
    result = {
        "question": experiment.question, "compress": vars(experiment.compress), "train": vars(experiment.train),
        "prompts": experiment.prompts, "names": experiment.names, "axis": experiment.axis, "over": experiment.over,
        "grid": experiment.grid and vars(experiment.grid), "seeds": experiment.seeds, "claims": list(map(vars, experiment.claims)),
        "variants": variants, "versions": versions(),
    }  # fmt: skip
    return result | {"claims": judged(result)}


def write(experiment: Experiment, result: dict[str, Any], out: Path) -> None:
    """Write the result as JSON and as a picture, into the files `out`.json and `out`.png."""
    from lumos.evaluation.experiments.heat_maps import draw_heat_maps
    from lumos.evaluation.experiments.plots import draw

    write_json(named(out, ".json"), result)
    if result["grid"]:
        draw_heat_maps(result, [*experiment.curves, *experiment.figures], named(out, ".png"))
    else:
        draw(result, experiment.figures, named(out, ".png"), seconds=experiment.seconds)


def named(out: Path, suffix: str) -> Path:
    """Return the path with a suffix added.

    Dots in its name are kept, unlike with `Path.with_suffix`.
    """
    return out.with_name(out.name + suffix)
