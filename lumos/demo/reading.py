"""Decoding of uploads in a separate process.

An upload that takes too much time or memory, or that crashes the decoder, then ends that process
and not the server.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from lumos.errors import RunError, UserError
from lumos.video.reading import count_frames, is_still, read_image, read_video

STILL = "is it still"
"""What a reader is asked in place of the numbers of a clip: whether a file holds a picture that does not move."""
Wanted = tuple[int, int, int, int] | str | None
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def prepare_reading() -> None:
    """Start, in the background, the process that readers are forked from, because its imports take seconds.

    A reader is a process that decodes one upload.
    """
    if START == "forkserver":
        multiprocessing.set_forkserver_preload([__name__])
        forkserver.ensure_running()


@dataclass(frozen=True)
class Allowed:
    """The limits of decoding one upload.

    seconds       time that the decoding may take
    pixels        pixels of a picture or of a frame
    memory_mb     MiB of memory that the reader may allocate
    clip_seconds  duration of a clip
    """

    seconds: float = 20
    pixels: int = 25_000_000
    memory_mb: int = 2048
    clip_seconds: float = 60


def read_upload(
    path: Path, check_stop: Callable[[], None], allowed: Allowed, clip: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3], or the last frames of a clip as uint8 [T, H, W, 3].

    clip: None for a picture; for a clip (frames per second, most frames, height, width). check_stop
    is called while the file is read, and may raise. UserError if the file cannot be read within the
    limits (the message names the file without its folder), RunError if no reader can be started.
    """
    return _in_reader(path, check_stop, allowed, clip)


def holds_still(path: Path, check_stop: Callable[[], None], allowed: Allowed) -> bool:
    """Return whether an upload is a picture that does not move, by its content; arguments and errors as of `read_upload`."""
    return _in_reader(path, check_stop, allowed, STILL)


def _in_reader(path: Path, check_stop: Callable[[], None], allowed: Allowed, wanted: Wanted) -> Any:
    receiver, sender = multiprocessing.get_context(START).Pipe(duplex=False)
    with receiver, sender:
        try:
            process = start_reader(sender, path, allowed, wanted)
        except (OSError, EOFError):  # the process that readers are forked from has died; a second try starts a new one
            try:
                process = start_reader(sender, path, allowed, wanted)
            except (OSError, EOFError) as error:
                raise RunError(f"the server cannot read {path.name} now; try again later") from error
        sender.close()
        return _answer(process, receiver, path, check_stop, allowed)


def start_reader(sender: Connection, path: Path, allowed: Allowed, wanted: Wanted) -> multiprocessing.process.BaseProcess:
    prepare_reading()
    process = multiprocessing.get_context(START).Process(target=_read, args=(sender, path, allowed, wanted), daemon=True)
    process.start()
    return process


def _answer(
    process: multiprocessing.process.BaseProcess, receiver: Connection, path: Path, check_stop: Callable[[], None], allowed: Allowed
) -> Any:
    """Return what the reader sends.

    The reader is killed before this function returns or raises.
    """
    deadline = time.monotonic() + allowed.seconds
    try:
        while not receiver.poll(0.05):
            check_stop()
            if time.monotonic() > deadline:
                raise UserError(f"reading {path.name} took longer than {allowed.seconds:g} s; give a shorter or smaller file")
        answer = receiver.recv()
    except EOFError:
        raise UserError(f"reading {path.name} broke off; it may be damaged: convert it to PNG or mp4 (H.264)") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _read(sender: Connection, path: Path, allowed: Allowed, wanted: Wanted) -> None:
    """Send the frames, or the answer to STILL, or an error message as a string."""
    os.chdir(path.parent)  # messages then name the file as the visitor does, without the folder
    limit_memory(allowed.memory_mb * 2**20)
    Image.MAX_IMAGE_PIXELS = allowed.pixels // 2  # Pillow refuses twice this number, before it allocates memory
    answer: Any
    try:
        if wanted is None:
            answer = read_image(path.name, max_pixels=allowed.pixels)
        elif wanted == STILL:
            answer = is_still(path.name, max_pixels=allowed.pixels)
        else:
            answer = _last_frames(path.name, allowed, *wanted)
        sender.send(answer)
    except UserError as error:
        sender.send(str(error))
    except MemoryError:
        sender.send(f"reading {path.name} takes more memory than is allowed; make it smaller or shorter")


def limit_memory(more: int) -> None:
    """Limit the address space of this process to its present size plus `more` bytes, where the platform can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = psutil.Process().memory_info().vms + more
    if hard == resource.RLIM_INFINITY or most < hard:
        with contextlib.suppress(ValueError, OSError):  # macOS has this limit but refuses to set it
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _last_frames(name: str, allowed: Allowed, fps: int, most: int, height: int, width: int) -> np.ndarray:
    there = count_frames(name, fps, max_pixels=allowed.pixels)
    if there / fps > allowed.clip_seconds + 1 / fps:
        raise UserError(f"{name} lasts {there / fps:.1f} s; at most {allowed.clip_seconds:g} s are allowed: cut it")
    return read_video(
        name, fps=fps, num_frames=max(1, min(there, most)), from_end=True, size=(height, width), max_pixels=allowed.pixels,
        threads=2,  # each thread holds frames and has its own stack and heap, which count against the memory limit
    )[0]  # fmt: skip
