"""The runs of an experiment, one for each variant and seed: their folders, their commands, and the processes that run them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lumos.errors import RunError, UserError
from lumos.evaluation.experiments.reuse import copy_trained, key_file, mark, settings_key
from lumos.evaluation.experiments.settings import Experiment
from lumos.files import read_text, write_bytes
from lumos.progress import LOGGER
from lumos.threads import OWN_VARIABLE, cores_in_use

LAST_BYTES = 10_000  # bytes at the end of a log in which its last line is searched for


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

    A training that another study did with the same settings is copied. Variants that evaluate the model of another one run
    last. RunError after all have ended, with the first failure.
    """
    threads = max(1, cores_in_use() // parallel)

    def one(job: ExperimentJob) -> str | None:
        job.folder.mkdir(parents=True, exist_ok=True)
        missing, last_files = list(job.missing()), {name: made for name, _, made in job.steps()}
        for name, command, made in job.steps():  # a training may have outlived the experiment that began it
            if made.is_file() and not key_file(job.folder / name).is_file():
                mark(job.folder / name, settings_key(command))
        for name, command in missing:
            write_bytes(job.command_file(name), shlex.join(command).encode())
            key, made = settings_key(command), job.folder / name
            if not made.exists() and (trained := copy_trained(key, made, job.folder.parent.parent)):
                LOGGER.info("%s has the settings of %s, which is copied", made, trained)
                mark(made, key)
                continue
            with open(job.folder / f"{name}.log", "w") as log:
                environment = {**os.environ, OWN_VARIABLE: str(threads)}  # counts before all other variables
                ended = subprocess.run(
                    [sys.executable, "-m", "lumos", *command], stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
                )
            if ended.returncode:
                with open(log.name, "rb") as written:
                    written.seek(max(0, os.path.getsize(log.name) - LAST_BYTES))
                    last = written.read().decode("utf-8", "replace").strip().splitlines()[-1:]
                return f"{' '.join(command)} ended with {ended.returncode}: {' '.join(last)[-300:]} (see {log.name})"
            if not last_files[name].is_file():  # a training that is told to stop saves its work and ends without an error
                return f"{' '.join(command)} was stopped before its end; the same command goes on (see {log.name})"
            mark(made, key)
        on_done()
        return None

    with ThreadPoolExecutor(parallel) as pool:
        makes = [job for job in todo if job.train or job.prune]
        judges = [job for job in todo if not (job.train or job.prune)]
        failures = [failure for part in (makes, judges) for failure in pool.map(one, part) if failure]
    if failures:
        raise RunError(failures[0] + (f"; {len(failures) - 1} more failed" if len(failures) > 1 else ""))
