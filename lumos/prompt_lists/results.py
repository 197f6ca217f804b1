"""Files that are made batch by batch: which process makes which, and going on after a stop.

Knows no generator. The list is cut into batches before anything else and a process makes whole batches, so that no file
depends on how many processes there are or where an earlier run stopped.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from lumos.durable import UNFINISHED, make_folder, put_file, remove
from lumos.errors import RunError, UserError, shown
from lumos.files import only_writer
from lumos.locks import LOCK, OWNER


@contextmanager
def only_shard(out: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Keep a second process away from this share; RunError if one is at work on it."""
    work = work_folder(out, shard)
    with only_writer(work, "process with share {} of {}".format(*shard)):
        try:
            yield
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # others are at work, or were killed
                work.parent.rmdir()


def work_folder(out: Path, shard: tuple[int, int]) -> Path:
    """Where a share's files are written before they are whole."""
    return out / UNFINISHED / "{}-of-{}".format(*shard)


def sum_over_processes(*values: int) -> tuple[int, ...]:
    """The sums over all processes of a launcher, when all have come here: it stops the others when one ends with an error."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return values
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=30))
    sums = torch.tensor(values)
    dist.all_reduce(sums)
    dist.destroy_process_group()
    return tuple(sums.tolist())


class HasFile(Protocol):
    """One file to make; its path is from the folder of results."""

    @property
    def file(self) -> str: ...


def parse_shard(text: str | None) -> tuple[int, int]:
    """(which from 1 on, of how many) as `2/4` says; None: as torchrun says, else 1 of 1."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if text is None:
        return int(os.environ.get("RANK", "0")) + 1, world
    if world > 1:
        raise UserError(f"shard {text} is given, but a launcher started {world} processes that share the work; leave it out")
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"shard {shown(text)} is not allowed; give which part of how many, 1/4 to 4/4 for example")
    return int(number), int(count)


class Results:
    """The files in `out/name`. Each is written elsewhere in `out` and moved there, whole or not at all.

    Elsewhere, because the official evaluations take whatever lies beside a result for another one.
    """

    def __init__(self, out: Path, name: str, shard: tuple[int, int] = (1, 1)):
        self.folder, self.unfinished = out / name, out / UNFINISHED
        self.mine = work_folder(out, shard)
        make_folder(self.folder)
        clear(self.mine)

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def put(self, file: str, write: Callable[[Path], object]) -> None:
        """`write` is given a path of the same suffix, whose folder exists."""
        target = self.folder / file
        temporary = self.mine / f"{uuid.uuid4().hex}{target.suffix}"
        try:
            for folder in (self.mine, target.parent):
                make_folder(folder)
            write(temporary)
            put_file(temporary, target)
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror or error}; check free space and permissions") from error

    def check_case(self, files: Sequence[str]) -> None:
        """UserError if two files differ only in case, as some of VBench do, and this file system cannot hold both."""
        seen: dict[str, str] = {}
        twins = [(first, file) for file in files if (first := seen.setdefault(file.casefold(), file)) != file]
        if twins and ignores_case(self.folder.parent):
            first, second = twins[0]
            raise UserError(
                f"{self.folder} is where {shown(first)} and {shown(second)} are one file; choose a place that tells them apart"
            )

    def tidy(self, files: Sequence[str]) -> int:
        """Remove what was left unfinished, by killed runs too once every file is there; returns how many are missing."""
        clear(self.mine)
        with suppress(OSError):  # whoever holds the lock in it removes it
            self.mine.rmdir()
        missing = sum(not self.has(file) for file in files)
        for left_over in self.unfinished.glob("*-of-*") if not missing else ():
            with suppress(RunError, UserError), only_writer(left_over, "process"):  # not where one is at work, or may not
                shutil.rmtree(left_over, ignore_errors=True)
        with suppress(OSError):
            self.unfinished.rmdir()
        return missing


def check_made(results: Results, files: Iterable[str], failed: Container[str] = ()) -> None:
    """RunError unless each of the files is there, or is one of those that are known to have `failed`. Call it when all are made."""
    asked = list(files)
    lost = [file for file in asked if file not in failed and not results.has(file)]
    if lost:
        raise RunError(
            f"{len(lost)} of {len(asked)} files that were to be made are not in {results.folder}, {shown(lost[0])} first; run the "
            "same command again: it makes what is missing"
        )


def clear(work: Path) -> None:
    """Remove what is left in a share's folder, but not the lock of the process that is at work there."""
    for left_over in work.glob("*"):
        if left_over.name not in (LOCK, OWNER):
            remove(left_over)


def ignores_case(folder: Path) -> bool:
    probe = folder / f".Case-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.with_name(probe.name.lower()).exists()
    finally:
        probe.unlink(missing_ok=True)


def render(
    results: Results,
    batches: Sequence[Sequence[HasFile]],
    make: Callable[[Sequence[Any]], Sequence[Any]],
    save: Callable[[Path, Any, Any], object],
    on_batch: Callable[[], object] = lambda: None,
) -> int:
    """Make what is missing of the batches; returns how many files were written.

    make(batch) gives one thing for each file, and save(path, file's entry, thing) writes it.

    A batch of which a file is missing is made again whole, and what it lacks is saved.
    """
    written = 0
    for batch in batches:
        missing = [not results.has(sample.file) for sample in batch]
        if any(missing):
            for sample, clip, wanted in zip(batch, make(batch), missing, strict=True):
                if wanted:
                    results.put(sample.file, lambda path, sample=sample, clip=clip: save(path, sample, clip))
                    written += 1
        on_batch()
    return written
