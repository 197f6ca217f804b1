"""Experiments, which compare variants of settings.

Each variant is trained, evaluated with `evaluate prompts`, or both, once with each seed. In a study
of compression, a model is made smaller for each variant before, and training is its recovery. The
results are one JSON file and one picture. A run is one variant with one seed. Its commands run in
processes of their own, so a user can also type them. Runs that are done are not repeated: an
experiment that was stopped goes on, and an experiment with new variants runs only those.
"""



from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.errors import RunError, UserError, as_text, reason_of, shown
from lumos.evaluation.prompts import KINDS
from lumos.files import read_json, read_text, write_bytes, write_json
from lumos.runtime import versions
from lumos.settings import build, is_number, read_yaml, setting
from lumos.threads import cores_in_use
from lumos.training.logging import read_lines

OVER = ("step", "flops")
LAST_BYTES = 10_000  # bytes at the end of a log in which its last line is searched for
LONGEST_NAME = 200
FIGURES = ("all", "colour", "shape", "motion", "last_frame", "steady", "moved")
MORE_FIGURES = (
    "background", "colour_and_motion", "count", "first_frame", "frechet", "given_frames", "moving", "psnr", "size", "sprite",
)  # fmt: skip
WILSON = 1.96
"""Standard deviations of a normal distribution on each side of its mean that hold 95 %."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The same for the mean of so many values, whose standard deviation is measured (Student's t)."""
OWN_FILES = ("prune", "pruned", "train", "distill", "evaluate", "prompts")
"""Names in the folder of a run that a training of `before` cannot have."""
OWN_OPTIONS = ("--seed", "--output")
"""Options of `evaluate prompts` that an experiment sets itself for each run."""
OWN_OF_PRUNE = ("--model", "--out", "--seed", "--dry-run")
"""Options of `compress prune` that an experiment sets itself for each run."""


@dataclass
class Training:
    config: str | None = setting(None, "config of `train` or `compress distill` for all variants; null: nothing is trained")
    overrides: list[str] = setting([], "section.key=value for all variants")


@dataclass
class Compression:
    model: str | None = setting(None, "model that `compress prune` makes smaller, and that teaches; null: nothing is pruned")
    prune: list[str] = setting([], "options of `compress prune` for all variants")


@dataclass
class Variant:
    prune: list[str] = setting([], "options of `compress prune` for this variant")
    train: list[str] = setting([], "section.key=value for this variant")
    prompts: list[str] = setting([], "options of `evaluate prompts` for this variant")
    config: str | None = setting(None, "config of `train` for this variant; null: train.config")
    before: dict[str, Any] = setting(
        {}, "trainings before, name: [section.key=value, ...], with the config of the variant; {name} in later ones is the model"
    )
    of: str | None = setting(None, "variant whose trained model is evaluated with other options; nothing is trained here")
    x: float | None = setting(None, "position of the variant on the x axis; null: variants have names only")


@dataclass
class Experiment:
    question: str = setting("", "the question that the experiment answers")
    train: Training = setting(Training, "the training that all variants share")
    compress: Compression = setting(Compression, "the model that is pruned; train.config is then one of `compress distill`")
    model: str | None = setting(None, "model folder to evaluate if nothing is trained; null: the model of the repository")
    prompts: list[str] | None = setting(None, "options of `evaluate prompts` for all variants; null: it does not run")
    curves: list[str] = setting([], "fields of log.jsonl to compare, for example val_loss_video; of a list: val_time_loss_video[0]")
    names: dict[str, str] = setting({}, "words for curves and figures in the picture, {name: words}")
    minutes: float | None = setting(None, "expected minutes of all runs on two CPU cores, for the reader")
    over: str = setting("step", "x axis of the curves: step, or flops (training FLOPs up to the step)")
    figures: list[str] = setting([*FIGURES], "shares of `evaluate prompts` to draw: means over kinds, or of one kind: all of two")
    axis: str = setting("", "label of the x axis for variants with an x")
    seconds: bool = setting(True, "draw the seconds per clip over x, if the variants have an x")
    seeds: list[int] = setting([0], "seeds; each variant runs once with each seed")
    variants: dict[str, Any] = setting({}, "name: {train: [...], prompts: [...], x: ...}")


def load(path: str | Path) -> Experiment:
    """Return the experiment of a YAML file; UserError for settings that are unknown, wrong or without effect."""
    experiment = build(Experiment, read_yaml(path, [], ("experiments",)))
    if not experiment.variants:
        raise UserError(f"{path} has no variants; name at least one")
    experiment.variants = {str(name): build(Variant, raw, f"variants.{as_text(name)}") for name, raw in experiment.variants.items()}
    trains, judges = experiment.train.config is not None, experiment.prompts is not None
    if not trains and not judges:
        raise UserError(f"{path} neither trains (train.config) nor evaluates (prompts); set one of them")
    for name, variant in experiment.variants.items():
        if variant.train and not trains:
            raise UserError(f"variants.{as_text(name)}.train has no effect without train.config; leave it out")
        if variant.prompts and not judges:
            raise UserError(f"variants.{as_text(name)}.prompts has no effect without prompts; leave it out")
        if not name or "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"variant {shown(name)} cannot name a folder; give it a name without / that does not begin with a dot, of at most "
                f"{LONGEST_NAME} bytes"
            )
        check_before(name, variant, experiment)
    prunes = experiment.compress.model is not None
    pruned = [("compress.prune", experiment.compress.prune)]
    pruned += [(f"variants.{as_text(name)}.prune", variant.prune) for name, variant in experiment.variants.items()]
    for where, options in pruned:
        if options and not prunes:
            raise UserError(f"{where} has no effect without compress.model; leave it out")
        if own := [option for option in OWN_OF_PRUNE if option in [part for text in options for part in text.split("=")]]:
            raise UserError(f"{where}: the experiment sets {own[0]} itself for each run; leave it out")
    if prunes and experiment.model:
        raise UserError("model has no effect where compress.model is pruned; leave it out")
    if trains and experiment.model:
        raise UserError("model has no effect where variants are trained; leave it out")
    if experiment.train.overrides and not trains:
        raise UserError("train.overrides has no effect without train.config; leave it out")
    if not experiment.seeds or min(experiment.seeds) < 0 or len(set(experiment.seeds)) < len(experiment.seeds):
        raise UserError(f"seeds {shown(experiment.seeds)} are not allowed; give at least one, each once, none below 0")
    told = [option for row in (experiment, *experiment.variants.values()) for option in row.prompts or ()]
    options = [part for option in told for part in option.split("=")]
    if own := [option for option in OWN_OPTIONS if option in options]:
        raise UserError(f"prompts: the experiment sets {own[0]} itself for each run; leave it out")
    if (trains or prunes) and "--model" in options:
        raise UserError(f"prompts: --model has no effect where variants are {'trained' if trains else 'pruned'}; leave it out")
    for name in experiment.figures:
        figure, of, kind = name.partition(" of ")
        if figure not in (*FIGURES, *MORE_FIGURES):
            allowed = ", ".join((*FIGURES, *MORE_FIGURES))
            raise UserError(f"figures: {shown(name)} is unknown; allowed: {allowed}, also 'all of two'")
        if of and (kind not in KINDS or kind not in options):
            raise UserError(f"figures: {shown(name)} is of a kind that is not asked for; name it after --kinds in prompts")
    if experiment.over not in OVER:
        raise UserError(f"over: {shown(experiment.over)} is not allowed; allowed: {', '.join(OVER)}")
    if experiment.curves and not trains:
        raise UserError("curves has no effect where nothing is trained; leave it out")
    return experiment


def check_before(name: str, variant: Variant, experiment: Experiment) -> None:
    """Raise UserError for trainings before that cannot run, and for a variant `of` another one that is not there."""
    where, trains = f"variants.{as_text(name)}", experiment.train.config is not None
    if (variant.config or variant.before) and (not trains or experiment.compress.model):
        raise UserError(f"{where}: config and before need train.config, without compress.model; leave them out")
    for earlier, overrides in variant.before.items():
        if earlier in OWN_FILES or not earlier.isidentifier() or not isinstance(overrides, list):
            raise UserError(
                f"{where}.before.{as_text(earlier)} is not allowed; give a word that is none of {', '.join(OWN_FILES)}, and a list "
                "of section.key=value"
            )
    if variant.of is None:
        return
    other = experiment.variants.get(variant.of)
    if variant.train or variant.config or variant.before or not trains or experiment.compress.model or experiment.prompts is None:
        raise UserError(f"{where}.of evaluates a model that another variant trains; give prompts, and no training here")
    if other is None or other.of is not None:
        raise UserError(f"{where}.of {shown(variant.of)} is no variant that is trained; name one of them")


@dataclass(frozen=True)
class ExperimentJob:
    """One run, which is one variant with one seed.

    Its commands make `folder/pruned`, `folder/<name>` of each training before, `folder/train` and `folder/prompts.json`.
    """

    name: str
    seed: int
    folder: Path
    train: tuple[str, ...] | None
    prompts: tuple[str, ...] | None
    prune: tuple[str, ...] | None = None
    before: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def logs_before(self) -> list[Path]:
        """The logs of the trainings before."""
        return [self.folder / name / "log.jsonl" for name, _ in self.before]

    @property
    def log(self) -> Path:
        return self.folder / "train" / "log.jsonl"

    def missing(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield (name, command) of the commands that are not done yet, in order.

        UserError if the folder holds the result of another command, or if another command was begun
        in it.
        """
        for name, command, made in self.steps():
            written = self.command_file(name)
            before = read_text(written, "the command of a run") if written.is_file() else None
            if before != shlex.join(command) and (before is not None or made.is_file()):
                how = f"the command in {written}" if before else "an unknown command"
                raise UserError(
                    f"{self.folder} was made by {how}, not by: {shlex.join(command)}; delete it, or name another folder "
                    "with --runs"
                )
            if not made.is_file():
                yield name, command

    def steps(self) -> list[tuple[str, tuple[str, ...], Path]]:
        """Return (name, command, file that it makes last) of each command, in order."""
        found = [(self.prune, self.folder / "pruned" / "config.json"),
                 (self.train, self.folder / "train" / "export" / "config.json"),
                 (self.prompts, self.folder / "prompts.json")]  # fmt: skip
        named = [(name_of(command), command, made) for command, made in found if command]
        return [*((name, command, self.folder / name / "export" / "config.json") for name, command in self.before), *named]

    def command_file(self, name: str) -> Path:
        """Return the file that holds the text of a command, by which a result of another command is recognized."""
        return self.folder / f"{name}.command"


def name_of(command: tuple[str, ...]) -> str:
    """Return the name of a command's files: its verb, or the step of `compress`."""
    return command[1] if command[0] == "compress" else command[0]


def jobs(experiment: Experiment, root: Path) -> list[ExperimentJob]:
    """Return the runs of an experiment, each with a folder of its own below `root`."""
    found = []
    for name, variant in experiment.variants.items():
        for seed in experiment.seeds:
            folder = root / f"{name}-{seed}"
            prune = train = prompts = None
            verb: tuple[str, ...] = ("train",)
            places: list[str] = []
            if teacher := experiment.compress.model:
                prune = ("compress", "prune", "--model", teacher, "--out", str(folder / "pruned"), f"--seed={seed}",
                         *experiment.compress.prune, *variant.prune)  # fmt: skip
                verb, places = ("compress", "distill"), [f"model.from={folder / 'pruned'}", f"distill.teacher={teacher}"]
            before: list[tuple[str, tuple[str, ...]]] = []
            if experiment.train.config and not variant.of:
                start = (*verb, "--config", variant.config or experiment.train.config, *places, *experiment.train.overrides)
                for name_before, own in [*variant.before.items(), ("train", variant.train)]:
                    own = [with_folders(text, folder, variant.before) for text in own]
                    command = (*start, *own, f"training.seed={seed}", f"training.output_dir={folder / name_before}")
                    before.append((name_before, command))
                train = before.pop()[1]
            if experiment.prompts is not None:
                trained = root / f"{variant.of}-{seed}" if variant.of else folder
                made = trained / "train" / "export" if train or variant.of else folder / "pruned" if prune else experiment.model
                model = [str(made)] if made else []
                # The seed differs from the default of `evaluate prompts`, with which default options were chosen. Otherwise the
                # shares would be measured on the same prompts.
                options = [f"--seed={10_000_000 * (seed + 1)}", "--output", str(folder / "prompts.json")]
                prompts = ("evaluate", "prompts", *(["--model", *model] if model else []), *options, *experiment.prompts,
                           *variant.prompts)  # fmt: skip
            found.append(ExperimentJob(name, seed, folder, train, prompts, prune, tuple(before)))
    return found


def with_folders(text: str, folder: Path, names: Iterable[str]) -> str:
    """Return a setting in which the names of trainings before, in braces, are the folders of their models."""
    for name in names:
        text = text.replace(f"{{{name}}}", str(folder / name / "export"))
    return text


def run(todo: list[ExperimentJob], parallel: int, on_done: Callable[[], None]) -> None:
    """Run the missing commands of all jobs, `parallel` jobs at a time, each with an equal share of the threads.

    Variants that evaluate the model of another one run last. RunError after all have ended, with the first failure.
    """
    threads = max(1, cores_in_use() // parallel)

    def one(job: ExperimentJob) -> str | None:
        job.folder.mkdir(parents=True, exist_ok=True)
        for name, command in job.missing():
            write_bytes(job.command_file(name), shlex.join(command).encode())
            with open(job.folder / f"{name}.log", "w") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                ended = subprocess.run(
                    [sys.executable, "-m", "lumos", *command], stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
                )
            if ended.returncode:
                with open(log.name, "rb") as written:
                    written.seek(max(0, os.path.getsize(log.name) - LAST_BYTES))
                    last = written.read().decode("utf-8", "replace").strip().splitlines()[-1:]
                return f"{' '.join(command)} ended with {ended.returncode}: {' '.join(last)[-300:]} (see {log.name})"
        on_done()
        return None

    with ThreadPoolExecutor(parallel) as pool:
        makes = [job for job in todo if job.train or job.prune]
        judges = [job for job in todo if not (job.train or job.prune)]
        failures = [failure for part in (makes, judges) for failure in pool.map(one, part) if failure]
    if failures:
        raise RunError(failures[0] + (f"; {len(failures) - 1} more failed" if len(failures) > 1 else ""))


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
        found["counts"] = counts_of(judged.get("clips", {}))
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


def counts_of(clips: dict[str, list[dict[str, Any]]]) -> dict[str, list[int]]:
    """Return {figure: [right, all]} of the verdicts of all kinds, and of one kind as 'all of two'."""
    counts: dict[str, list[int]] = {}
    for kind, verdicts in clips.items():
        for verdict in verdicts:
            for figure, right in verdict.items():
                for name in (figure, f"{figure} of {kind}") if isinstance(right, bool) else ():
                    row = counts.setdefault(name, [0, 0])
                    row[0], row[1] = row[0] + right, row[1] + 1
    return counts


def wilson(right: int, total: int) -> list[float]:
    """Return the 95 % interval of a share of which `right` of `total` trials are right (Wilson 1927)."""
    share, square = right / total, WILSON**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    reach = WILSON * (share * (1 - share) / total + square / (4 * total**2)) ** 0.5 / (1 + square / total)
    return [round(max(0.0, middle - reach), 4), round(min(1.0, middle + reach), 4)]


def intervals(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the 95 % interval [low, high] of each name in `summary`.

    Shares of clips are pooled over the seeds. Other values have the interval of the mean over the seeds, if there are two or
    more. Clips of one seed are not independent of each other where training differs by seed, so intervals of shares are narrow.
    """
    found: dict[str, list[float]] = {}
    for name, values in values_of(runs).items():
        pooled = [run["counts"][name] for run in runs if name in run.get("counts", {})]
        if pooled:
            found[name] = wilson(sum(right for right, _ in pooled), sum(total for _, total in pooled))
        elif factor := STUDENT.get(len(values)):
            reach = factor * statistics.stdev(values) / len(values) ** 0.5
            found[name] = [round(statistics.mean(values) - reach, 4), round(statistics.mean(values) + reach, 4)]
    return found


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
    return {
        "question": experiment.question, "compress": vars(experiment.compress), "train": vars(experiment.train),
        "prompts": experiment.prompts,
        "names": experiment.names,
        "axis": experiment.axis, "over": experiment.over, "seeds": experiment.seeds, "variants": variants, "versions": versions(),
    }  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return {name: [mean over seeds, standard deviation]} of each share and of the last value of each curve.

    Curves whose values are lists are left out. The standard deviation of one seed is 0.
    """
    return {
        name: [round(statistics.mean(found), 4), round(statistics.stdev(found), 4) if len(found) > 1 else 0.0]
        for name, found in values_of(runs).items()
    }


def values_of(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return {name: value of each run} of each share and of the last value of each curve that has numbers."""
    values: dict[str, list[float]] = {}
    for result in runs:
        for field, points in result.get("curves", {}).items():
            if points and isinstance(points[-1][1], float):
                values.setdefault(field, []).append(points[-1][1])
        for figure, share in result.get("shares", {}).items():
            values.setdefault(figure, []).append(share)
    return values


def write(experiment: Experiment, result: dict[str, Any], out: Path) -> None:
    """Write the result as JSON and as a picture, into the files `out`.json and `out`.png."""
    from lumos.evaluation.experiment_plots import draw

    write_json(named(out, ".json"), result)
    draw(result, experiment.figures, named(out, ".png"), seconds=experiment.seconds)


def named(out: Path, suffix: str) -> Path:
    """Return the path with a suffix added.

    Dots in its name are kept, unlike with `Path.with_suffix`.
    """
    return out.with_name(out.name + suffix)
