"""The clips of a prompt list: their inputs, their files, their batches, and which of them are made already.

A record is the JSON file beside a clip that holds all its settings.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lumos.durable import put_file
from lumos.errors import UserError, shown
from lumos.files import check_writable, read_json, write_json
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.options import SamplingOptions
from lumos.pipeline.request import Request, Resolved, needs_words
from lumos.prompt_lists.results import UNFINISHED, Results
from lumos.prompt_lists.rows import PromptRow
from lumos.video.io import check_output
from lumos.wording import one_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lumos.pipeline.base import OnStep, VideoPipeline


@dataclass(frozen=True)
class Form:
    """The properties that all clips of one batch share."""

    sampling: SamplingOptions
    clip: ClipDefaults
    num_given_frames: int  # that the clip begins with
    starts: tuple[int, ...]  # first frames of the later prompts
    names: tuple[str, ...]  # the arguments among negative_prompt, image, video and last_image that the clips have
    uses: tuple[tuple[str, Any], ...]  # the values of interpolate and views that are set

    def options(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that are equal for all clips."""
        shape = {name: getattr(self.clip, name) for name in ("num_frames", "height", "width", "fps")}
        given = self.num_given_frames if "video" in self.names and not self.uses else None
        return {**vars(self.sampling), **shape, **dict(self.uses), "num_given_frames": given}


@dataclass(frozen=True)
class ListedClip:
    """One clip to make."""

    file: str  # path below the folder of results
    line: int  # line of the list
    form: Form
    prompt: str
    later: tuple[str, ...]  # later prompts, one for each of form.starts
    given: dict[str, str]  # the values of the arguments in form.names
    seed: int
    inputs: dict[str, Any]  # all values that decide what the clip shows


def prompts_over_time(prompts: Sequence[str], frames: Sequence[int] | None, num_frames: int | None) -> dict[str, Any]:
    """Return the arguments `prompt`, `later_prompts` and `num_frames` of a call for one or more prompts.

    frames: how many frames each prompt holds for; None for a single prompt that holds for the whole
    clip. UserError if the number of prompts, `frames` and `num_frames` do not agree.
    """
    if frames is None and len(prompts) == 1:
        return {"prompt": prompts[0], "num_frames": num_frames}
    if frames is None or len(frames) != len(prompts):
        counts = "none" if frames is None else len(frames)
        raise UserError(f"{len(prompts)} prompts are given and {counts} of their prompt_frames; give the frames of each prompt")
    if min(frames) < 1:
        raise UserError(f"prompt_frames {shown(list(frames))} is not allowed; each prompt needs at least one frame")
    if num_frames not in (None, sum(frames)):
        total = f"prompt_frames {shown(list(frames))} are {sum(frames)} frames"
        raise UserError(f"{total}, but num_frames is {num_frames}; leave one out")
    starts = [sum(frames[:n]) for n in range(1, len(frames))]
    return {"prompt": prompts[0], "later_prompts": list(zip(starts, prompts[1:], strict=True)), "num_frames": sum(frames)}


def check_prompt_frames(frames: Sequence[int] | None, stride: int) -> None:
    """Raise UserError if a prompt would end inside of a latent frame; `stride` is the number of frames of a latent frame."""
    if frames and ((frames[0] - 1) % stride or any(count % stride for count in frames[1:])):
        raise UserError(
            f"prompt_frames {list(frames)} is not allowed; give 1 + a multiple of {stride} for the first prompt and multiples of "
            f"{stride} for later ones"
        )


def request_of(row: PromptRow, defaults: Mapping[str, Any], seed: int, stride: int) -> Request:
    """Return the request of a row.

    defaults: options of the command line, which hold where the row has no value. seed: a row
    without a seed gets this seed plus its number. stride: the temporal compression of the model.
    UserError for a row that could not be read or that has no prompt.
    """
    if row.problem:
        raise UserError(row.problem)
    own = {name: value for name, value in row.options.items() if name != "output"}
    options = {**defaults, **own}
    if "image" in own or "video" in own:  # an image of the row also replaces a video of the command line, and vice versa
        options |= {name: own.get(name) for name in ("image", "video")}
    if "num_frames" in own and "prompt_frames" not in own:
        options.pop("prompt_frames", None)
    prompts = options.pop("prompt", None)
    if not prompts and needs_words(options.get("interpolate"), options.get("views")):
        raise UserError("the row has no prompt")
    prompts = prompts or ""
    frames, num_frames = options.pop("prompt_frames", None), options.pop("num_frames", None)
    over_time = prompts_over_time([prompts] if isinstance(prompts, str) else prompts, frames, num_frames)
    check_prompt_frames(frames, stride)
    options.setdefault("seed", seed + row.number)
    repeats = options.get("num_videos_per_prompt") or 1
    if isinstance(options["seed"], list) and repeats == 1:
        options["num_videos_per_prompt"] = len(options["seed"])
    return Request.of(**options, **over_time)


def clips_of(row: PromptRow, request: Request, resolved: Resolved, inputs: dict[str, Any], numbered: bool) -> list[ListedClip]:
    """Return the clips of a row.

    inputs: further values that decide what a clip shows, for example the model. numbered: name the
    files after the number of the row, and add the seed only if the row makes several clips.
    """
    names = ("negative_prompt", "image", "video", "last_image")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    later = tuple(text for _, text in request.later_prompts or ())
    starts = tuple(start for start, _ in request.later_prompts or ())
    uses = tuple((name, value) for name in ("interpolate", "views") if (value := getattr(request, name)))
    begun = resolved.num_given_frames - ("last_image" in given)
    form = Form(resolved.sampling, resolved.clip, begun, starts, tuple(given), uses)
    clips = []
    for seed in resolved.seeds:
        after = "" if numbered and len(resolved.seeds) == 1 else f"-{seed}"
        file = default_name(request.prompt, form.clip.num_frames == 1, f"{row.number + 1:04d}-" if numbered else "", after)
        if "output" in row.options:
            path = PurePosixPath(row.options["output"])
            file = str(path.parent / f"{path.stem}{after}{path.suffix}")
        decides = {
            **dict(uses),
            "prompt": request.prompt, "later_prompts": request.later_prompts, "negative_prompt": request.negative_prompt,
            "seed": seed, "settings": resolved.settings, **inputs,
        }  # fmt: skip
        clips.append(ListedClip(file, row.line, form, request.prompt, later, given, seed, json.loads(json.dumps(decides))))
    return clips


def default_name(prompt: str, picture: bool, before: str = "", after: str = "") -> str:
    """Return a file name made of `before`, the words of the prompt, in any script, and `after`."""
    letters = (c if unicodedata.category(c)[0] in "LMN" else "-" for c in one_line(prompt).lower())
    words = re.sub("-+", "-", "".join(letters)).strip("-")[:60]
    words = words.encode()[:150].decode(errors="ignore").strip("-") or "clip"  # file systems limit names to 255 bytes
    return f"{before}{words}{after}{'.png' if picture else '.mp4'}"


def free_name(path: Path) -> Path:
    """Return the path, or if there is a file or record of it, the first of NAME-2, NAME-3, ... without one."""
    found, number = path, 1
    while found.exists() or record_path(found).exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def put_under_free_name(source: Path, path: Path) -> Path:
    """Rename a finished file to `free_name(path)` and return that, which no other process can take meanwhile."""
    while True:
        found = free_name(path)
        try:
            os.close(os.open(found, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:  # another process was quicker
            continue
        put_file(source, found)
        return found


def with_free_name(out: Path, clip: ListedClip) -> ListedClip:
    """Return the clip under the first of its names NAME, NAME-2, NAME-3, ... that no clip of other inputs has."""
    path, number = out / clip.file, 1
    while (path.exists() or record_path(path).exists()) and not is_made(path, clip.inputs):
        number += 1
        path = (out / clip.file).with_stem(f"{Path(clip.file).stem}-{number}")
    return replace(clip, file=path.relative_to(out).as_posix())


def is_made(path: Path, inputs: Mapping[str, Any]) -> bool:
    """Return whether a file is whole, and its record holds these inputs."""
    try:
        record = read_json(record_path(path), "a clip's record")
        whole = path.is_file() and path.stat().st_size == record.get("bytes", path.stat().st_size)
        return whole and all(record[name] == value for name, value in inputs.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_file(out: Path, clip: ListedClip, keep: Container[Hashable] = ()) -> None:
    """Raise UserError if the file of a clip cannot be written, or if it would replace a file in `keep`."""
    path = PurePosixPath(clip.file)
    if path.is_absolute() or ".." in path.parts or path.parts[:1] in ((), (UNFINISHED,)):
        raise UserError(
            f"output {shown(clip.file)} is not allowed; name a file in the folder of results, for example cats/one.mp4"
        )
    frames = clip.form.clip.num_frames
    if path.suffix.lower() == ".png" and frames > 1:
        raise UserError(f"output {shown(clip.file)} would be a folder of {frames} pictures; name a .mp4, .gif or .webp file")
    check_output(out / clip.file, frames, clip.form.clip.fps, keep)
    check_writable(record_path(out / clip.file))


def batches_of(clips: Sequence[ListedClip], size: int) -> list[list[ListedClip]]:
    """Group the clips by their form, in order, into batches of at most `size` clips."""
    groups: dict[Form, list[ListedClip]] = {}
    for clip in clips:
        groups.setdefault(clip.form, []).append(clip)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def make_latents(
    pipe: VideoPipeline, clips: Sequence[ListedClip], on_step: OnStep
) -> list[tuple[Tensor, Mapping[int, np.ndarray]]]:
    """Make the clips of a batch and return the arguments of `VideoPipeline.decode` for each: latents and kept pixels."""
    form = clips[0].form
    later = [(start, [clip.later[n] for clip in clips]) for n, start in enumerate(form.starts)]
    given = {name: [clip.given[name] for clip in clips] for name in form.names}
    made = pipe(
        [clip.prompt for clip in clips], seed=[clip.seed for clip in clips], later_prompts=later or None, output_type="latent",
        on_step=on_step, **given, **form.options(),
    )  # fmt: skip
    return list(zip(made.latents, made.kept_pixels or [{}] * len(clips), strict=True))


def record_path(result: Path) -> Path:
    """Return the path of the record of a result: out.mp4 has the record out.mp4.json."""
    return result.with_name(f"{result.name}.json")


class Recorded(Results):
    """The clips in a folder, each with a record beside it.

    A clip counts as made if its record holds the same inputs and the file has the number of bytes
    in the record. describe(clip) returns the content of a record.
    """

    def __init__(
        self, out: Path, shard: tuple[int, int], clips: Sequence[ListedClip], describe: Callable[[ListedClip], dict[str, Any]]
    ):
        super().__init__(out, "", shard)
        self.clips, self.describe = {clip.file: clip for clip in clips}, describe

    def has(self, file: str) -> bool:
        return is_made(self.folder / file, self.clips[file].inputs)

    def stale(self, files: Iterable[str]) -> list[str]:
        """Return the files that exist but were made from other inputs."""
        return [file for file in files if (self.folder / file).is_file() and not self.has(file)]

    def put(self, file: str, write: Callable[[Path], object]) -> None:
        """Write a file and its record.

        The old record is removed before the file changes and the new record is written last, so
        that a stop in between never leaves a record beside a file that it does not describe.
        """
        record = record_path(self.folder / file)
        record.unlink(missing_ok=True)
        super().put(file, write)
        told = {**self.describe(self.clips[file]), "bytes": (self.folder / file).stat().st_size}
        super().put(record.relative_to(self.folder).as_posix(), lambda path: write_json(path, told))
