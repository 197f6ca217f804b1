"""Files that are made batch by batch, by several processes, and resumed after a stop. This module knows no generator.

The whole list is cut into batches first, and a process makes whole batches. So no file depends on
the number of processes or on where an earlier run stopped. A share is the part of the batches that
one process makes; it is written as 2/4, the second of four.
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
    """Lock a share for this process; RunError if another process is at work on it."""
    work = work_folder(out, shard)
    with only_writer(work, "process with share {} of {}".format(*shard)):
        try:
            yield
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # the folder is not empty if other processes are at work or were killed
                work.parent.rmdir()


def work_folder(out: Path, shard: tuple[int, int]) -> Path:
    """Return the folder in which a share writes its files before they are complete."""
    return out / UNFINISHED / "{}-of-{}".format(*shard)


def sum_over_processes(*values: int) -> tuple[int, ...]:
    """Return the sums of the values over all processes of a launcher such as torchrun.

    Every process waits here for the others. If one ends with an error, the launcher stops the
    others.
    """
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
    """An object with the path of one file to make, relative to the folder of results."""

    @property
    def file(self) -> str: ...


def parse_shard(text: str | None) -> tuple[int, int]:
    """Return (number of the share from 1, number of shares) of a text such as "2/4".

    text: None takes the rank and the number of processes from torchrun's environment, or (1, 1)
    without torchrun. UserError for a malformed text, and for a text under torchrun.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if text is None:
        return int(os.environ.get("RANK", "0")) + 1, world
    if world > 1:
        raise UserError(f"shard {text} is given, but a launcher started {world} processes that share the work; leave it out")
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"shard {shown(text)} is not allowed; give the part and the number of parts, for example 1/4 to 4/4")
    return int(number), int(count)


class Results:
    """The files in the folder `out/name`.

    Each file is written in another folder below `out` and moved when it is complete. An incomplete
    file must not lie in `out/name`, because the official evaluations take every file there for a
    result.
    """

    def __init__(self, out: Path, name: str, shard: tuple[int, int] = (1, 1)):
        self.folder, self.unfinished = out / name, out / UNFINISHED
        self.mine = work_folder(out, shard)
        make_folder(self.folder)
        clear(self.mine)

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def put(self, file: str, write: Callable[[Path], object]) -> None:
        """Write a file: call `write` with a temporary path of the same suffix, then move the result to its place.

        RunError if the file cannot be written.
        """
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
        """Raise UserError if two files differ only in upper and lower case and the file system ignores case.

        Some prompts of VBench, after which files are named, differ only in case.
        """
        seen: dict[str, str] = {}
        clashes = [(first, file) for file in files if (first := seen.setdefault(file.casefold(), file)) != file]
        if clashes and ignores_case(self.folder.parent):
            first, second = clashes[0]
            raise UserError(
                f"in {self.folder} {shown(first)} and {shown(second)} are one file, because its file system ignores case; "
                "choose a folder on another file system"
            )

    def tidy(self, files: Sequence[str]) -> int:
        """Remove incomplete files and return how many of `files` are missing.

        The incomplete files of other processes, which may have been killed, are removed only if no
        file is missing.
        """
        clear(self.mine)
        with suppress(OSError):  # the folder is not empty while a lock is in it, and the lock's holder removes it then
            self.mine.rmdir()
        missing = sum(not self.has(file) for file in files)
        for left_over in self.unfinished.glob("*-of-*") if not missing else ():
            # The lock cannot be taken if another process is at work there, or without permission: then leave the folder.
            with suppress(RunError, UserError), only_writer(left_over, "process"):
                shutil.rmtree(left_over, ignore_errors=True)
        with suppress(OSError):
            self.unfinished.rmdir()
        return missing


def check_made(results: Results, files: Iterable[str], failed: Container[str] = ()) -> None:
    """Raise RunError if one of the files does not exist and is not in `failed`.

    To be called after all files are made.
    """
    asked = list(files)
    lost = [file for file in asked if file not in failed and not results.has(file)]
    if lost:
        raise RunError(
            f"{len(lost)} of {len(asked)} files that were to be made are not in {results.folder}, {shown(lost[0])} first; run the "
            "same command again: it makes what is missing"
        )


def clear(work: Path) -> None:
    """Remove all files in the folder of a share, except the lock of a process that is at work there."""
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
    """Make the missing files of the batches and return how many files were written.

    make(batch) returns one clip for each entry of the batch, and save(path, entry, clip) writes it.
    If a file of a batch is missing, the whole batch is made again, so that the clip does not depend
    on where a run stopped. Only missing files are written. on_batch() is called after each batch.
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
