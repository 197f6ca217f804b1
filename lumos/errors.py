"""The kinds of failure that the command line reports in one line instead of a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """What was asked for cannot be done: says what was given, what is allowed, what to do. Exit code 2."""


class NotFound(UserError, FileNotFoundError):
    """A file or folder that was named is not there, or holds nothing of what is asked of it."""


class RunError(RuntimeError):
    """A correct request that failed on the way (disk, damaged file, non-finite loss). Exit code 1."""


class OutOfMemory(RunError):
    """Memory ran out; says what would need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, or torch's on the CPU or on a GPU, way of saying that memory ran out."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)
