"""The HTML of the parts of the page that change: the stage, the line under it and the gallery.

The stage is the large area that shows the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from lumos.data.trained_on import TrainedOn
from lumos.pipeline.options import all_options
from lumos.prompt_lists.clips import record_path
from lumos.video.animation import data_url

PREVIEW_FRAMES = 32  # a preview shows only the last frames, so that its cost does not grow with the clip
OF_A_CLIP = ("num_frames", "num_given_frames", "fps")  # settings without a meaning for a picture
THUMBNAIL = 240  # pixels of the longer side
SHOWN_WORDS = 200
HIDDEN = ("target_size", "height", "width", "sampler")


def stage_text(text: str) -> str:
    return f'<div class="stage"><p>{escape(text)}</p></div>'


def stage_preview(frames: Sequence[np.ndarray], fps: int) -> str:
    """Return the last of the frames made so far, uint8 [H, W, 3] each, as an animated picture in a data URL."""
    url = data_url(frames[-PREVIEW_FRAMES:], fps)
    return f'<div class="stage"><img class="preview" alt="the frames made so far" src="{url}"></div>'


def stage_result(record: dict[str, Any]) -> str:
    return f'<div class="stage">{player(record["file"], "autoplay")}</div>'


def address(name: str) -> str:
    """Return the address of a result or a record, relative to the page."""
    return f"api/results/{quote(name)}"


def player(name: str, how: str) -> str:
    """Return a result as a video or picture element.

    Its address is relative, so that it works behind a proxy.
    """
    if name.endswith(".png"):
        return f'<img class="result" alt="the picture" src="{address(name)}">'
    return f'<video class="result" src="{address(name)}" {how} controls loop muted playsinline></video>'


def known(trained_on: TrainedOn) -> str:
    """Return a table of what a model was trained on: its lists, or some words of its captions if it has no lists."""
    lists = trained_on.lists or {"words": sorted(trained_on.words)[:SHOWN_WORDS]}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(', '.join(values))}</td></tr>" for name, values in lists.items())
    return f"<table>{rows}</table>"


def status(text: str, progress: float | None = None) -> str:
    bar = "" if progress is None else f'<progress value="{progress:.3f}" max="1"></progress>'
    return f'<div class="status" role="status">{bar}<span>{escape(text)}</span></div>'


def wrong(message: str) -> str:
    return f'<div class="status wrong" role="alert">{escape(message)}</div>'


def thumbnail(frame: np.ndarray) -> str:
    """Return a frame uint8 [H, W, 3] as a small picture in a data URL."""
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return f'<img alt="the upload" src="{data_url([np.asarray(picture)], 1)}">'


def example(prompt: str, frames: np.ndarray, fps: int) -> str:
    """Return a button with a moving picture of what an example asks for, frames uint8 [T, H, W, 3], and its words."""
    return f'<button type="button" class="example"><img alt="" src="{data_url(frames, fps)}"><span>{escape(prompt)}</span></button>'


def card(record: dict[str, Any]) -> str:
    """Return a result with its settings and a button that the gallery listens to."""
    name = record["file"]
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in shown_settings(record))
    record_address = address(record_path(Path(name)).name)
    links = f'<a href="{address(name)}" download>file</a> · <a href="{record_address}" download>record</a>'
    return (
        f'<figure>{player(name, "preload=auto")}<figcaption><p>{escape(record["prompt"])}</p>{links}'
        f"<details><summary>seed {record['seed']}, settings</summary><table>{rows}</table></details>"
        f'<button type="button" class="reuse">Use these settings</button></figcaption></figure>'
    )


def shown_settings(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the (name, value) pairs of a record that are shown: inputs, size and the sampling options that are not off."""
    settings = record["settings"]
    given = [(name, record[name]) for name in ("negative_prompt", "image", "video", "last_image") if record.get(name)]
    of_clips = [name for name, option in all_options().items() if not option.for_pictures]
    left_out = HIDDEN if settings["num_frames"] > 1 else (*HIDDEN, *OF_A_CLIP, *of_clips)
    rest = [(key, value) for key, value in settings.items() if key not in left_out and value not in (None, False, 0, (0.0, 1.0))]
    return [*given, ("size", f"{settings['width']} x {settings['height']}"), *rest, ("seconds", record["seconds"])]
