"""Comparison of models with the one that they were made from: size, seconds of a clip, and shares of prompts that they follow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lumos.device_peak import synchronize
from lumos.errors import drawable, needing_matplotlib
from lumos.files import replacing
from lumos.pipeline.base import VideoPipeline
from lumos.runtime import parameter_count

PARTS = ("sampling", "pixels")
MEANS = ("motion", "steady", "moved")
"""Figures of `evaluate prompts` of which the table has the mean over kinds."""


def clip_seconds(pipe: VideoPipeline, prompt: str, seed: int) -> dict[str, float]:
    """Return the seconds of one clip: `sampling`, from the prompt to the latents, and `pixels`, from the latents to the frames."""
    started = time.perf_counter()
    latents = pipe(prompt, seed=seed, output_type="latent").frames
    synchronize(str(pipe.device))
    sampled = time.perf_counter()
    pipe.decode_clip(latents[0])
    synchronize(str(pipe.device))
    return {"sampling": sampled - started, "pixels": time.perf_counter() - sampled}


def seconds_in_turn(
    pipes: Sequence[VideoPipeline], prompt: str, repetitions: int, seed: int, step: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """Return the median seconds of a clip by part, for each pipeline.

    The pipelines make a clip in turn, so that a disturbance of the machine affects all of them. The first clip of each
    is not measured.
    """
    found: list[dict[str, list[float]]] = [{part: [] for part in PARTS} for _ in pipes]
    for round_ in range(repetitions + 1):
        for pipe, of in zip(pipes, found, strict=True):
            seconds = clip_seconds(pipe, prompt, seed + round_)
            step()
            if round_:
                for part in PARTS:
                    of[part].append(seconds[part])
    return [{part: statistics.median(values) for part, values in of.items()} for of in found]


def size_of(folder: str | Path, pipe: VideoPipeline) -> dict[str, int]:
    """Return the parameters of the network and of the decoder of pixels, and the bytes of the folder's weights."""
    decoder = getattr(pipe.video_tokenizer, "decoder", None)
    return {
        "parameters": parameter_count(pipe.model),
        "decoder_parameters": 0 if decoder is None else parameter_count(decoder),
        "bytes": sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")),
    }


def table(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[list[str]]:
    """Return the cells of the table, the heads first. Speed and shares are compared with the first row."""
    heads = ["model", "parameters", "sampling s", "pixels s", "faster", *(f"{kind}: all right" for kind in kinds)]
    cells = [[*heads, *MEANS, "loss"]]
    first = rows[0]
    for row in rows:
        right = [share_of(row, kind, "all") for kind in kinds]
        lost = [100 * (share - share_of(first, kind, "all")) for kind, share in zip(kinds, right, strict=True)]
        shares = [f"{share:.2f}" + (f" ({points:+.0f})" if row is not first else "")
                  for share, points in zip(right, lost, strict=True)]  # fmt: skip
        means = [statistics.mean(share_of(row, kind, name) for kind in kinds) for name in MEANS]
        cells.append([
            row["model"], f"{row['parameters'] / 1e6:.2f} M", *(f"{row['seconds'][part]:.2f}" for part in PARTS),
            f"{first['seconds']['sampling'] / row['seconds']['sampling']:.2f} x", *shares, *(f"{mean:.2f}" for mean in means),
            f"{row['losses']['loss']:.3f}",
        ])  # fmt: skip
    return cells


def share_of(row: dict[str, Any], kind: str, name: str) -> float:
    """Return a share of `evaluate prompts` from a row of the report."""
    return row["shares"][kind].get(name, 0.0)


def draw(rows: Sequence[dict[str, Any]], kinds: Sequence[str], path: Path) -> None:
    """Write the picture of the report as PNG: shares by kind over seconds of sampling, a line for each kind.

    Raises UserError if matplotlib is not installed.
    """
    with needing_matplotlib("the picture"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    seconds = [row["seconds"]["sampling"] for row in rows]
    for kind in kinds:
        axes.plot(seconds, [share_of(row, kind, "all") for row in rows], "o-", label=drawable(kind))
    for row, x in zip(rows, seconds, strict=True):
        axes.annotate(drawable(row["model"]), (x, 0.02), rotation=90, fontsize=8, ha="right")
    axes.set(xlabel="seconds of sampling a clip", ylabel="share of clips that are all right", ylim=(0, 1.03), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
