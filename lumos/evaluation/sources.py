"""The clips that a video tokenizer is measured on: synthetic scenes, photographs and films, or a user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumos.data.ingest.encode import clip_starts
from lumos.data.ingest.media import media_of
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import UserError, shown
from lumos.training.tokenizer.clips import FILM_SECONDS, PACKAGE_FILMS, films, photographs
from lumos.video.frames import fit
from lumos.video.reading import is_still, read_image, read_video

SYNTHETIC: dict[str, dict[str, Any]] = {
    "worlds": {"kinds": ("shapes", "digits"), "split": "held_out"},
    "sprites": {"kinds": ("sprites",), "split": "all"},
}
"""The settings of the synthetic scenes of two sources.

worlds   shapes in combinations of attributes that training never shows, and digits
sprites  all sprites, in scenes of a seed that training does not use
"""
KNOWN = (*SYNTHETIC, "photographs", "films")


def check_source(source: str) -> None:
    """Raise UserError unless the source is one of KNOWN or an existing file or folder."""
    if source not in KNOWN and not Path(source).exists():
        raise UserError(f"there is no data {shown(source)}; allowed: {', '.join(KNOWN)}, a folder, or a video or picture file")


def read_source(
    source: str, *, count: int, seed: int, num_frames: int, height: int, width: int
) -> tuple[list[np.ndarray], list[str]]:
    """Return (up to `count` clips uint8 [T, H, W, 3], messages that say why files were left out).

    T is num_frames, or 1 for a picture. Frames are scaled to cover height x width and cropped to
    the centre. A film keeps its frame rate, and only its first 30 s are used. UserError if there is
    no clip at all.
    """
    if source in SYNTHETIC:
        synthetic = SyntheticScenes(seed=seed, num_frames=num_frames, height=height, width=width, **SYNTHETIC[source])
        return [synthetic[index][0] for index in range(count)], []
    files, left_out = _files(source)
    if len(files) > count:
        files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    clips = []
    for index, file in enumerate(files):
        if len(clips) == count:
            break
        wanted = max(1, (count - len(clips)) // (len(files) - index))  # share the remaining clips among the remaining files
        try:
            clips += _read(file, wanted, num_frames, height, width)
        except UserError as error:
            left_out.append(str(error))
    if not clips:
        raise UserError(f"--data {source} gives no clip of {num_frames} frames: {left_out[0]}")
    return clips, left_out


def _files(source: str) -> tuple[Sequence[Path], list[str]]:
    """Return the files of a source, and why others of its folder cannot be read."""
    path, problems = Path(source), []
    if source == "photographs":
        found, need = photographs(held_out=True), "those of scikit-image and scikit-learn: pip install scikit-image scikit-learn"
    elif source == "films":
        found, need = films([PACKAGE_FILMS], held_out=True), f"those of {PACKAGE_FILMS}"
    elif path.is_dir():
        media = media_of(path)
        found, need, problems = sorted(media.pictures + media.films), "videos and pictures", media.problems
    else:
        found, need = [path], ""
    if not found:
        said = f"; {problems[0]}" if problems else ""
        raise UserError(f"--data {source} holds no file that can be read; it needs {need}{said}")
    return found, problems


def _read(file: Path, wanted: int, num_frames: int, height: int, width: int) -> list[np.ndarray]:
    """Return up to `wanted` clips of a file, at evenly spaced times; UserError if the file is too short for one clip."""
    if is_still(file):
        return [fit(read_image(file)[None], height, width)]
    frames, _ = read_video(file, max_seconds=FILM_SECONDS, size=(height, width))
    if len(frames) == 1:
        return [frames]
    starts = clip_starts(len(frames), num_frames, wanted)
    if not starts:
        raise UserError(f"{file} has {len(frames)} frames, {num_frames} are needed; lower --num-frames")
    return [frames[start : start + num_frames] for start in starts]
