"""Uploads are decoded in a process of their own: one that takes too long, or breaks, ends without the server."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lumos.errors import UserError
from lumos.video_reading import count_frames, read_image, read_video

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def prepare_reading() -> None:
    """Start, in the background, the process that reading processes are forked from: importing everything takes seconds."""
    if START == "forkserver":
        multiprocessing.set_forkserver_preload([__name__])
        forkserver.ensure_running()


def read_upload(
    path: Path, seconds: float, check_stop: Callable[[], None], clip: tuple[int, int, int, int] | None = None, longest: float = 0
) -> np.ndarray:
    """A picture as uint8 [H, W, 3]; with `clip` (fps, frames at most, height, width) a clip's last frames [T, H, W, 3].

    seconds: how long reading may take; check_stop is called meanwhile and may raise; longest: seconds that a clip may last.
    UserError, which names the file without its folder, for what cannot be read.
    """
    prepare_reading()
    context = multiprocessing.get_context(START)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(sender, path, clip, longest), daemon=True)
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while not receiver.poll(0.05):
            check_stop()
            if time.monotonic() > deadline:
                raise UserError(f"reading {path.name} took longer than {seconds:g} s; give a shorter or smaller file")
        answer = receiver.recv()
    except EOFError:
        raise UserError(f"reading {path.name} broke off; it may be damaged: convert it to PNG or mp4 (H.264)") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _read(sender: Connection, path: Path, clip: tuple[int, int, int, int] | None, longest: float) -> None:
    """Sends the frames, or what is wrong as a string."""
    os.chdir(path.parent)  # messages then say the name that the visitor knows
    answer: Any
    try:
        answer = read_image(path.name) if clip is None else _last_frames(path.name, *clip, longest)
    except UserError as error:
        answer = str(error)
    sender.send(answer)


def _last_frames(name: str, fps: int, most: int, height: int, width: int, longest: float) -> np.ndarray:
    there = count_frames(name, fps)
    if there / fps > longest + 1 / fps:
        raise UserError(f"{name} lasts {there / fps:.1f} s; at most {longest:g} s are allowed: cut it")
    return read_video(name, fps=fps, num_frames=max(1, min(there, most)), from_end=True, size=(height, width))[0]
