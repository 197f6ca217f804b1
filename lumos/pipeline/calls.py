"""The running calls of a pipeline: a call's state belongs to the call, as several threads may use one pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from lumos.errors import UserError, shown


def check_answer(answer: Any, offered: Sequence[str]) -> Mapping[str, Any]:
    """Return what a callback has returned, {} for None.

    offered: the names of the tensors of the pipeline, the first of which the callback may change. UserError for anything but a
    dict, and for other names, which would have no effect.
    """
    if answer is None:
        return {}
    if not isinstance(answer, Mapping):
        raise UserError(f"the callback gave {shown(answer)}; give nothing, or a dict as {{{offered[0]!r}: ...}}")
    if unknown := [name for name in answer if name not in offered]:
        raise UserError(f"the callback gave {shown(unknown[0])}, which this pipeline does not take; give {offered[0]!r} or nothing")
    return answer


@dataclass
class Call:
    """The state that a running call and its callbacks share."""

    num_timesteps: int = 0
    interrupt: bool = False


class PipelineCalls:
    """The calls of one pipeline, which may run in several threads at a time."""

    def __init__(self) -> None:
        self._by_thread: dict[int, Call] = {}
        self._last = Call()

    @contextmanager
    def running(self, num_timesteps: int) -> Iterator[None]:
        """Inside, this thread runs a call of so many steps."""
        outer = self._by_thread.get(get_ident())
        self._by_thread[get_ident()] = self._last = Call(num_timesteps)
        try:
            yield
        finally:
            if outer is None:
                del self._by_thread[get_ident()]
            else:  # a callback has called the pipeline
                self._by_thread[get_ident()] = outer

    def current(self) -> Call:
        """Return the call that runs in this thread; if there is none, the last one."""
        return self._by_thread.get(get_ident(), self._last)

    def meant(self) -> list[Call]:
        """Return the call that runs in this thread; if there is none, as in the thread of a stop button, all that run."""
        own = self._by_thread.get(get_ident())
        return list(self._by_thread.values()) if own is None else [own]
