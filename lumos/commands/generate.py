"""`generate`: make a clip or a picture from text, from a picture or from a clip to continue, or many from a list."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Container, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.cli import add_json
from lumos.commands.loading import (
    add_loading,
    circumstances,
    collected_notes,
    ended_by_sigterm,
    given_arguments,
    load,
    metadata,
    model_sha256,
    out_of_memory_as,
    planned,
)
from lumos.errors import printable
from lumos.pipeline.defaults import SHIPPED_MODEL
from lumos.pipeline.options import add_flags, all_options

if TYPE_CHECKING:
    import numpy as np

    from lumos.pipeline.base import VideoPipeline
    from lumos.pipeline.parts import Parts
    from lumos.pipeline.request import Resolved

BAR = "{l_bar}{bar}| part {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"
OF_LISTS = ("output_dir", "batch_size", "shard", "engine", "workers")
NEED_ALL = ("compile", "int8", "device_map", "lora")
"""The options whose work needs packages that `lumos.lean_imports` leaves out, or may need them."""
OTHER_USES = ("last_image", "interpolate", "views")
"""The arguments that are in the record of a clip only if they are given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", help="what the clip shows; several prompts are shown one after the other")
    asked.add_argument("--prompts", metavar="LIST", help="a .txt, .jsonl or .csv file with a clip in each row, see docs/generate")
    add("--prompt-frames", type=int, nargs="+", metavar="N", help="frames of each --prompt; their sum is --num-frames")
    add("--negative-prompt", help="what the clip must not show; default: no text")
    add("--image", help="picture that the clip begins with")
    add("--video", help="clip to continue; the result begins with its last frames")
    add("--last-image", help="picture that the clip ends with; for models that were trained on it")
    add("--interpolate", type=int, metavar="2", help="make twice the frames a second of --video, which are kept; for STIV models")
    add("--views", action="store_true", default=None, help="make seven views of the object in --image; for STIV models")
    add("--num-given-frames", type=int, help="last frames of --video to use; default: as many as the model usually gets")
    add("--model", default=None, help=f"model folder; default: {SHIPPED_MODEL}")
    add("--output", help="file to write: .mp4 .gif .webp .png; default: outputs/<prompt>-<seed>.mp4, or the next free name")
    add("--output-dir", help="folder for several clips, default: outputs; the same command continues an interrupted list")
    add("--preview", metavar="FILE", help=".mp4 .gif .webp file that is rewritten with all frames so far after each latent frame")
    add("--num-frames", type=int, help="frames of the clip, given frames included; 1 makes a picture; "
        "Lumos-1 makes 1 + a multiple of 4")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--fps", type=int, help="frames per second")
    add_flags(parser, all_options())
    add("--seed", type=int, nargs="+", help="several seeds make several clips; default: random (printed and stored), --prompts: 0")
    add("--num-videos-per-prompt", type=int, help="clips of each prompt, with seed, seed + 1, ...; default: 1")
    add("--batch-size", type=int, help="clips of the same size and length in a batch; default: 4")
    add("--shard", metavar="I/N", help="make only part I of N of several clips; torchrun and deepspeed set it for their processes")
    add("--engine", choices=("local", "ray"), help="where several clips are made: here, or in tasks of a Ray cluster (extra [ray])")
    add("--workers", type=int, help="tasks with --engine ray, each with its part of the clips; default: one for each GPU, or one")
    add_loading(parser)
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the deepspeed launcher


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from lumos.errors import UserError

    if args.prompt is None and args.prompts is None:
        from lumos.pipeline.request import needs_words

        if needs_words(args.interpolate, args.views):
            raise UserError("one of the arguments --prompt --prompts is required; `lumos generate --help` lists the options")
        args.prompt = [""]
    several = args.prompts is not None or len(args.seed or ()) > 1 or args.num_videos_per_prompt not in (None, 1)
    if several:
        from lumos.commands.generate_list import make_list

        if args.engine == "ray":
            from lumos.commands.generate_ray import make_on_ray

            return make_list(args, make_on_ray)
        return make_list(args)
    if given := [name for name in OF_LISTS if getattr(args, name) is not None]:
        option = given[0].replace("_", "-")
        raise UserError(f"--{option} has no effect on a single clip; leave it out, or make several with --prompts or --seed 1 2 3")
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"a launcher started {world} processes for one clip; ask for several with --prompts or --seed 1 2 3")
    return make_one(args)


def make_one(args: argparse.Namespace) -> dict[str, Any]:
    """Make a clip, write it with its record beside it, and return the record."""
    if args.own_process:
        gc.disable()  # until the model is loaded: nearly all objects of imports stay, and the collector would search them in vain

    from lumos.durable import put_file
    from lumos.files import check_writable, file_identity, write_json
    from lumos.pipeline.inputs import align, check_prompt
    from lumos.pipeline.request import needs_words
    from lumos.prompt_lists.clips import (
        check_prompt_frames,
        default_name,
        free_name,
        prompts_over_time,
        put_under_free_name,
        record_path,
    )
    from lumos.prompt_lists.rows import PATHS
    from lumos.video.io import check_output, write_frames

    words = needs_words(args.interpolate, args.views)
    for prompt in args.prompt:
        check_prompt(prompt, words)
    over_time = prompts_over_time(args.prompt, args.prompt_frames, args.num_frames)
    seed = align(args.prompt[0], seed=args.seed and args.seed[0], needs_words=words)["seed"][0]
    begins_with = {file_identity(path) for name in PATHS if (path := getattr(args, name)) is not None}

    def usual_output(num_frames: int | None) -> Path:
        return Path("outputs", default_name(args.prompt[0], num_frames == 1, after=f"-{seed}"))

    def checked_output(num_frames: int | None, fps: float = 1) -> Path:
        """Return the path of the result. Raises UserError if it, its JSON record or the preview cannot be written."""
        output = free_name(usual_output(num_frames)) if args.output is None else Path(args.output)
        check_output(output, num_frames, fps, keep=begins_with)
        check_writable(record_path(output))
        if args.preview is not None:
            check_preview(Path(args.preview), num_frames, fps, keep={file_identity(output), *begins_with})
        return output

    checked_output(over_time["num_frames"])

    from lumos.lean_imports import import_lean

    if args.own_process and not any(getattr(args, name) for name in NEED_ALL):
        import_lean()  # before the modules below, which import transformers

    from lumos.pipeline.request import Request
    from lumos.progress import progress_bar
    from lumos.runtime import seconds_since_start

    pipe, model = load(args)
    if args.own_process:
        gc.freeze()
        gc.enable()
    loaded, start_seconds = time.perf_counter(), seconds_since_start()
    check_prompt_frames(args.prompt_frames, pipe.temporal_compression)
    request = Request.of(**{**given_arguments(args), **over_time, "seed": seed})
    with collected_notes() as notes:
        resolved = pipe.resolve(request)
        pipe.check_pictures(resolved)
    output, named = checked_output(resolved.clip.num_frames, resolved.clip.fps), []

    def put(source: Path, target: Path) -> None:
        """Give the finished file its name. A default name is chosen again, as another process may have taken it meanwhile."""
        if args.output is None:
            named.append(put_under_free_name(source, usual_output(resolved.clip.num_frames)))
        else:
            put_file(source, target)

    about = metadata(args, model, args.prompt[0], seed)
    advice = planned(pipe, resolved.clip, resolved.sampling, args.prompt[0])
    bar_of = {"total": resolved.new_frames, "bar_format": BAR, "file": sys.stderr, "leave": False}
    with ended_by_sigterm(), out_of_memory_as(advice), progress_bar(desc="generating", **bar_of) as bar:

        def on_step(frame: int, frames: int, step: int, steps: int) -> None:
            bar.set_postfix_str(f"step {step + 1}/{steps}", refresh=False)
            bar.update(frame + (step + 1) / steps - bar.n)

        with continued(args, pipe, model, resolved, output) as stored:
            encoded = replace(pipe.encoded(resolved), parts=stored)
            parts: Iterable[np.ndarray] = (part for (part,) in pipe.stream_encoded(encoded, on_step))
            if args.preview is not None:
                parts = previewed(parts, Path(args.preview), resolved.clip.fps)
            written = write_frames(output, parts, resolved.clip.fps, about, put)
    if args.output is None:
        written = output = named[0]
    generated, total = time.perf_counter(), seconds_since_start()
    circumstance = circumstances(args, pipe)
    record = {
        **about, "later_prompts": request.later_prompts, "output": str(written), "negative_prompt": args.negative_prompt,
        "image": args.image, "video": args.video,
        **{name: value for name in OTHER_USES if (value := getattr(args, name)) is not None},
        "settings": resolved.settings, "notes": notes, **circumstance,
        "seconds": {"start_and_load": round(start_seconds, 2), "generate": round(generated - loaded, 2), "total": round(total, 2)},
    }  # fmt: skip
    write_json(record_path(output), record)
    calls = resolved.settings.get("sampler", {}).get("model_calls")
    spent = f"{total:.1f} s  " + (f"{calls} model calls  " if calls else "")
    print(printable(f"{written}  seed {seed}  {spent}peak memory {circumstance['peak_memory_mb']} MB"))
    return record


@contextmanager
def continued(
    args: argparse.Namespace, pipe: VideoPipeline, model: str, resolved: Resolved, output: Path
) -> Iterator[Parts | None]:
    """Yield the stored parts of a clip that is made in parts, or None for another clip; see `lumos.pipeline.parts`."""
    from lumos.errors import RunError
    from lumos.pipeline.parts import digest, parts_folder, stored_parts

    if not resolved.can_continue:
        yield None
        return
    inputs = {
        "prompts": resolved.prompts, "negative_prompts": resolved.negative_prompts, "seeds": resolved.seeds,
        "settings": resolved.settings, "given": [digest(frames) for frames in resolved.given],
        "sha256": model_sha256(model, args), "dtype": str(pipe.dtype), "int8": args.int8,
    }  # fmt: skip
    folder = parts_folder(output)
    try:
        with stored_parts(folder, inputs) as parts:
            yield parts
    except KeyboardInterrupt:
        raise RunError(
            f"interrupted; the finished parts are in {folder}, and the same command with --seed {resolved.seeds[0]} continues"
        ) from None


def check_preview(path: Path, num_frames: int | None, fps: float, keep: Container[Hashable]) -> None:
    from lumos.errors import UserError
    from lumos.video.io import check_output

    if path.suffix.lower() == ".png":
        raise UserError(f"--preview {path} cannot grow as pictures; name a .mp4, .gif or .webp file")
    if num_frames == 1:
        raise UserError("--preview has no effect on a picture; leave it out")
    check_output(path, fps=fps, keep=keep)


def previewed(parts: Iterable[np.ndarray], path: Path, fps: int) -> Iterator[np.ndarray]:
    """Yield `parts` unchanged and write all frames so far to `path` before each; the file is complete at every moment."""
    import numpy as np

    from lumos.video.io import write_video

    seen = []
    for part in parts:
        seen.append(part)
        write_video(path, np.concatenate(seen), fps)
        yield part
